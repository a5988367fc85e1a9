//! Compressed shards, as webdataset writes them where their names end with `gz`.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use flate2::write::MultiGzDecoder;

use crate::error::{DataError, Result};
use crate::sink::Sink;

const EXTENSIONS: [&str; 2] = [".gz", ".tgz"];
/// Bytes that are read from a file at a time.
const CHUNK: usize = 1 << 16;

/// Whether a file or url of this name is compressed.
pub(crate) fn is_compressed(name: &str) -> bool {
    let path = name.split('?').next().unwrap_or_default();
    EXTENSIONS.iter().any(|extension| path.ends_with(extension))
}

/// Hands to a sink what compressed bytes stand for.
pub(crate) struct Inflater<'a> {
    /// What errors call the shard.
    name: &'a str,
    decoder: MultiGzDecoder<Vec<u8>>,
    sink: Sink<'a>,
}

impl<'a> Inflater<'a> {
    pub(crate) fn new(name: &'a str, sink: Sink<'a>) -> Self {
        Self { name, decoder: MultiGzDecoder::new(Vec::new()), sink }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// They are not gzip's, or those of the sink.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        // In short stretches, because a few bytes may stand for very many.
        const STRETCH: usize = 1 << 12;
        bytes.chunks(STRETCH).try_for_each(|stretch| {
            let written = self.decoder.write_all(stretch);
            self.hand_over()?;
            written.map_err(|error| self.failed(&error))
        })
    }

    /// Takes the end.
    ///
    /// # Errors
    /// More was to come, or those of the sink.
    pub(crate) fn finish(mut self) -> Result<()> {
        let finished = self.decoder.try_finish();
        self.hand_over()?;
        finished.map_err(|error| self.failed(&error))
    }

    fn hand_over(&mut self) -> Result<()> {
        let inflated = std::mem::take(self.decoder.get_mut());
        if inflated.is_empty() { Ok(()) } else { (self.sink)(&inflated) }
    }

    fn failed(&self, error: &std::io::Error) -> DataError {
        DataError::fetch(self.name, format!("gzip: {error}"))
    }
}

/// Hands what is in a compressed file to `sink`.
///
/// # Errors
/// The file cannot be read or is damaged, or those of `sink`.
pub(crate) fn read(path: &str, sink: Sink) -> Result<()> {
    let failed = DataError::io("read", Path::new(path));
    let mut inflater = Inflater::new(path, sink);
    let mut chunk = vec![0; CHUNK];
    let mut copy = || -> std::io::Result<Result<()>> {
        let mut file = File::open(path)?;
        loop {
            let length = file.read(&mut chunk)?;
            if length == 0 {
                return Ok(Ok(()));
            }
            if let Err(error) = inflater.push(&chunk[..length]) {
                return Ok(Err(error));
            }
        }
    };
    copy().map_err(failed)??;
    inflater.finish()
}

#[cfg(test)]
pub(crate) mod testing {
    use std::io::Write;

    use flate2::Compression;
    use flate2::write::GzEncoder;

    pub(crate) fn compressed(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::testing::compressed;
    use super::*;

    fn inflated(bytes: &[u8], chunk: usize) -> Result<Vec<u8>> {
        let mut all = Vec::new();
        let mut sink = |bytes: &[u8]| {
            all.extend_from_slice(bytes);
            Ok(())
        };
        let mut inflater = Inflater::new("shard.tar.gz", &mut sink);
        bytes.chunks(chunk).try_for_each(|chunk| inflater.push(chunk))?;
        inflater.finish()?;
        Ok(all)
    }

    #[test]
    fn names_tell_what_is_compressed() {
        for name in ["a.tar.gz", "a.tgz", "http://host/a.tar.gz?b=c.tar"] {
            assert!(is_compressed(name), "{name}");
        }
        for name in ["a.tar", "gz", "http://host/a.tar?b=c.tar.gz"] {
            assert!(!is_compressed(name), "{name}");
        }
    }

    #[test]
    fn files_that_were_compressed_apart_are_one() {
        let both = [compressed(b"one "), compressed(b"two")].concat();
        assert_eq!(inflated(&both, 5).unwrap(), b"one two");
    }

    #[test]
    fn what_is_cut_or_no_gzip_is_named() {
        let whole = compressed(&b"some text ".repeat(1000));
        for bytes in [&whole[..whole.len() - 9], b"no gzip, but long enough for a header"] {
            let message = inflated(bytes, 64).unwrap_err().to_string();
            assert!(message.contains("shard.tar.gz") && message.contains("gzip: "), "{message}");
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes: Vec<u8>, repeats in 1usize..2000, chunk in 1usize..9000) {
            let bytes = bytes.repeat(repeats);
            prop_assert_eq!(inflated(&compressed(&bytes), chunk).unwrap(), bytes);
        }
    }
}
