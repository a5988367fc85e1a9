//! Using a trained model: pictures from prompts, captions of pictures.

mod beam;
mod cache;
mod caption;
mod grid;
mod picture;
mod rerank;
mod sampler;
#[cfg(test)]
pub(crate) mod testing;

pub use cache::KvCache;
pub use caption::{Caption, caption, score_texts};
pub use grid::rows_grid;
pub use picture::{DrawRequest, Drawing, draw};
pub use sampler::{Sampling, guide};
