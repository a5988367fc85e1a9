//! Writes webdataset shards: ustar, deterministic headers, files that appear by rename.

use std::io::BufWriter;
use std::path::{Path, PathBuf};

use tempfile::NamedTempFile;

use crate::atomic_file::world_readable;
use crate::error::{DataError, Result};
use crate::key::member_path;

/// Bytes of header in front of each member.
const HEADER_BYTES: u64 = 512;
const FILE_MODE: u32 = 0o644;

/// Writes samples into `PREFIX-000000.tar`, `PREFIX-000001.tar`, ...: the same samples give the same bytes.
///
/// A shard gets its name when it is whole; a writer dropped before [`ShardWriter::finish`] leaves no half shard behind.
pub struct ShardWriter {
    dir: PathBuf,
    prefix: String,
    max_bytes: u64,
    open: Option<ShardFile>,
    finished: Vec<PathBuf>,
}

impl ShardWriter {
    /// Starts a set of shards in `dir` (made if absent). A shard is closed before it grows beyond `max_bytes_per_shard`,
    /// unless one sample alone is larger.
    pub fn create(dir: &Path, prefix: &str, max_bytes_per_shard: u64) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(DataError::io("create", dir))?;
        let (dir, prefix) = (dir.to_owned(), prefix.to_owned());
        Ok(Self { dir, prefix, max_bytes: max_bytes_per_shard, open: None, finished: Vec::new() })
    }

    /// The folder of the shards.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Appends one sample: members as (extension, bytes).
    ///
    /// # Errors
    /// A key or extension that would not be read back as given or not be unpacked in its folder, or a failing disk.
    pub fn write(&mut self, key: &str, members: &[(&str, &[u8])]) -> Result<()> {
        let paths = member_paths(key, members)?;
        // The end-of-archive mark is two more blocks.
        let limit = self.max_bytes.saturating_sub(2 * HEADER_BYTES);
        if self.open.as_ref().is_some_and(|shard| shard.bytes + size_in_shard(members) > limit) {
            self.close()?;
        }
        let shard = match &mut self.open {
            Some(shard) => shard,
            None => self.open.insert(ShardFile::create_in(&self.dir)?),
        };
        shard.append(key, &paths, members)
    }

    /// Closes the last shard and returns all of them in order.
    pub fn finish(mut self) -> Result<Vec<PathBuf>> {
        self.close()?;
        Ok(std::mem::take(&mut self.finished))
    }

    fn close(&mut self) -> Result<()> {
        let Some(shard) = self.open.take() else { return Ok(()) };
        let path = self.dir.join(format!("{}-{:06}.tar", self.prefix, self.finished.len()));
        shard.finish(&path)?;
        self.finished.push(path);
        Ok(())
    }
}

/// One shard, without a name until it is whole: dropped before [`ShardFile::finish`] it leaves nothing behind.
pub struct ShardFile {
    archive: tar::Builder<BufWriter<NamedTempFile>>,
    bytes: u64,
}

/// The path of each member, checked.
fn member_paths(key: &str, members: &[(&str, &[u8])]) -> Result<Vec<String>> {
    let fail = |reason| DataError::Write { key: key.to_owned(), reason };
    members.iter().map(|(extension, _)| member_path(key, extension).map_err(fail)).collect()
}

/// Bytes that a sample's members take in an archive.
fn size_in_shard(members: &[(&str, &[u8])]) -> u64 {
    let padded = |bytes: &[u8]| HEADER_BYTES + (bytes.len() as u64).next_multiple_of(HEADER_BYTES);
    members.iter().map(|(_, bytes)| padded(bytes)).sum()
}

impl ShardFile {
    /// Starts a shard in the folder (made if absent) in which it will get its name.
    ///
    /// # Errors
    /// The folder cannot be made or written to.
    pub fn create_in(dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir).map_err(DataError::io("create", dir))?;
        let file = tempfile::Builder::new()
            .prefix(".shard-")
            .permissions(world_readable())
            .tempfile_in(dir)
            .map_err(DataError::io("create a shard in", dir))?;
        Ok(Self { archive: tar::Builder::new(BufWriter::new(file)), bytes: 0 })
    }

    /// As [`ShardWriter::write`].
    ///
    /// # Errors
    /// As for [`ShardWriter::write`].
    pub fn write(&mut self, key: &str, members: &[(&str, &[u8])]) -> Result<()> {
        self.append(key, &member_paths(key, members)?, members)
    }

    fn append(&mut self, key: &str, paths: &[String], members: &[(&str, &[u8])]) -> Result<()> {
        for (path, (_, bytes)) in paths.iter().zip(members) {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(FILE_MODE);
            let appended = self.archive.append_data(&mut header, path, *bytes);
            appended.map_err(|e| DataError::Write { key: key.to_owned(), reason: e.to_string() })?;
        }
        self.bytes += size_in_shard(members);
        Ok(())
    }

    /// Gives the shard its name, which must be one in its folder.
    ///
    /// # Errors
    /// A failing disk.
    pub fn finish(self, path: &Path) -> Result<()> {
        let fail = || DataError::io("write", path);
        let file = self.archive.into_inner().and_then(|w| w.into_inner().map_err(|e| e.into_error()));
        let file = file.map_err(fail())?;
        file.as_file().sync_all().map_err(fail())?;
        file.persist(path).map_err(|e| fail()(e.error)).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardSet;

    fn write_set(dir: &Path) -> Vec<PathBuf> {
        let mut writer = ShardWriter::create(dir, "train", 4096).unwrap();
        for n in 0..5 {
            writer.write(&format!("{n:03}"), &[("bin", &[n; 600]), ("txt", b"text")]).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn shards_are_split_readable_and_reproducible() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let paths = write_set(first.path());
        assert_eq!(paths.len(), 5, "two samples of 2,560 bytes do not fit into 4,096");
        for (a, b) in paths.iter().zip(write_set(second.path())) {
            assert!(std::fs::metadata(a).unwrap().len() <= 4096);
            assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
        }
        let set = ShardSet::open(&[first.path().join("train-*.tar").display().to_string()]).unwrap();
        assert_eq!((set.len(), set.flaws()), (5, [].as_slice()));
        assert_eq!(set.sample(3).unwrap().member("bin"), Some([3; 600].as_slice()));
    }

    #[test]
    fn nothing_half_written_stays_behind() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "train", u64::MAX).unwrap();
        writer.write("a", &[("txt", b"x")]).unwrap();
        drop(writer);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn keys_that_cannot_be_read_back_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "train", u64::MAX).unwrap();
        let long = format!("../{}", "x".repeat(300));
        for (key, extension) in [
            ("a.b", "txt"),
            ("", "txt"),
            ("a", ""),
            ("a", "b/txt"),
            ("a", "t\0xt"),
            ("__meta", "x__"),
            ("../a", "txt"),
            (&long, "txt"),
            ("/a", "txt"),
            ("a//b", "txt"),
        ] {
            let error = writer.write(key, &[("ok", b""), (extension, b"x")]).unwrap_err().to_string();
            assert!(error.starts_with(&format!("cannot write sample {key}: ")), "{error}");
        }
        assert_eq!(writer.finish().unwrap().len(), 0, "nothing of them is written");
    }
}
