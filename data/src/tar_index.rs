//! Walks the headers of a tar archive: which members it has and where their bytes lie.
//!
//! Reads ustar, GNU long names and pax `path`/`size`; everything else is skipped. Any bytes may be given: sizes are
//! limited and checked before use, and a damaged archive yields the members before the damage and a [`Defect`].
//! Format: POSIX.1-2017 `pax`, "ustar Interchange Format"; GNU tar manual, "Basic Tar Format".

use std::fmt;
use std::io::{self, BufReader, Read, Seek, SeekFrom};

pub(crate) const BLOCK: u64 = 512;
/// Long names and pax records above this size are taken for damage.
const MAX_EXTENSION_BYTES: u64 = 1 << 20;

/// One regular file of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    /// Path inside the archive, without a leading `./`.
    pub path: String,
    /// Position of the first byte in the archive.
    pub offset: u64,
    /// Length in bytes; `offset + size` never exceeds the archive.
    pub size: u64,
}

/// Damage found at a position of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Defect {
    /// Position of the header in question.
    pub offset: u64,
    /// What is wrong.
    pub reason: String,
    /// Whether the walk had to stop here, so that later members are lost.
    pub fatal: bool,
}

impl fmt::Display for Defect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at byte {}: {}", self.offset, self.reason)
    }
}

/// What an archive holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TarIndex {
    /// The whole regular files, in the order of the archive.
    pub members: Vec<Member>,
    /// Damage, in the order of the archive; only the last can be fatal.
    pub defects: Vec<Defect>,
}

impl TarIndex {
    /// Walks the archive from its start. Fails only when reading fails; damage becomes [`TarIndex::defects`].
    pub fn read(mut archive: impl Read + Seek) -> io::Result<Self> {
        let length = archive.seek(SeekFrom::End(0))?;
        archive.rewind()?;
        let mut walk =
            Walk { archive: BufReader::new(archive), length, position: 0, pending: Pending::default() };
        let mut index = TarIndex::default();
        loop {
            let header_at = walk.position;
            match walk.step()? {
                Ok(Step::Member(member)) => index.members.push(member),
                Ok(Step::Skipped) => {}
                Ok(Step::End) => return Ok(index),
                Err(Damage { reason, fatal }) => {
                    index.defects.push(Defect { offset: header_at, reason, fatal });
                    if fatal {
                        return Ok(index);
                    }
                }
            }
        }
    }
}

/// Whether a block is the header of a regular file of this size.
pub(crate) fn is_header_of_file(block: &[u8; BLOCK as usize], size: u64) -> bool {
    Header::parse(block).is_ok_and(|header| matches!(header.kind, Kind::File) && header.size == size)
}

enum Step {
    Member(Member),
    Skipped,
    End,
}

struct Damage {
    reason: String,
    fatal: bool,
}

impl Damage {
    fn fatal(reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), fatal: true }
    }
}

/// What an extension header says about the member that follows it.
#[derive(Default)]
struct Pending {
    path: Option<Vec<u8>>,
    size: Option<u64>,
}

struct Walk<R> {
    archive: BufReader<R>,
    length: u64,
    position: u64,
    pending: Pending,
}

impl<R: Read + Seek> Walk<R> {
    /// Reads one header and moves behind its data.
    fn step(&mut self) -> io::Result<Result<Step, Damage>> {
        let left = self.length - self.position;
        if left == 0 {
            return Ok(Err(Damage::fatal("no end-of-archive mark, so the archive may have been cut")));
        }
        if left < BLOCK {
            return Ok(Err(Damage::fatal("truncated inside a header")));
        }
        let mut header = [0; BLOCK as usize];
        self.archive.read_exact(&mut header)?;
        self.position += BLOCK;
        if header.iter().all(|&b| b == 0) {
            return Ok(Ok(Step::End));
        }
        match Header::parse(&header) {
            Ok(header) => self.member(header),
            Err(damage) => Ok(Err(damage)),
        }
    }

