//! Packs pictures with their texts, from a folder, a jsonl file or other shards, into shards.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Serialize;
use serde_json::{Map, Value};

use crate::caption::TEXT_EXTENSIONS;
use crate::compressed;
use crate::error::{DataError, Result};
use crate::filter::{Draft, Filter, LeftOut};
use crate::key::member_path;
use crate::loader::Loader;
use crate::shard::{PICTURE_EXTENSIONS, ShardSet};
use crate::skipped::SkipLimits;
use crate::writer::ShardWriter;

/// Samples that each worker reads ahead.
const AHEAD: usize = 16;
/// Samples whose texts are measured together.
const AT_ONCE: usize = 32;
/// Key of a jsonl line that names its picture.
const IMAGE_KEY: &str = "image";

/// What packing did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct PackReport {
    /// Samples written.
    pub samples: usize,
    /// Samples among them that have neither a text nor JSON.
    pub without_text: usize,
    /// Samples among them that have no picture.
    pub without_picture: usize,
    /// The shards, in order.
    pub shards: Vec<PathBuf>,
    /// What is broken and was left out, one line each, naming the file or sample and the reason.
    pub skipped: Vec<String>,
    /// What the filter left out, by its rules in their order.
    pub filtered: Vec<LeftOut>,
    /// Damage of shards that were read, one line each.
    pub warnings: Vec<String>,
}

/// Packs `source` into `writer`'s shards: a folder of pictures (sub-folders included) with `.txt` or `.json` files of the
/// same name; or a jsonl file of `{"image": PATH, ...}` whose paths are relative to it and whose other keys become the
/// sample's JSON, a text alone where a line has no `image`; or shards, named as for [`ShardSet::open`] with `.tar` or `.txt`
/// at the end or compressed, whose samples keep their members. What `filter` leaves out is not written. Pictures are read
/// and decoded on `workers` threads (at least one). `fetching` is called as by [`ShardSet::open_with`], `progress` with
/// (done, all) after each sample.
///
/// A sample with a broken picture or text is skipped and named in the report.
///
/// # Errors
/// The source cannot be read, has no pictures, or lies where its shards would be written over; or the shards cannot be
/// written.
pub fn pack(
    source: &Path,
    mut writer: ShardWriter,
    mut filter: Filter,
    workers: usize,
    fetching: impl FnMut(usize, usize, u64) + Send,
    mut progress: impl FnMut(usize, usize),
) -> Result<PackReport> {
    let mut report = PackReport::default();
    let source = Arc::new(Source::open(source, writer.dir(), fetching, &mut report)?);
    let workers = workers.max(1);
    let read = {
        let source = Arc::clone(&source);
        // Workers run ahead of the last sample.
        move |ordinal: u64| (ordinal < source.len() as u64).then(|| source.read(ordinal as usize))
    };
    let mut keys = HashSet::new();
    let mut loader = Loader::start(0, workers, AHEAD * workers, read)?.take(source.len());
    let mut done = 0;
    while done < source.len() {
        let made = loader.by_ref().take(AT_ONCE).collect::<Result<Vec<_>>>()?;
        let read: Vec<_> = made.into_iter().filter_map(|(_, read)| read).collect();
        filter.measure(read.iter().filter_map(|read| read.as_ref().ok()))?;
        for read in read {
            match read.and_then(|draft| with_new_key(draft, &keys)) {
                Ok(mut draft) => {
                    if filter.keeps(&mut draft)? {
                        let members: Vec<_> =
                            draft.members.iter().map(|(e, bytes)| (e.as_str(), bytes.as_slice())).collect();
                        writer.write(&draft.key, &members)?;
                        report.samples += 1;
                        report.without_text += usize::from(!draft.has_any(&TEXT_EXTENSIONS));
                        report.without_picture += usize::from(!draft.has_any(&PICTURE_EXTENSIONS));
                        keys.insert(draft.key);
                    }
                }
                Err(reason) => report.skipped.push(format!("{}: {reason}", source.name(done))),
            }
            done += 1;
            progress(done, source.len());
        }
    }
    report.filtered = filter.finish()?;
    report.shards = writer.finish()?;
    Ok(report)
}

/// The sample, if a shard can hold it beside those with `keys`; or why it has to be skipped.
fn with_new_key(draft: Draft, keys: &HashSet<String>) -> std::result::Result<Draft, String> {
    for (extension, _) in &draft.members {
        member_path(&draft.key, extension)?;
    }
    match keys.contains(&draft.key) {
        true => Err(format!("another sample has the key {} too", draft.key)),
        false => Ok(draft),
    }
}

