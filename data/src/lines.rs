//! Texts whose lines are samples: `txt` and `jsonl` files as shards, and `jsonl` members of archives.
//!
//! Line 12 of `words.txt` is the member `txt` of the sample `words/00000012`, line 12 of `words.jsonl` its member `json`;
//! white space around a line is not part of it, and a line of nothing else is no sample.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use crate::tar_index::Member;

/// Extension of texts with a JSON object a line.
const JSON_LINES: &str = "jsonl";
/// What compressed texts have behind their extension.
const COMPRESSED: [&str; 3] = [".gz", ".bz2", ".xz"];
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// A text whose lines are samples.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lines<'a> {
    /// What the keys of its samples start with.
    stem: &'a str,
    /// The extension of their members.
    member: &'static str,
}

impl<'a> Lines<'a> {
    /// What a file of this name holds, `None` for archives.
    pub(crate) fn of_file(name: &'a str) -> Option<Self> {
        let name = COMPRESSED.iter().find_map(|compressed| name.strip_suffix(compressed)).unwrap_or(name);
        let path = Path::new(name);
        let stem = path.file_stem()?.to_str()?;
        let is = |extension| path.extension().is_some_and(|found| found.eq_ignore_ascii_case(extension));
        match () {
            () if is(JSON_LINES) => Some(Self { stem, member: "json" }),
            () if is("txt") => Some(Self { stem, member: "txt" }),
            () => None,
        }
    }

    /// A member for each line of a text that begins at `offset` of its file.
    ///
    /// # Errors
    /// It cannot be read.
    pub(crate) fn members(self, text: impl Read, mut offset: u64) -> io::Result<Vec<Member>> {
        let mut text = BufReader::new(text);
        if text.fill_buf()?.starts_with(BYTE_ORDER_MARK) {
            text.consume(BYTE_ORDER_MARK.len());
            offset += BYTE_ORDER_MARK.len() as u64;
        }
        let mut members = Vec::new();
        let mut line = 1_u64;
        // Where the line's first byte that is no white space is, and where its last ends.
        let mut content: Option<(u64, u64)> = None;
        let member = |line, (start, end)| Member {
            path: format!("{}/{line:08}.{}", self.stem, self.member),
            offset: start,
            size: end - start,
        };
        loop {
            let bytes = text.fill_buf()?;
            if bytes.is_empty() {
                members.extend(content.map(|content| member(line, content)));
                return Ok(members);
            }
            for (&byte, at) in bytes.iter().zip(offset..) {
                if byte == b'\n' {
                    members.extend(content.take().map(|content| member(line, content)));
                    line += 1;
                } else if !byte.is_ascii_whitespace() {
                    content = Some((content.map_or(at, |(start, _)| start), at + 1));
                }
            }
            let read = bytes.len();
            text.consume(read);
            offset += read as u64;
        }
    }
}

