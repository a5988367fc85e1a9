//! What can go wrong around a training run; every message is one line that can be shown to a user as it is.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate's functions.
pub type Result<T> = std::result::Result<T, RunError>;

/// What can go wrong around a training run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The operating system refused an operation on a file or folder.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A config file is not TOML.
    #[error("{}, line {line}, column {column}: {message}", path.display())]
    ConfigSyntax {
        /// The config file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// Column in characters, from 1.
        column: usize,
        /// What was found and what was expected.
        message: String,
    },
    /// A key of a config is unknown, missing, or has a value that does not fit.
    #[error("{origin}: {}{message}", if key.is_empty() { String::new() } else { format!("key `{key}`: ") })]
    ConfigKey {
        /// The config file, or the `--set` that gave the value.
        origin: String,
        /// Full key, such as `train.optimizer.lr`; empty for the whole file.
        key: String,
        /// The value found and what was expected.
        message: String,
    },
    /// A `--set` cannot be applied.
    #[error("--set {text}: {message}")]
    Override {
        /// The argument as given.
        text: String,
        /// What is wrong with it.
        message: String,
    },
    /// A new run was to start in a folder that holds one.
    #[error("{} already holds a run; resume it or choose another folder", .0.display())]
    RunExists(PathBuf),
    /// A run was to go on with another config than it was started with.
    #[error("{} was started with another `{key}`; choose another `run` folder or restore the value", run.display())]
    OtherConfig {
        /// The run folder.
        run: PathBuf,
        /// First key that differs.
        key: String,
    },
    /// A run was to be opened where there is none.
    #[error("{} holds no run: it has no config.toml", .0.display())]
    NoRun(PathBuf),
    /// Another process works in the run folder.
    #[error("{} is in use by another process ({owner})", path.display())]
    Locked {
        /// The run folder.
        path: PathBuf,
        /// What the other process wrote about itself.
        owner: String,
    },
    /// A checkpoint could not be written; older ones are untouched.
    #[error("checkpoint of step {step} was not saved: {reason}; older checkpoints are intact")]
    Save {
        /// Step of the checkpoint.
        step: u64,
        /// Why not.
        reason: String,
    },
    /// A checkpoint's files are not those that were saved.
    #[error("checkpoint {} is damaged: {reason}", path.display())]
    DamagedCheckpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// The file and what is wrong with it.
        reason: String,
    },
    /// The newest checkpoint is damaged; nothing older is used unasked.
    #[error("{damage}; older checkpoints: {}", older_checkpoints(older))]
    DamagedNewest {
        /// What is wrong with the newest.
        damage: Box<RunError>,
        /// Folders of the older ones, newest first.
        older: Vec<PathBuf>,
    },
    /// A checkpoint was asked for by its step and is not there.
    #[error("{} holds no checkpoint of step {step}", path.display())]
    NoCheckpoint {
        /// Folder of checkpoints.
        path: PathBuf,
        /// Step asked for.
        step: u64,
    },
    /// A row of `metrics.jsonl` is not a JSON object with a step.
    #[error("{}, line {line}: {reason}", path.display())]
    MetricRow {
        /// The file.
        path: PathBuf,
        /// Line, from 1.
        line: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// The handler of SIGINT and SIGTERM could not be installed.
    #[error("cannot handle SIGINT and SIGTERM: {0}")]
    Signal(#[source] std::io::Error),
}

fn older_checkpoints(older: &[PathBuf]) -> String {
    if older.is_empty() {
        return "none".to_owned();
    }
    older.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
}

/// Names what was tried and on which path when an I/O operation fails.
pub(crate) trait IoContext<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T>;
}

impl<T> IoContext<T> for io::Result<T> {
    fn context(self, action: &'static str, path: &Path) -> Result<T> {
        self.map_err(|source| RunError::Io { action, path: path.to_owned(), source })
    }
}
