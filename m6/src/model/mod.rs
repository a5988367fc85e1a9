//! One transformer stack: text, patches and codes in, texts and codes out.

mod attention;
mod config;
mod folder;
mod mlp;
mod moe;
mod order;
mod sequence;
mod transformer;
mod vocab;

pub use config::{ModelConfig, MoeConfig};
pub use folder::{Model, ModelInfo};
pub use order::CodeOrder;
pub use sequence::{Positions, Sequence, Tokens};
pub use transformer::{Hidden, Mode, Transformer, compute_kind};
pub use vocab::{Language, Special, Vocab};

/// Initial width of matrices and tables (GPT-2).
const INIT_STD: f64 = 0.02;
/// Epsilon of every norm, Qwen's value.
const NORM_EPS: f64 = 1e-6;