/// Where samples come from.
enum Source {
    Files(Vec<Candidate>),
    Shards(ShardSet),
}

/// A sample to be, out of files.
struct Candidate {
    key: String,
    /// What messages call it: the file, or the line of the jsonl.
    name: String,
    /// The picture, if it has one, and the texts next to it.
    files: Vec<PathBuf>,
    /// What a line of jsonl has beside its picture.
    json: Option<String>,
}

impl Source {
    /// Finds the samples of a source that is to be packed into the folder `out`.
    fn open(
        path: &Path,
        out: &Path,
        fetching: impl FnMut(usize, usize, u64) + Send,
        report: &mut PackReport,
    ) -> Result<Self> {
        let candidates = if path.is_dir() {
            from_folder(path)?
        } else if ["tar", "txt"].contains(&extension(path).as_str()) || compressed::is_compressed(path) {
            let set =
                ShardSet::open_with(&[path.to_string_lossy().into_owned()], SkipLimits::default(), fetching)?;
            refuse_shards_in(out, &set)?;
            report.warnings = set.flaws().iter().map(ToString::to_string).collect();
            return Ok(Self::Shards(set));
        } else {
            from_jsonl(path, &mut report.skipped)?
        };
        if candidates.is_empty() {
            let pictures = PICTURE_EXTENSIONS.join(", ");
            let reason = format!("no pictures (expected {pictures}) and no lines of text");
            return Err(DataError::Pack { path: path.to_owned(), reason });
        }
        Ok(Self::Files(candidates))
    }

    fn len(&self) -> usize {
        match self {
            Self::Files(candidates) => candidates.len(),
            Self::Shards(set) => set.len(),
        }
    }

    /// What messages call a sample.
    fn name(&self, index: usize) -> String {
        match self {
            Self::Files(candidates) => candidates[index].name.clone(),
            Self::Shards(set) => format!("sample {} of {}", set.key(index), set.shard(index).display()),
        }
    }

    /// The sample, checked; or why it has to be skipped.
    fn read(&self, index: usize) -> std::result::Result<Draft, String> {
        match self {
            Self::Files(candidates) => {
                Draft::new(candidates[index].key.clone(), candidates[index].members()?)
            }
            Self::Shards(set) => {
                let sample = set.sample(index).map_err(|e| e.to_string())?;
                let members = sample.members().map(|(e, bytes)| (e.to_owned(), bytes.to_vec())).collect();
                Draft::new(sample.key.to_owned(), members)
            }
        }
    }
}

/// New shards must not take the place of those that are being read.
fn refuse_shards_in(out: &Path, set: &ShardSet) -> Result<()> {
    let absolute = |path: &Path| path.canonicalize().map_err(DataError::io("read", path));
    let out = absolute(out)?;
    for shard in set.files().filter(|shard| extension(shard) == "tar") {
        if absolute(shard)?.parent() == Some(&out) {
            let reason = "its folder is that of the new shards, expected another".to_owned();
            return Err(DataError::Pack { path: shard.to_path_buf(), reason });
        }
    }
    Ok(())
}

impl Candidate {
    /// Extensions and bytes; or why it has to be skipped.
    fn members(&self) -> std::result::Result<Vec<(String, Vec<u8>)>, String> {
        let read = |path: &PathBuf| match std::fs::read(path) {
            Ok(bytes) => Ok((extension(path), bytes)),
            Err(error) => Err(format!("cannot read {}: {error}", path.display())),
        };
        let mut members = self.files.iter().map(read).collect::<std::result::Result<Vec<_>, _>>()?;
        members.extend(self.json.iter().map(|json| ("json".to_owned(), json.clone().into_bytes())));
        Ok(members)
    }
}

fn from_folder(root: &Path) -> Result<Vec<Candidate>> {
    let pictures = pictures_in(root)?;
    let candidate = |picture: PathBuf| {
        let inside = picture.strip_prefix(root).unwrap_or(&picture).with_extension("");
        // A dot in a key would end it.
        let key = inside.to_string_lossy().replace('.', "_");
        let name = picture.display().to_string();
        let texts = TEXT_EXTENSIONS.map(|extension| picture.with_extension(extension));
        let files = [picture].into_iter().chain(texts.into_iter().filter(|path| path.exists())).collect();
        Candidate { key, name, files, json: None }
    };
    Ok(pictures.into_iter().map(candidate).collect())
}

