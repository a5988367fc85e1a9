//! Using a trained model: pictures from prompts, captions of pictures, the likelihood of texts.

mod beam;
mod cache;
mod caption;
mod drawing;
mod grid;
mod likelihood;
mod picture;
mod rerank;
mod sampler;
mod score;
#[cfg(test)]
pub(crate) mod testing;

pub use cache::KvCache;
pub use caption::{Caption, caption};
pub use drawing::Drawing;
pub use grid::rows_grid;
pub use likelihood::{Likelihood, likelihood};
pub use picture::{DrawRequest, draw};
pub use sampler::{Sampling, guide};
pub use score::{perplexities, score_texts};
