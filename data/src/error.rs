//! Errors of this crate: each message is one line that names the file or value and what was expected.

use std::io;
use std::path::{Path, PathBuf};

use crate::flaw::Flaw;

/// What can go wrong with data.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The operating system refused a file operation.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb ("read", "create").
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A shard pattern that names no file, or is itself malformed.
    #[error("shards \"{pattern}\": {reason}")]
    Pattern {
        /// The pattern as given.
        pattern: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A shard behind a url or command that did not come whole.
    #[error("cannot fetch {shard}: {reason}")]
    Fetch {
        /// The url, or the command with its `pipe:`.
        shard: String,
        /// What happened.
        reason: String,
    },
    /// A shard that is not what it was when its set was opened.
    #[error("{} has changed since it was opened; open it again", shard.display())]
    Changed {
        /// The shard.
        shard: PathBuf,
    },
    /// The folder of fetched shards cannot be used.
    #[error("cache of shards: {0}")]
    Cache(String),
    /// Bytes that are not a picture we can decode.
    #[error("broken picture: {0}")]
    Picture(String),
    /// A label, array or tensors that cannot be read.
    #[error("broken {kind}: {reason}")]
    Member {
        /// `cls`, `npy` or `safetensors`.
        kind: &'static str,
        /// What is wrong or was expected.
        reason: String,
    },
    /// A picture operation asked for something outside the picture.
    #[error("picture of {width}x{height}: {reason}")]
    PictureSize {
        /// Width in pixels.
        width: u32,
        /// Height in pixels.
        height: u32,
        /// What was asked and does not fit.
        reason: String,
    },
    /// Something wrong inside one sample.
    #[error("{0}")]
    Sample(Flaw),
    /// Samples that cannot be used are too many.
    #[error("{skipped} cannot be used; the last: {last}")]
    TooManySkipped {
        /// How many.
        skipped: String,
        /// What is wrong with the last of them, and where it is.
        last: String,
    },
    /// A source that a mixture cannot deal places to.
    #[error("source {source_name}: {problem}")]
    Mixture {
        /// Name of the source.
        source_name: String,
        /// What is wrong and what was expected.
        problem: String,
    },
    /// A caption field that contradicts itself.
    #[error("caption field for member \"{member}\": {reason}")]
    CaptionField {
        /// The `member` of the field.
        member: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A transform that does not parse.
    #[error("transform \"{spec}\": {reason}")]
    Transform {
        /// The step or pipeline as given.
        spec: String,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A rule of a filter that does not parse.
    #[error("filter \"{rule}\": {reason}")]
    Filter {
        /// The rule as given.
        rule: String,
        /// What was expected.
        reason: String,
    },
    /// A tokenizer file that cannot be used.
    #[error("tokenizer {}: {reason}", path.display())]
    TokenizerFile {
        /// The file.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// Encoding, decoding or training failed.
    #[error("tokenizer: {0}")]
    Tokenizer(String),
    /// A conversation that the template has no place for, or a tokenizer without its tokens.
    #[error("conversation: {0}")]
    Chat(String),
    /// A vocabulary too small to be trained.
    #[error("tokenizer: vocab_size = {size}, expected at least {smallest} (one a byte)")]
    VocabSize {
        /// The size asked for.
        size: usize,
        /// The smallest.
        smallest: usize,
    },
    /// A data set that cannot be walked in random order.
    #[error("sample order over {len} samples: expected 1 to {}", u32::MAX)]
    Order {
        /// The number of samples.
        len: usize,
    },
    /// A sample that cannot be written to a shard.
    #[error("cannot write sample {key}: {reason}")]
    Write {
        /// Key of the sample.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// A source for packing that is malformed.
    #[error("cannot pack {}: {reason}", path.display())]
    Pack {
        /// The folder, jsonl file or shard.
        path: PathBuf,
        /// What is wrong and what was expected.
        reason: String,
    },
    /// A loader's worker thread panicked while it made a sample.
    #[error("data worker failed at ordinal {ordinal}: {message}")]
    Worker {
        /// The ordinal it was making.
        ordinal: u64,
        /// The panic message.
        message: String,
    },
}

/// Result of this crate.
pub type Result<T> = std::result::Result<T, DataError>;

impl DataError {
    /// Names the file and the action of an I/O error, for `map_err`.
    pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataError {
        let path = path.to_owned();
        move |source| DataError::Io { action, path, source }
    }

    /// What became of a shard that is no file.
    pub(crate) fn fetch(shard: &str, reason: impl Into<String>) -> Self {
        Self::Fetch { shard: shard.to_owned(), reason: reason.into() }
    }
}
