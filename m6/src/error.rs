//! Errors of this crate: one line each.

use std::path::{Path, PathBuf};

use m6_data::DataError;
use m6_run::RunError;
use m6_runtime::RuntimeError;
use m6_vqgan::VqganError;

/// What can go wrong while training or using a model.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// From libtorch or a weight file.
    #[error(transparent)]
    Runtime(#[from] RuntimeError),
    /// From shards, pictures, captions or text tokenizers.
    #[error(transparent)]
    Data(#[from] DataError),
    /// From configs, run folders or checkpoints.
    #[error(transparent)]
    Run(#[from] RunError),
    /// From the image tokenizer.
    #[error(transparent)]
    Vqgan(#[from] VqganError),
    /// A file or folder does not hold what it should.
    #[error("{path}: {problem}", path = path.display())]
    File {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// A request or setting that cannot be met; wrong use rather than failure.
    #[error("{0}")]
    Usage(String),
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(path: &Path, problem: impl std::fmt::Display) -> Self {
        Self::File { path: path.to_path_buf(), problem: problem.to_string() }
    }
}
