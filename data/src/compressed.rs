//! Compressed shards, told by their first bytes as Python's `tarfile` does for webdataset: gzip, bzip2 and xz.

use std::fmt::Display;
use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use bzip2::write::BzDecoder;
use flate2::write::MultiGzDecoder;
use liblzma::write::XzDecoder;

use crate::error::{DataError, Result};
use crate::sink::Sink;
use crate::tar_index::BLOCK;

/// How many of the first bytes tell the format.
const MAGIC_BYTES: usize = 10;
/// Zeros that end an archive: two blocks.
const END_OF_ARCHIVE: usize = 2 * BLOCK as usize;
/// Bytes that are read from a file at a time.
const CHUNK: usize = 1 << 16;

/// How a shard is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Gzip,
    Bzip2,
    Xz,
}

impl Format {
    /// By the first bytes, `None` for what is not compressed.
    fn of(first: &[u8]) -> Option<Self> {
        // An archive that is not compressed begins with a member's name.
        match first {
            [0x1f, 0x8b, ..] => Some(Self::Gzip),
            [b'B', b'Z', b'h', _, b'1', b'A', b'Y', b'&', b'S', b'Y', ..]
            | [b'B', b'Z', b'h', _, 0x17, b'r', b'E', b'8', b'P', 0x90, ..] => Some(Self::Bzip2),
            [0xfd, b'7', b'z', b'X', b'Z', 0, ..] => Some(Self::Xz),
            _ => None,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Bzip2 => "bzip2",
            Self::Xz => "xz",
        }
    }

    fn decoder(self) -> Decoder {
        match self {
            Self::Gzip => Decoder::Gzip(MultiGzDecoder::new(Vec::new())),
            Self::Bzip2 => Decoder::Bzip2(BzDecoder::new(Vec::new())),
            Self::Xz => Decoder::Xz(XzDecoder::new_multi_decoder(Vec::new())),
        }
    }
}

/// Whether the file is there and compressed.
pub(crate) fn is_compressed(path: &Path) -> bool {
    let mut first = Vec::new();
    let read = File::open(path).and_then(|file| file.take(MAGIC_BYTES as u64).read_to_end(&mut first));
    read.is_ok() && Format::of(&first).is_some()
}

enum Decoder {
    Gzip(MultiGzDecoder<Vec<u8>>),
    Bzip2(BzDecoder<Vec<u8>>),
    Xz(XzDecoder<Vec<u8>>),
}

impl Decoder {
    /// Takes some of the bytes and says how many.
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        match self {
            Self::Gzip(decoder) => decoder.write(bytes),
            Self::Bzip2(decoder) => decoder.write(bytes),
            Self::Xz(decoder) => decoder.write(bytes),
        }
    }

    fn finish(&mut self) -> std::io::Result<()> {
        match self {
            Self::Gzip(decoder) => decoder.try_finish(),
            Self::Bzip2(decoder) => decoder.try_finish(),
            Self::Xz(decoder) => decoder.try_finish(),
        }
    }

    fn take(&mut self) -> Vec<u8> {
        std::mem::take(match self {
            Self::Gzip(decoder) => decoder.get_mut(),
            Self::Bzip2(decoder) => decoder.get_mut(),
            Self::Xz(decoder) => decoder.get_mut(),
        })
    }
}

enum State {
    /// The first bytes, too few to tell.
    Starting(Vec<u8>),
    Plain,
    Compressed(Format, Box<Decoder>),
}

/// Hands on to a sink the bytes that it gets, or what they stand for where they are compressed.
pub(crate) struct Inflater<'a> {
    /// What errors call the shard.
    name: &'a str,
    state: State,
    sink: Sink<'a>,
    /// Zero bytes at the end of what was handed on.
    zeros: usize,
}

impl<'a> Inflater<'a> {
    pub(crate) fn new(name: &'a str, sink: Sink<'a>) -> Self {
        Self { name, state: State::Starting(Vec::new()), sink, zeros: 0 }
    }

    /// Takes the next bytes.
    ///
    /// # Errors
    /// They are damaged, or those of the sink.
    pub(crate) fn push(&mut self, bytes: &[u8]) -> Result<()> {
        match &mut self.state {
            State::Starting(first) => {
                first.extend_from_slice(bytes);
                if first.len() < MAGIC_BYTES {
                    return Ok(());
                }
                let first = std::mem::take(first);
                self.state = match Format::of(&first) {
                    Some(format) => State::Compressed(format, Box::new(format.decoder())),
                    None => State::Plain,
                };
                self.push(&first)
            }
            State::Plain => (self.sink)(bytes),
            State::Compressed(format, decoder) => {
                let (format, mut rest) = (*format, bytes);
                // Handed on after each write, because a few bytes may stand for very many.
                while !rest.is_empty() {
                    let written = decoder.write(rest);
                    let inflated = decoder.take();
                    self.zeros = zeros_at_end(self.zeros, &inflated);
                    (self.sink)(&inflated)?;
                    match written {
                        Ok(0) => return Err(failed(self.name, format, "bytes behind its end")),
                        Ok(taken) => rest = &rest[taken..],
                        Err(error) => return Err(failed(self.name, format, error)),
                    }
                }
                Ok(())
            }
        }
    }

