//! Finds what is wrong with shards before a run meets it, and writes what is left as clean shards.

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;

use serde::Serialize;
use serde_json::Value;

use crate::error::Result;
use crate::flaw::{Flaw, FlawClass};
use crate::loader::Loader;
use crate::member;
use crate::picture::Rgb8;
use crate::shard::{PICTURE_EXTENSIONS, ShardSet};
use crate::writer::ShardWriter;

/// Samples that each worker checks ahead.
const AHEAD: usize = 16;
/// What stands for any picture among the members that are required.
const PICTURE: &str = "picture";

/// What [`lint`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct LintReport {
    /// Shards that can be read.
    pub shards: usize,
    /// Samples in them.
    pub samples: usize,
    /// Samples that are whole; of two members with one extension the first counts.
    pub clean: usize,
    /// Number of flaws by class.
    pub counts: BTreeMap<FlawClass, usize>,
    /// All flaws: those of shards first, then by sample.
    pub flaws: Vec<Flaw>,
    /// The clean shards, where they were asked for.
    pub repaired: Vec<PathBuf>,
}

/// Members of a sample as extension and bytes.
type Members = Vec<(String, Vec<u8>)>;

/// A checked sample: its flaws, and its members where a clean one is to be written.
type Checked = (Vec<Flaw>, Members);

/// Checks every sample of the shards that `patterns` name: its names, members, texts and, decoded in full, its pictures.
/// A sample may lack any member but those `required`, each an extension or `picture` for one of any format.
/// Where there is a `writer`, the samples that are whole are written to its shards, byte for byte and in order.
/// `fetching` is called as by [`ShardSet::open_with`], `progress` with (done, all) after each sample.
///
/// # Errors
/// No pattern, a pattern without a match, or a clean shard that cannot be written.
pub fn lint(
    patterns: &[String],
    required: &[String],
    workers: usize,
    mut writer: Option<ShardWriter>,
    mut fetching: impl FnMut(usize, usize, u64) + Send,
    mut progress: impl FnMut(usize, usize),
) -> Result<LintReport> {
    let set = Arc::new(ShardSet::open_what_can_be_read(patterns, &mut fetching)?);
    let mut report = LintReport { shards: set.shards().len(), samples: set.len(), ..LintReport::default() };
    report.flaws.extend_from_slice(set.flaws());

    let required = required.to_vec();
    let keep = writer.is_some();
    let workers = workers.max(1);
    let check = {
        let set = Arc::clone(&set);
        // The loader runs ahead of the last sample.
        move |ordinal: u64| {
            (ordinal < set.len() as u64).then(|| check(&set, ordinal as usize, &required, keep))
        }
    };
    let mut keys = HashSet::new();
    for (index, made) in (0..set.len()).zip(Loader::start(0, workers, AHEAD * workers, check)?) {
        let (_, Some((mut flaws, members))) = made? else { continue };
        // The namesake of a sample that is not whole takes its place.
        if flaws.is_empty() && !keys.insert(set.key(index)) {
            let reason = "an earlier sample that is whole has this key too".to_owned();
            flaws.push(set.flaw(index, FlawClass::DuplicateKey, reason));
        }
        if flaws.is_empty() {
            report.clean += 1;
            if let Some(writer) = &mut writer {
                let members: Vec<_> =
                    members.iter().map(|(extension, bytes)| (extension.as_str(), bytes.as_slice())).collect();
                writer.write(set.key(index), &members)?;
            }
        }
        report.flaws.append(&mut flaws);
        progress(index + 1, set.len());
    }
    for flaw in &report.flaws {
        *report.counts.entry(flaw.class).or_default() += 1;
    }
    if let Some(writer) = writer {
        report.repaired = writer.finish()?;
    }
    Ok(report)
}

