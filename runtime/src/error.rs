//! Errors of this crate: one line each, naming the tensor or file concerned.

use std::path::{Path, PathBuf};

use tch::TchError;

/// What can go wrong between this program and libtorch or a weight file.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// libtorch refused an operation; only the first line of its report is kept.
    #[error("libtorch: {0}")]
    Torch(String),
    /// A file could not be read or written.
    #[error("{path}: {reason}", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why, in one line.
        reason: String,
    },
    /// The tensors of a file are not those of the model.
    #[error("{path}: {problem}", path = path.display())]
    Mismatch {
        /// The weight file.
        path: PathBuf,
        /// The first differences, by tensor name.
        problem: String,
    },
    /// A device was asked for that this machine or this build does not have.
    #[error("device `{asked}`: {reason}")]
    Device {
        /// What was asked for.
        asked: String,
        /// Why it cannot be had.
        reason: String,
    },
}

/// The result type of this crate.
pub type Result<T> = std::result::Result<T, RuntimeError>;

impl RuntimeError {
    pub(crate) fn file(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::File { path: path.to_path_buf(), reason: first_line(&reason.to_string()) }
    }
}

impl From<TchError> for RuntimeError {
    fn from(error: TchError) -> Self {
        Self::Torch(first_line(&error.to_string()))
    }
}

/// The first line of a message: libtorch appends some thirty lines of C++ frames to its own.
pub fn first_line(message: &str) -> String {
    message.lines().next().unwrap_or("no message").trim().to_string()
}