    fn member(&mut self, header: Header) -> io::Result<Result<Step, Damage>> {
        let size = match header.kind {
            Kind::Empty => 0,
            Kind::File => self.pending.size.take().unwrap_or(header.size),
            _ => header.size,
        };
        let left = self.length - self.position;
        if size > left {
            return Ok(Err(Damage::fatal(format!(
                "truncated: a member of {size} bytes, {left} bytes are left"
            ))));
        }
        let extension_too_large =
            matches!(header.kind, Kind::LongName | Kind::Pax) && size > MAX_EXTENSION_BYTES;
        if extension_too_large {
            return Ok(Err(Damage::fatal(format!(
                "extension header of {size} bytes, at most {MAX_EXTENSION_BYTES}"
            ))));
        }
        let offset = self.position;
        let outcome = match header.kind {
            Kind::LongName => {
                let name = self.data(size)?;
                self.pending.path = Some(until_nul(&name).to_vec());
                Ok(Step::Skipped)
            }
            Kind::Pax => {
                let records = self.data(size)?;
                parse_pax(&records, &mut self.pending).map(|()| Step::Skipped)
            }
            Kind::File => {
                let path = self.pending.path.take().unwrap_or(header.path);
                match String::from_utf8(path) {
                    Ok(path) => {
                        let path = path.strip_prefix("./").map(str::to_owned).unwrap_or(path);
                        Ok(Step::Member(Member { path, offset, size }))
                    }
                    Err(_) => Err(Damage {
                        reason: "a member whose name is not UTF-8 was skipped".into(),
                        fatal: false,
                    }),
                }
            }
            Kind::Empty | Kind::Other => {
                if !matches!(header.kind, Kind::Other) {
                    self.pending = Pending::default();
                }
                Ok(Step::Skipped)
            }
        };
        // The last member's padding may be missing: its bytes are whole, and the missing end mark is reported next.
        let next = (offset + size).next_multiple_of(BLOCK).min(self.length);
        self.seek(next)?;
        Ok(outcome)
    }

    fn data(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.archive.by_ref().take(size).read_to_end(&mut bytes)?;
        self.position += bytes.len() as u64;
        Ok(bytes)
    }

    fn seek(&mut self, position: u64) -> io::Result<()> {
        self.archive.seek_relative((position - self.position).cast_signed())?;
        self.position = position;
        Ok(())
    }
}

enum Kind {
    File,
    LongName,
    Pax,
    /// Links, devices and folders: no data, whatever the size field says.
    Empty,
    /// Data that is nobody's file, such as global pax headers.
    Other,
}

struct Header {
    kind: Kind,
    path: Vec<u8>,
    size: u64,
}

impl Header {
    fn parse(block: &[u8; BLOCK as usize]) -> Result<Self, Damage> {
        const CHECKSUM: std::ops::Range<usize> = 148..156;
        let sum: u64 = block
            .iter()
            .enumerate()
            .map(|(i, &b)| if CHECKSUM.contains(&i) { 32 } else { u64::from(b) })
            .sum();
        if parse_number(&block[CHECKSUM]) != Some(sum) {
            return Err(Damage::fatal("not a tar header (its checksum does not fit)"));
        }
        let size =
            parse_number(&block[124..136]).ok_or_else(|| Damage::fatal("a member's size is not a number"))?;
        let kind = match block[156] {
            b'0' | 0 | b'7' => Kind::File,
            b'L' => Kind::LongName,
            b'x' => Kind::Pax,
            b'1'..=b'6' => Kind::Empty,
            _ => Kind::Other,
        };
        let mut path = until_nul(&block[0..100]).to_vec();
        let prefix = until_nul(&block[345..500]);
        if &block[257..263] == b"ustar\0" && !prefix.is_empty() {
            path = [prefix, b"/", &path].concat();
        }
        Ok(Self { kind, path, size })
    }
}

fn until_nul(bytes: &[u8]) -> &[u8] {
    bytes.split(|&b| b == 0).next().unwrap_or_default()
}

/// Octal text, or GNU base-256 when the first bit is set.
fn parse_number(field: &[u8]) -> Option<u64> {
    if let Some((first, rest)) = field.split_first()
        && first & 0x80 != 0
    {
        return rest
            .iter()
            .try_fold(u64::from(first & 0x7f), |n, &b| n.checked_mul(256)?.checked_add(b.into()));
    }
    let text = std::str::from_utf8(until_nul(field)).ok()?.trim();
    if text.is_empty() { Some(0) } else { u64::from_str_radix(text, 8).ok() }
}

