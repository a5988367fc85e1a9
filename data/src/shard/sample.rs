//! One sample in memory.

use std::path::Path;

use crate::error::{DataError, Result};
use crate::flaw::{Flaw, FlawClass};
use crate::picture::{Decoded, Rgb8};

/// Extensions that hold a sample's picture, in the order in which they are looked for.
pub const PICTURE_EXTENSIONS: [&str; 5] = ["webp", "png", "jpg", "jpeg", "bmp"];

#[derive(Debug)]
pub(super) struct MemberEntry {
    pub(super) extension: String,
    pub(super) offset: u64,
    pub(super) size: u64,
}

/// One sample in memory: the members of a shard that share a key.
#[derive(Debug)]
pub struct Sample<'a> {
    /// Key of the sample: folder and file name up to its first dot.
    pub key: &'a str,
    /// The shard it comes from.
    pub shard: &'a Path,
    pub(super) members: &'a [MemberEntry],
    pub(super) start: u64,
    pub(super) bytes: Vec<u8>,
}

impl Sample<'_> {
    /// Bytes of the member with this (lower-case) extension.
    pub fn member(&self, extension: &str) -> Option<&[u8]> {
        self.members.iter().find(|m| m.extension == extension).map(|m| self.slice(m))
    }

    /// Extension and bytes of every member, in the order of the shard.
    pub fn members(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.members.iter().map(|m| (m.extension.as_str(), self.slice(m)))
    }

    /// Bytes of the picture: the first member among [`PICTURE_EXTENSIONS`]. A sample may have none.
    pub fn picture(&self) -> Option<&[u8]> {
        PICTURE_EXTENSIONS.iter().find_map(|extension| self.member(extension))
    }

    /// An error that names this sample, its shard and where it begins there.
    pub fn error(&self, class: FlawClass, reason: impl Into<String>) -> DataError {
        DataError::Sample(Flaw {
            class,
            shard: self.shard.to_owned(),
            offset: Some(self.start),
            key: Some(self.key.to_owned()),
            reason: reason.into(),
        })
    }

    fn slice(&self, member: &MemberEntry) -> &[u8] {
        let start = (member.offset - self.start) as usize;
        &self.bytes[start..start + member.size as usize]
    }
}

/// Decodes the [picture](Sample::picture) of a sample.
///
/// # Errors
/// Names the sample when it has no picture or a broken one.
pub fn sample_image(sample: &Sample) -> Result<Rgb8> {
    sample_image_for(sample, None)?.into_rgb()
}

/// As [`sample_image`], by [`Decoded::for_side`].
pub(crate) fn sample_image_for(sample: &Sample, short_side: Option<u32>) -> Result<Decoded> {
    let picture = sample.picture().ok_or_else(|| {
        let reason = format!("no picture (expected one of {})", PICTURE_EXTENSIONS.join(", "));
        sample.error(FlawClass::MissingMember, reason)
    })?;
    Decoded::for_side(picture, short_side).map_err(|e| sample.error(FlawClass::BrokenPicture, e.to_string()))
}
