//! What is wrong with data: a class to count by, and where it is.

use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::error::DataError;

/// Kinds of damage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FlawClass {
    /// A shard that cannot be read, or holds no sample.
    UnusableShard,
    /// An index that does not fit its shard; the shard was read without it.
    UnusedIndex,
    /// Damage inside an archive; the samples before it are whole.
    DamagedShard,
    /// A sample with two members of the same extension.
    DuplicateMember,
    /// A key that an earlier sample of the set has, one that is whole.
    DuplicateKey,
    /// A member whose path would leave the folder into which it is unpacked, can be written in more than one way, or has no
    /// extension.
    UnsafeName,
    /// A member is absent that was asked for.
    MissingMember,
    /// A picture that cannot be decoded.
    BrokenPicture,
    /// A text that is not UTF-8, or JSON that is malformed.
    BrokenText,
    /// A `cls`, `npy` or `safetensors` that cannot be read.
    BrokenMember,
    /// A sample that is whole and yet of no use: a picture that is too small for a crop, a text without a known token.
    Unfit,
}

/// One defect of a set of shards.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Flaw {
    /// Its kind.
    pub class: FlawClass,
    /// The shard.
    pub shard: PathBuf,
    /// The byte of the shard where it is, or where its sample begins.
    pub offset: Option<u64>,
    /// Key of the sample, where it concerns one.
    pub key: Option<String>,
    /// What is wrong.
    pub reason: String,
}

impl FlawClass {
    /// Name in reports, logs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::UnusableShard => "unusable_shard",
            Self::UnusedIndex => "unused_index",
            Self::DamagedShard => "damaged_shard",
            Self::DuplicateMember => "duplicate_member",
            Self::DuplicateKey => "duplicate_key",
            Self::UnsafeName => "unsafe_name",
            Self::MissingMember => "missing_member",
            Self::BrokenPicture => "broken_picture",
            Self::BrokenText => "broken_text",
            Self::BrokenMember => "broken_member",
            Self::Unfit => "unfit",
        }
    }
}

impl Flaw {
    pub(crate) fn of_shard(class: FlawClass, shard: PathBuf, offset: Option<u64>, reason: String) -> Self {
        Self { class, shard, offset, key: None, reason }
    }

    /// Of a shard that cannot be used, and the reason.
    pub fn of_unusable(shard: PathBuf, error: &DataError) -> Self {
        Self::of_shard(FlawClass::UnusableShard, shard, None, error.to_string())
    }
}

impl fmt::Display for Flaw {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.shard.display())?;
        if let Some(offset) = self.offset {
            write!(f, ", byte {offset}")?;
        }
        if let Some(key) = &self.key {
            write!(f, ", sample {key}")?;
        }
        write!(f, ": {}", self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_that_are_written() {
        for class in [FlawClass::UnusableShard, FlawClass::BrokenMember, FlawClass::Unfit] {
            assert_eq!(serde_json::to_value(class).unwrap(), class.name());
        }
    }
}