/// The pictures of a folder and its folders, by their extensions, as [`files_in`] finds them.
///
/// # Errors
/// When a folder cannot be read.
pub fn pictures_in(folder: &Path) -> Result<Vec<PathBuf>> {
    files_in(folder, &PICTURE_EXTENSIONS)
}

/// The files of a folder and its folders with one of `extensions`, sorted; without hidden files and without following
/// links to folders (they could lead in circles).
///
/// # Errors
/// When a folder cannot be read.
pub fn files_in(folder: &Path, extensions: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    find_files(folder, extensions, &mut files)?;
    files.sort();
    Ok(files)
}

fn find_files(folder: &Path, extensions: &[&str], files: &mut Vec<PathBuf>) -> Result<()> {
    let fail = || DataError::io("read", folder);
    for entry in std::fs::read_dir(folder).map_err(fail())? {
        let entry = entry.map_err(fail())?;
        let path = entry.path();
        if entry.file_name().to_string_lossy().starts_with('.') {
            continue;
        }
        if entry.file_type().map_err(fail())?.is_dir() {
            find_files(&path, extensions, files)?;
        } else if extensions.contains(&extension(&path).as_str()) {
            files.push(path);
        }
    }
    Ok(())
}

fn from_jsonl(source: &Path, skipped: &mut Vec<String>) -> Result<Vec<Candidate>> {
    let text = std::fs::read_to_string(source).map_err(DataError::io("read", source))?;
    let folder = source.parent().unwrap_or(Path::new(""));
    let mut candidates = Vec::new();
    for (number, line) in (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()) {
        let name = format!("{} line {number}", source.display());
        let record = serde_json::from_str::<Map<String, Value>>(line);
        let record = record.map_err(|e| format!("not a JSON object: {e}"));
        let parsed = record.and_then(|mut record| match record.remove(IMAGE_KEY) {
            Some(Value::String(image)) => Ok((Some(folder.join(image)), record)),
            Some(_) => Err(format!("\"{IMAGE_KEY}\" is not the path of a picture")),
            None if record.is_empty() => Err("an empty object".to_owned()),
            None => Ok((None, record)),
        });
        match parsed {
            Ok((picture, record)) => {
                let name = picture.as_ref().map_or(name, |picture| picture.display().to_string());
                let files = picture.into_iter().collect();
                let json = (!record.is_empty()).then(|| Value::from(record).to_string());
                candidates.push(Candidate { key: format!("{number:08}"), name, files, json });
            }
            Err(reason) => skipped.push(format!("{name}: {reason}")),
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
    use crate::caption::CaptionFields;
    use crate::picture::Rgb8;
    use crate::shard::sample_image;
    use crate::testing::{Members, archive, shard};
    use std::fs;

    fn picture_file(path: &Path) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, Rgb8::filled(2, 2, [9, 8, 7]).encode_png().unwrap()).unwrap();
    }

    fn run(source: &Path, out: &Path) -> Result<(PackReport, ShardSet)> {
        let writer = ShardWriter::create(out, "p", 1 << 20)?;
        let report = pack(source, writer, Filter::default(), 2, |_, _, _| {}, |_, _| {})?;
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
        let report = pack(
            source.path(),
            writer,
            Filter::default(),
            2,
            |_, _, _| {},
            |done, all| calls.push((done, all)),
        )
        .unwrap();
        assert_eq!((report.samples, report.without_text), (2, 0));
        assert_eq!(calls.last(), Some(&(5, 5)));
        let skipped = report.skipped.join("\n");
        for expected in
            ["broken.webp: broken picture", "odd.png: its .txt is not UTF-8", "has the key cats/tom_v2 too"]
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
        fs::write(&jsonl, "{\"image\": \"images/a.png\", \"en\": \"a\"}\n\nnot json\n{\"en\": \"b\"}\n{\"image\": \"absent.png\"}\n{\"image\": 1}\n{}\n").unwrap();
        let (report, set) = run(&jsonl, out.path()).unwrap();
        assert_eq!((report.samples, report.without_picture), (2, 1));
        let skipped = report.skipped.join("\n");
        for expected in [
            "line 3: not a JSON object",
            "absent.png: cannot read",
            "line 6: \"image\" is",
            "line 7: an empty",
        ] {
            assert!(skipped.contains(expected), "{skipped}");
        }
        let sample = set.sample(0).unwrap();
        assert_eq!((sample.key, sample.member("json")), ("00000001", Some(b"{\"en\":\"a\"}".as_slice())));
        let text = set.sample(1).unwrap();
        assert_eq!((text.key, text.members().count(), text.picture()), ("00000004", 1, None));
    }

    #[test]
    fn shards_are_filtered_and_keep_their_members() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let png = Rgb8::filled(2, 2, [9, 8, 7]).encode_png().unwrap();
        let whole: Members =
            &[("png", &png), ("seg.png", b"x"), ("json", b"{ \"en\": \"a heart\" }"), ("cls", b"1")];
        let path = shard(
            source.path(),
            &[
                ("a", whole),
                ("b", &[("png", b"broken"), ("txt", b"a heart")]),
                ("c", &[("png", &png), ("txt", b"x")]),
                ("text", &[("txt", b"a long text")]),
                ("a", &[("png", &png)]),
                ("picture", &[("png", &png)]),
            ],
        );
        let filter =
            || Filter::new(&["text_length:2..".to_owned()], &CaptionFields::default(), None).unwrap();
        let writer = |dir: &Path| ShardWriter::create(dir, "p", 1 << 20).unwrap();
        let pattern = source.path().join("*.tar");
        let report = pack(&pattern, writer(out.path()), filter(), 2, |_, _, _| {}, |_, _| {}).unwrap();
        assert_eq!((report.samples, report.without_text, report.without_picture), (3, 1, 1));
        assert_eq!(report.filtered, [LeftOut { rule: "text_length:2..".into(), samples: 1, texts: 1 }]);
        let of = path.display();
        let skipped =
            [format!("sample b of {of}: broken picture"), format!("sample a of {of}: another sample")];
        assert!(
            report.skipped.iter().zip(&skipped).all(|(line, start)| line.starts_with(start)),
            "{report:?}"
        );
        let set = ShardSet::open(&[report.shards[0].display().to_string()]).unwrap();
        assert_eq!((0..set.len()).map(|index| set.key(index)).collect::<Vec<_>>(), ["a", "text", "picture"]);
        assert_eq!(set.sample(0).unwrap().members().collect::<Vec<_>>(), whole);

        let error = pack(&pattern, writer(source.path()), filter(), 1, |_, _, _| {}, |_, _| {})
            .unwrap_err()
            .to_string();
        assert!(error.ends_with("its folder is that of the new shards, expected another"), "{error}");
        assert!(!source.path().join("p-000000.tar").exists());
    }

    #[test]
    fn lines_of_text_become_samples() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = source.path().join("corpus.txt");
        fs::write(&path, "one\r\n\n  \u{4e8c} \n").unwrap();
        let (report, set) = run(&path, out.path()).unwrap();
        assert_eq!((report.samples, report.without_picture, report.without_text), (2, 2, 0));
        let text = |index| set.sample(index).unwrap().member("txt").unwrap().to_vec();
        assert_eq!(
            (set.key(1), text(0), text(1)),
            ("corpus/00000003", b"one".to_vec(), "\u{4e8c}".as_bytes().to_vec())
        );
    }

    #[test]
    fn names_that_shards_cannot_hold_are_skipped() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let path = source.path().join("x.tar");
        let texts = ["../a.txt", "/b.txt", "c//d.txt", "e.txt"].map(|name| (name, b"text".as_slice()));
        archive(&path, &texts);
        let (report, set) = run(&path, out.path()).unwrap();
        assert_eq!((report.samples, report.skipped.len(), set.key(0)), (1, 3, "e"), "{report:?}");
        let first =
            format!("sample ../a of {}: \"../a.txt\" is no plain path (names between", path.display());
        assert!(report.skipped[0].starts_with(&first), "{report:?}");

        let pictures = source.path().join("pictures");
        picture_file(&pictures.join("__init__.png"));
        picture_file(&pictures.join("a.png"));
        let (report, _) = run(&pictures, &out.path().join("pictures")).unwrap();
        assert_eq!((report.samples, report.skipped.len()), (2, 0), "{report:?}");
    }

    #[test]
    fn nothing_to_pack_is_an_error() {
        let (source, out) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let error = |path: &Path| run(path, out.path()).err().unwrap().to_string();
        assert!(error(source.path()).contains("no pictures"));
        assert!(error(&source.path().join("absent.jsonl")).starts_with("cannot read "));
    }
}