/// The members of an archive with the lines of its `jsonl` members in their places.
///
/// # Errors
/// It cannot be read.
pub(crate) fn expand(members: Vec<Member>, mut archive: &File) -> io::Result<Vec<Member>> {
    let has_lines = |member: &Member| {
        Path::new(&member.path).extension().is_some_and(|found| found.eq_ignore_ascii_case(JSON_LINES))
    };
    if !members.iter().any(has_lines) {
        return Ok(members);
    }
    let mut expanded = Vec::with_capacity(members.len());
    for member in members {
        match Lines::of_file(&member.path).filter(|_| has_lines(&member)) {
            Some(lines) => {
                archive.seek(SeekFrom::Start(member.offset))?;
                // With its folders, which tell it from others of the archive.
                let stem = member.path.rsplit_once('.').map_or(lines.stem, |(stem, _)| stem);
                expanded
                    .append(&mut Lines { stem, ..lines }.members(archive.take(member.size), member.offset)?);
            }
            None => expanded.push(member),
        }
    }
    Ok(expanded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardSet;
    use crate::testing::archive;

    fn texts(members: &[Member], bytes: &[u8]) -> Vec<(String, String)> {
        let text = |member: &Member| {
            let bytes = &bytes[member.offset as usize..(member.offset + member.size) as usize];
            (member.path.clone(), String::from_utf8(bytes.to_vec()).unwrap())
        };
        members.iter().map(text).collect()
    }

    #[test]
    fn names_tell_texts_from_archives() {
        let of = |name| Lines::of_file(name).map(|lines| (lines.stem, lines.member));
        assert_eq!(of("a/words.txt"), Some(("words", "txt")));
        assert_eq!(of("a.b.JSONL"), Some(("a.b", "json")));
        assert_eq!(of("https://host/x.jsonl.gz"), Some(("x", "json")));
        for archive in ["a.tar", "a.tar.gz", "txt", ".txt", "a.txt.zip", "a.json", ""] {
            assert_eq!(of(archive), None, "{archive}");
        }
    }

    #[test]
    fn lines_without_what_is_around_them() {
        let lines = Lines { stem: "w", member: "txt" };
        let text = "\u{feff}one\r\n\n \t\n  \u{4e8c} \u{4e09} \nend".as_bytes();
        let expected = [("w/00000001.txt", "one"), ("w/00000004.txt", "二 三"), ("w/00000005.txt", "end")];
        let expected = expected.map(|(path, text)| (path.to_owned(), text.to_owned()));
        assert_eq!(texts(&lines.members(text, 0).unwrap(), text), expected);
        assert_eq!(lines.members(&b" \n\r\n"[..], 0).unwrap(), []);
        // More than is read at once, in one line and in many.
        let long = "x".repeat(20_000) + "\n" + &"y\n".repeat(20_000);
        let members = lines.members(long.as_bytes(), 7).unwrap();
        assert_eq!((members.len(), members[0].size), (20_001, 20_000));
        let last = members.last().unwrap();
        assert_eq!(
            (last.path.as_str(), last.offset, last.size),
            ("w/00020001.txt", 7 + 20_001 + 2 * 19_999, 1)
        );
    }

    #[test]
    fn lines_of_members_take_their_places() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.tar");
        let jsonl = b"{\"en\": \"a\"}\n\n{\"en\": \"b\"}\n".as_slice();
        archive(&path, &[("a.txt", b"a\nb"), ("sub/b.jsonl", jsonl), ("c.json", b"{}")]);
        let file = File::open(&path).unwrap();
        let index = crate::tar_index::TarIndex::read(&file).unwrap();
        let members = expand(index.members, &file).unwrap();
        let expected = [
            ("a.txt", "a\nb"),
            ("sub/b/00000001.json", "{\"en\": \"a\"}"),
            ("sub/b/00000003.json", "{\"en\": \"b\"}"),
            ("c.json", "{}"),
        ];
        let expected = expected.map(|(path, text)| (path.to_owned(), text.to_owned()));
        assert_eq!(texts(&members, &std::fs::read(&path).unwrap()), expected);
    }
    #[test]
    fn lines_of_texts_are_samples() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        std::fs::write(path("a.txt"), "one\n\n 二 \n").unwrap();
        std::fs::write(path("b.jsonl"), "{\"en\": \"x\"}\n{\"en\": \"y\"}").unwrap();
        let patterns = [path("*").display().to_string()];
        let set = ShardSet::open(&patterns).unwrap();
        let sample = |index| {
            let sample = set.sample(index).unwrap();
            let text = |(extension, bytes): (&str, &[u8])| (extension.to_owned(), bytes.to_vec());
            (sample.key.to_owned(), sample.members().map(text).collect::<Vec<_>>())
        };
        let expected = [
            ("a/00000001", "txt", "one"),
            ("a/00000003", "txt", "二"),
            ("b/00000001", "json", "{\"en\": \"x\"}"),
            ("b/00000002", "json", "{\"en\": \"y\"}"),
        ];
        assert_eq!((set.len(), set.flaws()), (expected.len(), &[][..]));
        for (index, (key, extension, text)) in expected.into_iter().enumerate() {
            let members = vec![(extension.to_owned(), text.as_bytes().to_vec())];
            assert_eq!(sample(index), (key.to_owned(), members));
        }

        std::fs::write(path("empty.txt"), " \n").unwrap();
        let error = ShardSet::open(&[path("empty.txt").display().to_string()]).unwrap_err().to_string();
        assert!(error.contains("holds no sample") && error.contains("lines of text"), "{error}");
    }
}
