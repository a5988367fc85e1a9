//! Errors of this crate: one line each, naming the key or file, the value and what was expected.

use std::path::{Path, PathBuf};

use m6_data::error::DataError;
use m6_run::RunError;
use m6_runtime::RuntimeError;

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, VqganError>;

/// What can go wrong with the image tokenizer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VqganError {
    /// A config asks for something that cannot be.
    #[error("{}: key `{key}`: {message}", path.display())]
    Config {
        /// The config file.
        path: PathBuf,
        /// Full key.
        key: String,
        /// The value found and what was expected.
        message: String,
    },
    /// A model folder's file is missing, malformed or does not fit.
    #[error("{}: {reason}", path.display())]
    Model {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Codes that the codebook does not have, or not as many as the grid asks for.
    #[error("codes: {0}")]
    Codes(String),
    /// Pictures of a size that the model cannot take.
    #[error("pictures: {0}")]
    Pictures(String),
    /// Training has left the numbers.
    #[error(
        "step {step}: the loss is not finite; a lower `schedule.lr` or a longer `schedule.warmup` may help"
    )]
    Diverged {
        /// The step.
        step: u64,
    },
    /// Run folder, checkpoints, metrics.
    #[error(transparent)]
    Run(#[from] RunError),
    /// Shards and pictures.
    #[error(transparent)]
    Data(#[from] DataError),
    /// libtorch and weight files.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
}

impl VqganError {
    pub(crate) fn model(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Model { path: path.to_owned(), reason: reason.to_string() }
    }
}