fn check(set: &ShardSet, index: usize, required: &[String], keep: bool) -> Checked {
    let mut flaws: Vec<Flaw> = set.unsafe_name(index).into_iter().collect();
    let mut flaw = |class, reason: String| flaws.push(set.flaw(index, class, reason));
    for member in required {
        let mut extensions = set.extensions(index);
        if member == PICTURE {
            if !extensions.any(|extension| PICTURE_EXTENSIONS.contains(&extension)) {
                flaw(FlawClass::MissingMember, "no picture".to_owned());
            }
        } else if extensions.all(|extension| extension != member) {
            flaw(FlawClass::MissingMember, format!("no .{member}"));
        }
    }
    let sample = match set.sample(index) {
        Ok(sample) => sample,
        Err(error) => {
            flaw(FlawClass::UnusableShard, error.to_string());
            return (flaws, Members::new());
        }
    };
    for (extension, bytes) in sample.members() {
        let last = extension.rsplit('.').next().unwrap_or(extension);
        if PICTURE_EXTENSIONS.contains(&last) {
            if let Err(error) = Rgb8::decode(bytes) {
                flaw(FlawClass::BrokenPicture, format!("its .{extension}: {error}"));
            }
        } else if last == "json" {
            if let Err(error) = serde_json::from_slice::<Value>(bytes) {
                flaw(FlawClass::BrokenText, format!("its .{extension} is malformed: {error}"));
            }
        } else if last == "txt" {
            if std::str::from_utf8(bytes).is_err() {
                flaw(FlawClass::BrokenText, format!("its .{extension} is not UTF-8 text"));
            }
        } else if let Err(error) = member::check(extension, bytes) {
            flaw(FlawClass::BrokenMember, format!("its .{extension}: {error}"));
        }
    }
    let members = sample.members().filter(|_| keep && flaws.is_empty());
    let members = members.map(|(extension, bytes)| (extension.to_owned(), bytes.to_vec())).collect();
    (flaws, members)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::archive;
    use FlawClass::*;

    #[test]
    fn every_class_is_found_and_repair_keeps_the_rest_byte_for_byte() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let png = Rgb8::filled(2, 2, [1, 2, 3]).encode_png().unwrap();
        let json: &[u8] = br#"{"en": "a cat"}"#;
        archive(
            &path("0.tar"),
            &[
                ("a.png", &png),
                ("a.json", json),
                ("a.txt", "图".as_bytes()),
                ("a.cls", b"7"),
                ("b.png", b"broken"),
                ("b.json", b"{"),
                ("c.png", &png),
                ("c.cls", b"seven"),
                ("c.depth.npy", b"\x93NUMPY"),
                ("c.safetensors", b"{}"),
                ("../d.png", &png),
                ("../d.json", json),
                ("e.png", &png),
                ("e.json", json),
                ("e.txt", b"\xff"),
                ("f.png", &png),
                ("f.json", json),
                ("f.png", &png),
                ("sub/g.png", &png),
                ("sub/g.json", json),
                ("b.png", &png),
                ("b.json", json),
            ],
        );
        archive(&path("1.tar"), &[("a.png", &png), ("a.json", json), ("h.png", &png), ("h.json", json)]);
        let whole = std::fs::read(path("1.tar")).unwrap();
        std::fs::write(path("2.tar"), &whole[..300]).unwrap();
        std::fs::write(path("3.tar"), &whole[..2 * 1024 + 2 * 512 + 10]).unwrap();

        let patterns = [path("*.tar").display().to_string()];
        let mut last = (0, 0);
        let writer = ShardWriter::create(&path("clean"), "clean", u64::MAX).unwrap();
        let report = lint(
            &patterns,
            &["json".to_owned()],
            2,
            Some(writer),
            |_, _, _| (),
            |done, all| last = (done, all),
        )
        .unwrap();
        let found: Vec<_> = report.flaws.iter().map(|f| (f.class, f.key.as_deref().unwrap_or("-"))).collect();
        let expected = [
            (DuplicateMember, "f"),
            (UnusableShard, "-"),
            (DamagedShard, "-"),
            (DamagedShard, "h"),
            (BrokenPicture, "b"),
            (BrokenText, "b"),
            (MissingMember, "c"),
            (BrokenMember, "c"),
            (BrokenMember, "c"),
            (BrokenMember, "c"),
            (UnsafeName, "../d"),
            (BrokenText, "e"),
            (DuplicateKey, "a"),
            (DuplicateKey, "a"),
        ];
        assert_eq!(found, expected, "{:#?}", report.flaws);
        assert_eq!(report.counts[&BrokenText], 2);
        assert_eq!((report.shards, report.samples, report.clean, last), (3, 11, 5, (11, 11)));
        let c = report.flaws.iter().find(|flaw| flaw.key.as_deref() == Some("c")).unwrap();
        assert_eq!((c.reason.as_str(), &c.shard), ("no .json", &path("0.tar")));

        let clean = ShardSet::open(&[report.repaired[0].display().to_string()]).unwrap();
        let keys: Vec<_> = (0..clean.len()).map(|index| clean.key(index)).collect();
        assert_eq!(keys, ["a", "f", "sub/g", "b", "h"]);
        let a = clean.sample(0).unwrap();
        assert_eq!(
            a.members().collect::<Vec<_>>(),
            [("png", &*png), ("json", json), ("txt", "图".as_bytes()), ("cls", b"7")]
        );
        let again = lint(&[path("clean/*.tar").display().to_string()], &[], 1, None, |_, _, _| (), |_, _| ())
            .unwrap();
        assert_eq!((again.clean, again.flaws, again.repaired), (5, vec![], vec![]));
    }

    #[test]
    fn texts_alone_and_pictures_alone_are_whole_unless_more_is_required() {
        let dir = tempfile::tempdir().unwrap();
        let png = Rgb8::filled(2, 2, [1, 2, 3]).encode_png().unwrap();
        let path = dir.path().join("0.tar");
        archive(&path, &[("both.png", &png), ("both.txt", b"a"), ("text.txt", b"b"), ("picture.png", &png)]);
        let found = |required: &[&str]| {
            let required: Vec<_> = required.iter().map(|&member| member.to_owned()).collect();
            let report =
                lint(&[path.display().to_string()], &required, 1, None, |_, _, _| (), |_, _| ()).unwrap();
            report.flaws.into_iter().map(|f| (f.class, f.key.unwrap(), f.reason)).collect::<Vec<_>>()
        };
        assert_eq!(found(&[]), []);
        assert_eq!(found(&["picture"]), [(MissingMember, "text".into(), "no picture".into())]);
        assert_eq!(found(&["txt"]), [(MissingMember, "picture".into(), "no .txt".into())]);
    }

    #[test]
    fn names_that_climb_out_or_do_not_split_are_not_repaired() {
        let dir = tempfile::tempdir().unwrap();
        let names = ["../a.txt", "/b.txt", "c//d.txt", "e/./f.txt", "g/../../h.txt", "j.", "./i.txt"];
        let path = dir.path().join("0.tar");
        archive(&path, &names.map(|name| (name, b"text".as_slice())));
        let writer = ShardWriter::create(&dir.path().join("clean"), "clean", u64::MAX).unwrap();
        let report =
            lint(&[path.display().to_string()], &[], 1, Some(writer), |_, _, _| (), |_, _| ()).unwrap();
        assert_eq!((report.clean, &report.counts), (1, &BTreeMap::from([(UnsafeName, 6)])));
        let clean = ShardSet::open(&[report.repaired[0].display().to_string()]).unwrap();
        assert_eq!((clean.len(), clean.key(0)), (1, "i"));
    }

    #[test]
    fn shards_without_any_sample_are_a_finding_and_not_a_failure() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("x.tar"), [7; 3000]).unwrap();
        let pattern = dir.path().join("x.tar").display().to_string();
        let report = lint(&[pattern], &[], 2, None, |_, _, _| (), |_, _| ()).unwrap();
        assert_eq!((report.shards, report.samples), (0, 0));
        assert_eq!(report.counts[&UnusableShard], 1);
    }
}