/// Records of the form `LENGTH KEY=VALUE\n`, where LENGTH counts the whole record.
fn parse_pax(mut records: &[u8], pending: &mut Pending) -> Result<(), Damage> {
    let malformed = || Damage::fatal("malformed pax header");
    while !until_nul(records).is_empty() {
        let space = records.iter().position(|&b| b == b' ').ok_or_else(malformed)?;
        let length: usize =
            std::str::from_utf8(&records[..space]).ok().and_then(|s| s.parse().ok()).ok_or_else(malformed)?;
        let record =
            records.get(space + 1..length).and_then(|r| r.strip_suffix(b"\n")).ok_or_else(malformed)?;
        records = &records[length..];
        if let Some(path) = record.strip_prefix(b"path=") {
            pending.path = Some(path.to_vec());
        } else if let Some(size) = record.strip_prefix(b"size=") {
            let size = std::str::from_utf8(size).ok().and_then(|s| s.parse().ok()).ok_or_else(malformed)?;
            pending.size = Some(size);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Cursor;

    fn index(bytes: &[u8]) -> TarIndex {
        TarIndex::read(Cursor::new(bytes)).expect("reading memory does not fail")
    }

    fn archive(format: fn() -> tar::Header, files: &[(&str, &[u8])]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for (path, bytes) in files {
            let mut header = format();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            builder.append_data(&mut header, path, *bytes).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn contents<'a>(bytes: &'a [u8], index: &TarIndex) -> Vec<(String, &'a [u8])> {
        let slice = |m: &Member| &bytes[m.offset as usize..(m.offset + m.size) as usize];
        index.members.iter().map(|m| (m.path.clone(), slice(m))).collect()
    }

    #[test]
    fn ustar_gnu_long_names_and_prefixes() {
        let long = format!("{}/{}.txt", "d".repeat(90), "f".repeat(60));
        let longer = format!("{}.txt", "长".repeat(80));
        for format in [tar::Header::new_ustar as fn() -> _, tar::Header::new_gnu] {
            let bytes = archive(format, &[("./a.txt", b"one"), (&long, b""), ("b.json", &[7; 513])]);
            let index = index(&bytes);
            assert_eq!(index.defects, []);
            assert_eq!(
                contents(&bytes, &index),
                [
                    ("a.txt".to_owned(), b"one".as_slice()),
                    (long.clone(), b""),
                    ("b.json".to_owned(), &[7; 513])
                ]
            );
        }
        let bytes = archive(tar::Header::new_gnu, &[(&longer, b"x")]);
        assert_eq!(contents(&bytes, &index(&bytes)), [(longer, b"x".as_slice())]);
    }

    #[test]
    fn pax_path_and_size_win_over_the_header() {
        let record = |text: &str| format!("{} {text}\n", text.len() + 4);
        let (path, size) = (record("path=图.webp"), record("size=000000005"));
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::XHeader);
        header.set_size((path.len() + size.len()) as u64);
        builder.append_data(&mut header, "pax", (path + &size).as_bytes()).unwrap();
        let mut header = tar::Header::new_ustar();
        header.set_size(5);
        builder.append_data(&mut header, "short", b"hello".as_slice()).unwrap();
        let bytes = builder.into_inner().unwrap();
        assert_eq!(contents(&bytes, &index(&bytes)), [("图.webp".to_owned(), b"hello".as_slice())]);
    }

    #[test]
    fn a_cut_archive_keeps_whole_members_and_reports_the_cut() {
        let bytes = archive(tar::Header::new_ustar, &[("a.txt", &[1; 600]), ("b.txt", &[2; 600])]);
        let second_header = 512 + 1024;
        for (cut, members) in
            [(100, 0), (second_header - 1, 1), (second_header + 700, 1), (second_header + 1112, 2)]
        {
            let index = index(&bytes[..cut]);
            assert_eq!(index.members.len(), members, "cut at {cut}");
            assert!(index.defects.last().is_some_and(|d| d.fatal), "cut at {cut}");
        }
    }

    #[test]
    fn numbers() {
        assert_eq!(parse_number(b"0000644\0"), Some(0o644));
        assert_eq!(parse_number(b"\x80\0\0\0\0\0\0\0\0\0\x01\x02"), Some(258));
        assert_eq!(parse_number(&[0xff; 12]), None);
        assert_eq!(parse_number(b"12x\0"), None);
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
            let index = index(&bytes);
            prop_assert!(index.members.iter().all(|m| m.offset + m.size <= bytes.len() as u64));
        }

        #[test]
        fn mutated_archives_are_survived(edits in proptest::collection::vec((0usize..4096, any::<u8>()), 1..8), cut in 0usize..4096) {
            let long = "n".repeat(150);
            let mut bytes = archive(tar::Header::new_gnu, &[(&long, &[3; 700]), ("b.txt", b"b")]);
            let length = bytes.len();
            for (at, value) in edits {
                bytes[at % length] = value;
                // Repair the checksum so that the damage reaches the fields behind it.
                let start = (at % length) / 512 * 512;
                let block = &mut bytes[start..start + 512];
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|&b| u32::from(b)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
            bytes.truncate(cut);
            let index = index(&bytes);
            prop_assert!(index.members.iter().all(|m| m.offset + m.size <= bytes.len() as u64));
            prop_assert!(index.defects.iter().rev().skip(1).all(|d| !d.fatal));
        }
    }
}
