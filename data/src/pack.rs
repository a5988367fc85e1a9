//! Packs pictures with their texts, from a folder or a jsonl file, into shards.

use std::collections::HashSet;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Map, Value};

use crate::error::{DataError, Result};
use crate::picture::Rgb8;
use crate::shard::PICTURE_EXTENSIONS;
use crate::writer::ShardWriter;

/// Extensions of the files that belong to a picture of the same name.
const TEXT_EXTENSIONS: [&str; 2] = ["txt", "json"];
/// Key of a jsonl line that names its picture.
const IMAGE_KEY: &str = "image";

/// What packing did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PackReport {
    /// Samples written.
    pub samples: usize,
    /// Samples among them that have neither a text nor JSON.
    pub without_text: usize,
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
    /// What was left out, one line each, naming the file and the reason.
    pub skipped: Vec<String>,
}

/// A sample to be: where its bytes come from.
struct Candidate {
    key: String,
    picture: PathBuf,
    texts: Texts,
}

enum Texts {
    /// Files next to the picture, by extension.
    Files(Vec<(&'static str, PathBuf)>),
    /// The other keys of a jsonl line.
    Record(Map<String, Value>),
}

/// Packs `source` into `writer`'s shards: a folder of pictures (sub-folders included) with `.txt` or `.json` files of the
/// same name, or a jsonl file of `{"image": PATH, ...}` whose paths are relative to it and whose other keys become the
/// sample's JSON. `progress` is called with (done, all) after each picture.
///
/// A broken picture or text is skipped and named in the report.
///
/// # Errors
/// The source cannot be read, has no pictures, or the shards cannot be written.
pub fn pack(
    source: &Path,
    mut writer: ShardWriter,
    mut progress: impl FnMut(usize, usize),
) -> Result<PackReport> {
    let mut report = PackReport::default();
    let candidates =
        if source.is_dir() { from_folder(source)? } else { from_jsonl(source, &mut report.skipped)? };
    if candidates.is_empty() {
        let reason = format!("no pictures (expected {})", PICTURE_EXTENSIONS.join(", "));
        return Err(DataError::Pack { path: source.to_owned(), reason });
    }
    let mut keys = HashSet::new();
    for (done, candidate) in (1..).zip(&candidates) {
        let read = if keys.insert(&candidate.key) {
            candidate.read()
        } else {
            Err(format!("another picture has the key {} too", candidate.key))
        };
        match read {
            Ok(members) => {
                let borrowed: Vec<_> =
                    members.iter().map(|(e, bytes)| (e.as_str(), bytes.as_slice())).collect();
                writer.write(&candidate.key, &borrowed)?;
                report.samples += 1;
                report.without_text += usize::from(members.len() == 1);
            }
            Err(reason) => report.skipped.push(format!("{}: {reason}", candidate.picture.display())),
        }
        progress(done, candidates.len());
    }
    report.shards = writer.finish()?;
    Ok(report)
}

impl Candidate {
    /// The members of the sample, checked; or why it has to be skipped.
    fn read(&self) -> std::result::Result<Vec<(String, Vec<u8>)>, String> {
        let read =
            |path: &Path| std::fs::read(path).map_err(|e| format!("cannot read {}: {e}", path.display()));
        let picture = read(&self.picture)?;
        Rgb8::decode(&picture).map_err(|e| e.to_string())?;
        let mut members = vec![(extension(&self.picture), picture)];
        match &self.texts {
            Texts::Files(files) => {
                for (extension, path) in files {
                    let bytes = read(path)?;
                    let text = std::str::from_utf8(&bytes)
                        .map_err(|_| format!("{} is not UTF-8 text", path.display()))?;
                    if *extension == "json" {
                        serde_json::from_str::<Map<String, Value>>(text)
                            .map_err(|e| format!("{} is not a JSON object: {e}", path.display()))?;
                    }
                    members.push(((*extension).to_owned(), bytes));
                }
            }
            Texts::Record(record) if record.is_empty() => {}
            Texts::Record(record) => {
                members.push(("json".to_owned(), Value::from(record.clone()).to_string().into_bytes()))
            }
        }
        Ok(members)
    }
}

fn from_folder(root: &Path) -> Result<Vec<Candidate>> {
    let mut pictures = Vec::new();
    find_pictures(root, &mut pictures)?;
    pictures.sort();
    let candidate = |picture: PathBuf| {
        let inside = picture.strip_prefix(root).unwrap_or(&picture).with_extension("");
        // A dot in a key would end it.
        let key = inside.to_string_lossy().replace('.', "_");
        let texts = TEXT_EXTENSIONS.map(|extension| (extension, picture.with_extension(extension)));
        let texts = Texts::Files(texts.into_iter().filter(|(_, path)| path.exists()).collect());
        Candidate { key, picture, texts }
    };
    Ok(pictures.into_iter().map(candidate).collect())
}

/// Collects pictures, without hidden files and without following links to folders (they could lead in circles).
fn find_pictures(folder: &Path, pictures: &mut Vec<PathBuf>) -> Result<()> {
    let fail = || DataError::io("read", folder);
    for entry in std::fs::read_dir(folder).map_err(fail())? {
        let entry = entry.map_err(fail())?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if entry.file_type().map_err(fail())?.is_dir() {
            find_pictures(&path, pictures)?;
        } else if PICTURE_EXTENSIONS.contains(&extension(&path).as_str()) {
            pictures.push(path);
        }
    }
    Ok(())
}

fn from_jsonl(source: &Path, skipped: &mut Vec<String>) -> Result<Vec<Candidate>> {
    let text = std::fs::read_to_string(source).map_err(DataError::io("read", source))?;
    let folder = source.parent().unwrap_or(Path::new(""));
    let mut candidates = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let record =
            serde_json::from_str::<Map<String, Value>>(line).map_err(|e| format!("not a JSON object: {e}"));
        let parsed = record.and_then(|mut record| match record.remove(IMAGE_KEY) {
            Some(Value::String(image)) => Ok((folder.join(image), record)),
            _ => Err(format!("no \"{IMAGE_KEY}\" with the path of a picture")),
        });
        match parsed {
            Ok((picture, record)) => {
                candidates.push(Candidate {
                    key: format!("{number:08}"),
                    picture,
                    texts: Texts::Record(record),
                });
            }
            Err(reason) => skipped.push(format!("{} line {number}: {reason}", source.display())),
        }
    }
    Ok(candidates)
}

fn extension(path: &Path) -> String {
    path.extension().map(|e| e.to_string_lossy().to_lowercase()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::{ShardSet, sample_image};
    use std::fs;

    fn picture_file(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, Rgb8::filled(2, 2, [9, 8, 7]).encode_png().unwrap()).unwrap();
    }

    fn run(source: &Path, out: &Path) -> Result<(PackReport, ShardSet)> {
        let report = pack(source, ShardWriter::create(out, "p", 1 << 20)?, |_, _| {})?;
        let set = ShardSet::open(&[report.shards[0].display().to_string()])?;
        Ok((report, set))
    }

    #[test]
    fn a_folder_with_texts_and_broken_files() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| source.path().join(name);
        for name in ["a.PNG", "cats/tom.v2.png", "cats/tom_v2.png", "odd.png", ".hidden.png"] {
            picture_file(&at(name));
        }
        fs::write(at("a.txt"), "ein Bild").unwrap();
        fs::write(at("cats/tom.v2.json"), r#"{"zh": "猫"}"#).unwrap();
        fs::write(at("odd.txt"), b"\xff\xfe").unwrap();
        fs::write(at("broken.webp"), b"RIFF").unwrap();

        let mut calls = Vec::new();
        let writer = ShardWriter::create(out.path(), "p", 1 << 20).unwrap();
        let report = pack(source.path(), writer, |done, all| calls.push((done, all))).unwrap();
        assert_eq!((report.samples, report.without_text), (2, 0));
        assert_eq!(calls.last(), Some(&(5, 5)));
        let skipped = report.skipped.join("\n");
        for expected in
            ["broken.webp: broken picture", "odd.txt is not UTF-8 text", "has the key cats/tom_v2 too"]
        {
            assert!(skipped.contains(expected), "{skipped}");
        }
        let set = ShardSet::open(&[report.shards[0].display().to_string()]).unwrap();
        let (first, second) = (set.sample(0).unwrap(), set.sample(1).unwrap());
        assert_eq!((first.key, first.member("txt")), ("a", Some(b"ein Bild".as_slice())));
        assert_eq!((second.key, second.member("json").is_some()), ("cats/tom_v2", true));
        assert_eq!(sample_image(&first).unwrap(), Rgb8::filled(2, 2, [9, 8, 7]));
    }

    #[test]
    fn a_jsonl_file_with_bad_lines() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        picture_file(&source.path().join("images/a.png"));
        let jsonl = source.path().join("list.jsonl");
        fs::write(&jsonl, "{\"image\": \"images/a.png\", \"en\": \"a\"}\n\nnot json\n{\"en\": \"b\"}\n{\"image\": \"absent.png\"}\n").unwrap();
        let (report, set) = run(&jsonl, out.path()).unwrap();
        assert_eq!(report.samples, 1);
        let skipped = report.skipped.join("\n");
        for expected in ["line 3: not a JSON object", "line 4: no \"image\"", "absent.png"] {
            assert!(skipped.contains(expected), "{skipped}");
        }
        let sample = set.sample(0).unwrap();
        assert_eq!((sample.key, sample.member("json")), ("00000001", Some(b"{\"en\":\"a\"}".as_slice())));
    }

    #[test]
    fn nothing_to_pack_is_an_error() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let error = |path: &Path| run(path, out.path()).err().unwrap().to_string();
        assert!(error(source.path()).contains("no pictures"));
        assert!(error(&source.path().join("absent.jsonl")).starts_with("cannot read "));
    }
}
