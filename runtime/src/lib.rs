//! What libtorch can do and `tch` does not bind: a parameter registry with strict weights, fused AdamW and Muon, online merging,
//! averaged weights, attention by sequence lengths and in chunks, fused norms and gates, rows sorted by expert, backward passes in
//! parts, random state, determinism and memory figures, weight files of safetensors and of torch, and the few layers that
//! every model here is built from. The only crate with `unsafe` and C++.

#![allow(unsafe_code)]

mod adamw;
pub mod attention;
pub mod chunked_attention;
mod cuda_graph;
pub mod device;
mod dtype;
mod error;
mod ffi;
pub mod fused;
pub mod graph;
pub mod merging;
mod muon;
pub mod nn;
pub mod optim;
mod optim_config;
mod params;
mod permute;
mod pickle;
mod shards;
mod torch_file;
#[cfg(test)]
mod traps;
mod weight_file;
mod weights;

pub use cuda_graph::CudaGraph;
pub use dtype::FloatDtype;
pub use error::{Result, RuntimeError, first_line};
pub use params::{Group, Init, Param, Params, first_problems, named_seed};
pub use permute::Permutation;
pub use shards::TensorShards;
pub use weight_file::WeightFile;
pub use weights::{TensorFile, is_finite, read_tensors, write_tensors, write_tensors_as};
