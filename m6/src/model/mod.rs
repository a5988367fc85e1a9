//! One transformer stack: text, patches and codes in, texts and codes out.

mod attention;
mod config;
mod difference;
mod extend;
mod folder;
mod hub;
mod mlp;
mod mode;
mod moe;
mod norm;
mod order;
mod recompute;
mod rotary;
mod sequence;
mod transformer;
mod upcycle;
mod vocab;

pub use config::{Bias, FeedForwardKind, ModelConfig, NormKind, WindowConfig};
pub use extend::Extension;
pub(crate) use folder::read_info;
pub use folder::{Model, ModelInfo, VQGAN};
pub(crate) use hub::language_shape;
pub use hub::{LanguageModel, has_pictures, is_published};
pub use mode::Mode;
pub use moe::{Balance, MoeConfig, RouterNoise, RoutingKind};
pub use order::CodeOrder;
pub use recompute::Recompute;
pub use rotary::{ChunkConfig, RotaryConfig, RotaryScaling, Rotation};
pub use sequence::{Positions, SEGMENTS, Sequence, Tokens};
pub use transformer::{Hidden, Transformer, compute_dtype};
pub use upcycle::Upcycling;
pub use vocab::{Language, Special, Vocab};

/// What the names of the patch encoder's tensors begin with.
const PATCHES: &str = "patches";
/// Initial width of matrices and tables (GPT-2).
const INIT_STD: f64 = 0.02;