    /// Takes the end. What lacks the end of its compression has been handed on as far as it goes: the archive in it is
    /// found to be cut.
    ///
    /// # Errors
    /// The archive has its end and the compression none that fits, or those of the sink.
    pub(crate) fn finish(self) -> Result<()> {
        match self.state {
            State::Starting(first) => (self.sink)(&first),
            State::Plain => Ok(()),
            State::Compressed(format, mut decoder) => {
                let finished = decoder.finish();
                let inflated = decoder.take();
                (self.sink)(&inflated)?;
                match finished {
                    Err(error) if zeros_at_end(self.zeros, &inflated) >= END_OF_ARCHIVE => {
                        Err(failed(self.name, format, error))
                    }
                    _ => Ok(()),
                }
            }
        }
    }
}

/// As many zeros as end `bytes`, together with the `before` where they are nothing else.
fn zeros_at_end(before: usize, bytes: &[u8]) -> usize {
    match bytes.iter().rev().position(|&byte| byte != 0) {
        Some(zeros) => zeros,
        None => before.saturating_add(bytes.len()),
    }
}

fn failed(shard: &str, format: Format, reason: impl Display) -> DataError {
    DataError::fetch(shard, format!("{}: {reason}", format.name()))
}

/// Hands what is in a compressed file to `sink`.
///
/// # Errors
/// The file cannot be read or is damaged, or those of `sink`.
pub(crate) fn read(path: &str, sink: Sink) -> Result<()> {
    let mut inflater = Inflater::new(path, sink);
    let mut file = File::open(path).map_err(DataError::io("open", Path::new(path)))?;
    let mut chunk = vec![0; CHUNK];
    loop {
        let length = file.read(&mut chunk).map_err(DataError::io("read", Path::new(path)))?;
        if length == 0 {
            return inflater.finish();
        }
        inflater.push(&chunk[..length])?;
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use std::io::Write;

    /// The bytes in each format, with its name.
    pub(crate) fn compressed(bytes: &[u8]) -> [(&'static str, Vec<u8>); 3] {
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
        gzip.write_all(bytes).unwrap();
        let mut bzip2 = bzip2::write::BzEncoder::new(Vec::new(), bzip2::Compression::fast());
        bzip2.write_all(bytes).unwrap();
        let mut xz = liblzma::write::XzEncoder::new(Vec::new(), 1);
        xz.write_all(bytes).unwrap();
        [("gzip", gzip.finish().unwrap()), ("bzip2", bzip2.finish().unwrap()), ("xz", xz.finish().unwrap())]
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
        let mut inflater = Inflater::new("shard.tar", &mut sink);
        bytes.chunks(chunk).try_for_each(|chunk| inflater.push(chunk))?;
        inflater.finish()?;
        Ok(all)
    }

    #[test]
    fn what_is_not_compressed_stays() {
        for bytes in [&b""[..], b"BZh9", b"BZhello.txt", b"a longer text", &[0x1f], &[0xfd, b'7']] {
            assert_eq!(inflated(bytes, 2).unwrap(), bytes);
        }
    }

    #[test]
    fn files_that_were_compressed_apart_are_one() {
        let (one, two) = (compressed(b"one "), compressed(b"two"));
        for format in [0, 2] {
            let both = [one[format].1.as_slice(), &two[format].1].concat();
            assert_eq!(inflated(&both, 5).unwrap(), b"one two", "{}", one[format].0);
        }
    }

    #[test]
    fn what_is_cut_is_kept_and_what_is_damaged_named() {
        // Noise, so that the formats have several blocks of it.
        let mut state = 1u32;
        let text: Vec<u8> = (0..1 << 20)
            .map(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state >> 24) as u8
            })
            .collect();
        for (format, whole) in compressed(&text) {
            let cut = inflated(&whole[..whole.len() - 100_000], 1 << 16).unwrap();
            assert!(text.starts_with(&cut) && cut.len() > text.len() / 2, "{format}: {}", cut.len());
            let mut damaged = whole.clone();
            damaged[whole.len() / 3..][..64].fill(0xaa);
            let message = inflated(&damaged, 1 << 16).map_err(|error| error.to_string());
            match message {
                Err(message) => {
                    assert!(message.contains("shard.tar") && message.contains(format), "{message}")
                }
                Ok(bytes) => assert_ne!(bytes, text, "{format}: noise is stored as it is"),
            }
        }
    }

    #[test]
    fn a_whole_archive_under_a_checksum_that_does_not_fit_is_damaged() {
        let archive = [&b"a member"[..], &[0; 1024]].concat();
        let [(_, mut gzip), ..] = compressed(&archive);
        assert_eq!(inflated(&gzip, 7).unwrap(), archive);
        let checksum = gzip.len() - 8;
        gzip[checksum] ^= 1;
        assert!(inflated(&gzip, 7).unwrap_err().to_string().contains("shard.tar: gzip: "));
    }

    #[test]
    fn a_bomb_is_handed_on_in_parts() {
        const BYTES: usize = 200 << 20;
        for (format, bomb) in compressed(&vec![0; BYTES]) {
            let (mut all, mut most) = (0, 0);
            let mut sink = |bytes: &[u8]| {
                all += bytes.len();
                most = most.max(bytes.len());
                Ok(())
            };
            let mut inflater = Inflater::new("shard.tar", &mut sink);
            inflater.push(&bomb).unwrap();
            inflater.finish().unwrap();
            assert!(all == BYTES && most <= 48 << 20, "{format}: {} bytes gave {most} at once", bomb.len());
        }
    }

    proptest! {
        #[test]
        fn bytes_come_back(bytes: Vec<u8>, repeats in 1usize..2000, chunk in 1usize..9000) {
            let bytes = bytes.repeat(repeats);
            for (format, compressed) in compressed(&bytes) {
                prop_assert_eq!(&inflated(&compressed, chunk).unwrap(), &bytes, "{}", format);
            }
        }
    }
}
