//! Pictures to discrete codes and back: the VQGAN image tokenizer (Esser et al. 2021) with the narrow, normalised
//! codebook of LlamaGen (Sun et al. 2024), its losses, its training and its scores; weights of other projects in and
//! out.
//!
//! ```no_run
//! use m6_vqgan::{Vqgan, pictures_to_tensor, to_pictures, to_unit};
//! # fn pictures() -> Vec<m6_data::Rgb8> { Vec::new() }
//! let model = Vqgan::load("out/vqgan/model".as_ref(), tch::Device::Cpu)?;
//! let x = to_unit(&pictures_to_tensor(&pictures())?, model.device())?;
//! let codes = model.encode(&x)?;
//! let grid = model.config().grid();
//! let reconstructions = to_pictures(&model.decode_codes(&codes, grid, grid)?);
//! # Ok::<_, m6_vqgan::VqganError>(())
//! ```

mod augment;
pub mod bench;
mod bottleneck;
mod codebook;
mod config;
mod discriminator;
mod error;
pub mod eval;
pub mod fidelity;
mod grid;
mod layers;
mod loss;
mod lpips;
mod means;
pub mod metrics;
mod model;
mod pictures;
mod quantize;
mod revive;
mod stream;
mod tiles;
pub mod train;
pub mod weights;

pub use bottleneck::{Bottleneck, Passage, Quantized};
pub use codebook::{CodebookConfig, CodebookStart, EncoderGradient, GumbelConfig};
pub use config::{ConfigProblem, QuantizerKind, VqganConfig};
pub use error::{Result, VqganError};
pub use eval::{EvalReport, EvalRequest, VqganReport};
pub use grid::CodeGrid;
pub use loss::{EntropyLoss, LossWeights};
pub use lpips::LpipsConfig;
pub use model::{Dtype, FILES, Vqgan, VqganOutput};
pub use pictures::{pictures_to_tensor, to_bytes, to_pictures, to_unit};
