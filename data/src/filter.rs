//! Rules by which samples, or texts of them, are left out on their way into shards.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::caption::{CaptionField, CaptionFields, TEXT_EXTENSIONS, Texts};
use crate::error::{DataError, Result};
use crate::picture::Measured;
use crate::script::Script;
use crate::shard::PICTURE_EXTENSIONS;
use crate::words::{WordList, repetition, symbols};

/// Names of scripts in a rule.
const SCRIPTS: [(&str, Script); 3] =
    [("han", Script::Han), ("latin", Script::Latin), ("other", Script::Other)];
/// Bits by which pictures that look alike may differ at most. With more, the parts of [`Alike`] would be so short that
/// each of them agrees with that of many another picture.
const MAX_BITS: u32 = 15;

/// Rules that decide what of a data set is left out. Each is a string:
///
/// * `min_side:N` and `max_side:N`: the short side of the picture has at least, the long side at most N pixels,
/// * `aspect:MIN..MAX`: width divided by height is in these limits,
/// * `text_length:MIN..MAX`: a text has so many Unicode characters,
/// * `text_words:MIN..MAX`: a Latin text has so many words between white space; texts of other scripts pass,
/// * `script:han|latin`: a text is in one of these scripts (`han`, `latin`, `other`, as [`Script`] tells them),
/// * `distinct:pictures`: no earlier picture has the same bytes,
/// * `distinct:alike,K`: no earlier picture has a difference hash that differs in at most K of its 64 bits; without `,K`
///   in none. All pictures of one colour have the same,
/// * `distinct:texts`: no earlier sample has the same text in the same field,
/// * `repetition:MAX`: the most frequent pair of words covers at most this share of a text's characters,
/// * `symbols:MAX`: at most this share of a text's characters are neither letters, digits, marks nor white space,
/// * `words_absent:FILE`: none of the file's words or phrases, one a line, stands in a text, whatever its case.
///
/// Limits are inclusive, and one of the two may be left out. *Earlier* are samples that were not left out.
///
/// The rules are asked in their order. A rule for pictures leaves out the sample. A rule for texts removes the texts that
/// fail it, and leaves out the sample when none stays. Samples without a picture pass the rules for pictures, those without
/// a text those for texts.
#[derive(Debug, Default)]
pub struct Filter {
    rules: Vec<Rule>,
    fields: Vec<String>,
    log: Option<Log>,
}

/// What one rule left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct LeftOut {
    /// The rule as it was given.
    pub rule: String,
    /// Samples.
    pub samples: usize,
    /// Texts, those of these samples included.
    pub texts: usize,
}

/// A sample on its way into a shard.
#[derive(Debug)]
pub(crate) struct Draft {
    /// Key of the sample.
    pub key: String,
    /// Extensions and bytes.
    pub members: Vec<(String, Vec<u8>)>,
    picture: Option<Measured>,
    texts: Texts,
}

impl Draft {
    /// Decodes and measures the picture, where there is one, and reads the texts.
    ///
    /// # Errors
    /// Why the sample cannot be used: a broken picture or text.
    pub(crate) fn new(key: String, members: Vec<(String, Vec<u8>)>) -> std::result::Result<Self, String> {
        let member = |extension: &str| {
            members.iter().find(|(has, _)| has == extension).map(|(_, bytes)| bytes.as_slice())
        };
        let picture = PICTURE_EXTENSIONS.iter().find_map(|extension| member(extension));
        let picture = picture.map(Measured::of).transpose().map_err(|e| e.to_string())?;
        let texts = Texts::read(member)?;
        Ok(Self { key, members, picture, texts })
    }

    /// Whether it has a member with one of these extensions.
    pub(crate) fn has_any(&self, extensions: &[&str]) -> bool {
        self.members.iter().any(|(extension, _)| extensions.contains(&extension.as_str()))
    }

    /// Puts what is left of the texts into the members.
    fn put_back_texts(&mut self) {
        self.members.retain_mut(|(extension, bytes)| match self.texts.member(extension) {
            Some(text) => {
                *bytes = text;
                true
            }
            None => !TEXT_EXTENSIONS.contains(&extension.as_str()),
        });
    }
}

impl Filter {
    /// Parses the rules, and reads the files that they name. The rules for texts are for those of `fields`, or, with none,
    /// for every text of a `.txt` and a `.json`.
    ///
    /// # Errors
    /// A rule that does not parse, a file that cannot be read or is empty, or a field that is neither the `.txt` nor a key
    /// of the `.json`.
    pub fn new(rules: &[String], fields: &CaptionFields) -> Result<Self> {
        Ok(Self {
            rules: rules.iter().map(|rule| Rule::parse(rule)).collect::<Result<_>>()?,
            fields: fields.fields().iter().map(judged_field).collect::<Result<_>>()?,
            log: None,
        })
    }

    /// Has a line of JSON written to `path` for each sample that is left out, with its `key`, the `rule` and the `value`
    /// that failed it; and before it, for each text that is removed, one that has its `field` and `text` as well. The value
    /// of a `distinct` rule is the key of the earlier sample.
    ///
    /// # Errors
    /// The file cannot be made.
    pub fn log_to(self, path: &Path) -> Result<Self> {
        let file = File::create(path).map_err(DataError::io("create", path))?;
        Ok(Self { log: Some(Log { path: path.to_owned(), file: BufWriter::new(file) }), ..self })
    }

    /// Whether a sample stays; the texts that fail a rule are removed from it.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(crate) fn keeps(&mut self, draft: &mut Draft) -> Result<bool> {
        let is_judged = |field: &str| self.fields.is_empty() || self.fields.iter().any(|name| name == field);
        let mut has_lost_texts = false;
        for Rule { check, left_out } in &mut self.rules {
            let mut line = Line { key: &draft.key, rule: &left_out.rule, text: None, value: &Value::Null };
            let fault = match check {
                Check::Picture(check) => draft.picture.as_ref().and_then(|picture| check.fault(picture)),
                Check::Text(check) => {
                    let removed = check.remove_faulty(&mut draft.texts, is_judged);
                    for (text, value) in &removed {
                        Log::write(&mut self.log, &Line { text: Some(text), value, ..line })?;
                    }
                    left_out.texts += removed.len();
                    has_lost_texts |= !removed.is_empty();
                    let last = removed.into_iter().last().map(|(_, value)| value);
                    last.filter(|_| !draft.texts.all().iter().any(|(field, _)| is_judged(field)))
                }
            };
            if let Some(value) = &fault {
                line.value = value;
                Log::write(&mut self.log, &line)?;
                left_out.samples += 1;
                return Ok(false);
            }
        }
        for rule in &mut self.rules {
            rule.check.remember(draft, is_judged);
        }
        if has_lost_texts {
            draft.put_back_texts();
        }
        Ok(true)
    }

    /// Ends the log and returns what each rule left out, in their order.
    ///
    /// # Errors
    /// The log cannot be written.
    pub(crate) fn finish(self) -> Result<Vec<LeftOut>> {
        if let Some(Log { path, mut file }) = self.log {
            file.flush().map_err(DataError::io("write", &path))?;
        }
        Ok(self.rules.into_iter().map(|rule| rule.left_out).collect())
    }
}

/// Name of a field whose texts are judged.
fn judged_field(field: &CaptionField) -> Result<String> {
    match (field.member.as_str(), &field.key) {
        ("txt", _) | ("json", Some(_)) => Ok(field.name()),
        _ => Err(DataError::CaptionField {
            member: field.member.clone(),
            reason: "expected txt or a key of the json, whose texts a filter can judge".to_owned(),
        }),
    }
}

#[derive(Debug)]
struct Log {
    path: PathBuf,
    file: BufWriter<File>,
}

/// A line of the log.
#[derive(Clone, Copy, Serialize)]
struct Line<'a> {
    key: &'a str,
    rule: &'a str,
    #[serde(flatten)]
    text: Option<&'a FieldText>,
    value: &'a Value,
}

#[derive(Serialize)]
struct FieldText {
    field: String,
    text: String,
}

impl Log {
    fn write(log: &mut Option<Self>, line: &Line) -> Result<()> {
        let Some(Self { path, file }) = log else { return Ok(()) };
        let written = serde_json::to_writer(&mut *file, line).map_err(io::Error::from);
        written.and_then(|()| writeln!(file)).map_err(DataError::io("write", path))
    }
}

#[derive(Debug)]
struct Rule {
    check: Check,
    left_out: LeftOut,
}

#[derive(Debug)]
enum Check {
    Picture(PictureCheck),
    Text(TextCheck),
}

#[derive(Debug)]
enum PictureCheck {
    MinSide(u32),
    MaxSide(u32),
    Aspect(Limits<f64>),
    Distinct(Seen),
    Alike(Alike),
}

#[derive(Debug)]
enum TextCheck {
    Length(Limits<usize>),
    Words(Limits<usize>),
    Script(Vec<Script>),
    Distinct(Seen),
    Repetition(f64),
    Symbols(f64),
    WordsAbsent(WordList),
}

/// Keys of samples by the digest of what they have.
type Seen = HashMap<[u8; blake3::OUT_LEN], String>;

impl Check {
    /// Keeps in mind a sample that stays.
    fn remember(&mut self, draft: &Draft, is_judged: impl Fn(&str) -> bool) {
        match (self, &draft.picture) {
            (Self::Picture(PictureCheck::Distinct(seen)), Some(picture)) => {
                seen.insert(picture.digest, draft.key.clone());
            }
            (Self::Picture(PictureCheck::Alike(alike)), Some(picture)) => {
                alike.insert(picture.hash, draft.key.clone());
            }
            (Self::Text(TextCheck::Distinct(seen)), _) => {
                for (field, text) in draft.texts.all().iter().filter(|(field, _)| is_judged(field)) {
                    seen.entry(text_digest(field, text)).or_insert_with(|| draft.key.clone());
                }
            }
            _ => {}
        }
    }
}

impl PictureCheck {
    /// What of a picture fails the rule.
    fn fault(&self, picture: &Measured) -> Option<Value> {
        let (short, long) = (picture.width.min(picture.height), picture.width.max(picture.height));
        match self {
            Self::MinSide(min) => (short < *min).then(|| short.into()),
            Self::MaxSide(max) => (long > *max).then(|| long.into()),
            Self::Aspect(limits) => limits.fault(picture.aspect()),
            Self::Distinct(seen) => seen.get(&picture.digest).map(|key| key.as_str().into()),
            Self::Alike(alike) => alike.find(picture.hash).map(Value::from),
        }
    }
}

impl TextCheck {
    /// Removes the judged texts that fail the rule, and returns them with what failed.
    fn remove_faulty(&self, texts: &mut Texts, is_judged: impl Fn(&str) -> bool) -> Vec<(FieldText, Value)> {
        let mut removed = Vec::new();
        texts.retain(|field, text| {
            let fault = is_judged(field).then(|| self.fault(field, text)).flatten();
            let stays = fault.is_none();
            let named = || FieldText { field: field.to_owned(), text: text.to_owned() };
            removed.extend(fault.map(|value| (named(), value)));
            stays
        });
        removed
    }

    /// What of a text fails the rule.
    fn fault(&self, field: &str, text: &str) -> Option<Value> {
        let script = || Script::of(text);
        let above = |share: f64, max: f64| (share > max).then(|| share.into());
        match self {
            Self::Length(limits) => limits.fault(text.chars().count()),
            Self::Words(limits) if script() == Script::Latin => limits.fault(text.split_whitespace().count()),
            Self::Words(_) => None,
            Self::Script(scripts) => {
                let other = Some(script()).filter(|script| !scripts.contains(script))?;
                SCRIPTS.iter().find(|(_, script)| *script == other).map(|(name, _)| (*name).into())
            }
            Self::Distinct(seen) => seen.get(&text_digest(field, text)).map(|key| key.as_str().into()),
            Self::Repetition(max) => above(repetition(text), *max),
            Self::Symbols(max) => above(symbols(text), *max),
            Self::WordsAbsent(words) => words.find(text).map(Value::from),
        }
    }
}

fn text_digest(field: &str, text: &str) -> [u8; blake3::OUT_LEN] {
    let mut hasher = blake3::Hasher::new();
    *hasher.update(field.as_bytes()).update(b"\0").update(text.as_bytes()).finalize().as_bytes()
}

/// Inclusive limits, of which one may be open.
#[derive(Debug)]
struct Limits<T> {
    min: Option<T>,
    max: Option<T>,
}

impl<T: Copy + PartialOrd + FromStr> Limits<T> {
    /// Parses `MIN..MAX`, `MIN..` or `..MAX`.
    fn parse(text: &str) -> Option<Self> {
        let (min, max) = text.split_once("..")?;
        let limit = |text: &str| match text {
            "" => Some(None),
            _ => text.parse().ok().map(Some),
        };
        let (min, max) = (limit(min)?, limit(max)?);
        let is_ordered = match (min, max) {
            (Some(min), Some(max)) => min <= max,
            (None, None) => false,
            _ => true,
        };
        is_ordered.then_some(Self { min, max })
    }

    fn fault(&self, value: T) -> Option<Value>
    where
        Value: From<T>,
    {
        let inside = self.min.is_none_or(|min| min <= value) && self.max.is_none_or(|max| value <= max);
        (!inside).then(|| value.into())
    }
}

/// Difference hashes that are found by one that differs in few bits. A hash is cut into one part more than bits may differ,
/// so that one part at least is the same in both (Manku et al. 2007, "Detecting near-duplicates for web crawling").
#[derive(Debug)]
struct Alike {
    bits: u32,
    hashes: Vec<(u64, String)>,
    /// For each part, the places in `hashes` by its value.
    by_part: Vec<HashMap<u64, Vec<usize>>>,
}

impl Alike {
    fn new(bits: u32) -> Self {
        Self { bits, hashes: Vec::new(), by_part: (0..=bits).map(|_| HashMap::new()).collect() }
    }

    /// Part `index` of a hash.
    fn part(&self, hash: u64, index: usize) -> u64 {
        let border = |index: usize| u64::BITS * index as u32 / self.by_part.len() as u32;
        let (start, end) = (border(index), border(index + 1));
        hash >> start & (u64::MAX >> (u64::BITS - (end - start)))
    }

    /// Key of a sample whose hash differs in few enough bits.
    fn find(&self, hash: u64) -> Option<&str> {
        let candidates = (0..).zip(&self.by_part);
        let candidates = candidates.filter_map(|(index, part)| part.get(&self.part(hash, index))).flatten();
        let mut found = candidates.map(|&place| &self.hashes[place]);
        found.find(|(other, _)| (hash ^ other).count_ones() <= self.bits).map(|(_, key)| key.as_str())
    }

    fn insert(&mut self, hash: u64, key: String) {
        for index in 0..self.by_part.len() {
            let part = self.part(hash, index);
            self.by_part[index].entry(part).or_default().push(self.hashes.len());
        }
        self.hashes.push((hash, key));
    }
}

impl Rule {
    fn parse(rule: &str) -> Result<Self> {
        let left_out = LeftOut { rule: rule.to_owned(), samples: 0, texts: 0 };
        Ok(Self { check: rule.parse()?, left_out })
    }
}

impl FromStr for Check {
    type Err = DataError;

    fn from_str(rule: &str) -> Result<Self> {
        let fail = |expected: &str| DataError::Filter {
            rule: rule.to_owned(),
            reason: format!("expected {expected}"),
        };
        let side = |text: &str| {
            let side = text.parse().ok().filter(|&side| side > 0);
            side.ok_or_else(|| fail("a size in pixels, such as 128"))
        };
        let share = |text: &str| {
            let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
            share.ok_or_else(|| fail("a share from 0 to 1, such as 0.2"))
        };
        let count = |text: &str| {
            Limits::parse(text)
                .ok_or_else(|| fail("MIN..MAX, MIN.. or ..MAX in whole numbers, such as 5..64"))
        };
        let (name, value) = rule.split_once(':').unwrap_or((rule, ""));
        Ok(match name {
            "min_side" => Self::Picture(PictureCheck::MinSide(side(value)?)),
            "max_side" => Self::Picture(PictureCheck::MaxSide(side(value)?)),
            "aspect" => {
                let is_ratio = |limit: f64| limit.is_finite() && limit > 0.0;
                let limits = Limits::parse(value)
                    .filter(|limits| limits.min.is_none_or(is_ratio) && limits.max.is_none_or(is_ratio));
                let limits = limits.ok_or_else(|| fail("MIN..MAX, MIN.. or ..MAX, such as 0.5..2"))?;
                Self::Picture(PictureCheck::Aspect(limits))
            }
            "text_length" => Self::Text(TextCheck::Length(count(value)?)),
            "text_words" => Self::Text(TextCheck::Words(count(value)?)),
            "script" => {
                let script = |name| SCRIPTS.iter().find(|script| script.0 == name).map(|script| script.1);
                let scripts = value.split('|').map(script).collect::<Option<_>>();
                let scripts = scripts.ok_or_else(|| fail("han, latin, other, or several joined by |"))?;
                Self::Text(TextCheck::Script(scripts))
            }
            "distinct" => match value.split_once(',').unwrap_or((value, "0")) {
                _ if value == "pictures" => Self::Picture(PictureCheck::Distinct(Seen::new())),
                _ if value == "texts" => Self::Text(TextCheck::Distinct(Seen::new())),
                ("alike", bits) => {
                    let bits = bits.parse().ok().filter(|bits| *bits <= MAX_BITS);
                    let bits = bits.ok_or_else(|| fail(&format!("alike,K with 0 to {MAX_BITS} bits")))?;
                    Self::Picture(PictureCheck::Alike(Alike::new(bits)))
                }
                _ => return Err(fail("pictures, alike, alike,K or texts")),
            },
            "repetition" => Self::Text(TextCheck::Repetition(share(value)?)),
            "symbols" => Self::Text(TextCheck::Symbols(share(value)?)),
            "words_absent" => {
                let file = Path::new(value);
                let text = std::fs::read_to_string(file).map_err(DataError::io("read", file))?;
                let words = WordList::parse(&text);
                Self::Text(TextCheck::WordsAbsent(words.ok_or_else(|| fail("a file of words, one a line"))?))
            }
            _ => {
                return Err(fail(
                    "min_side, max_side, aspect, text_length, text_words, script, distinct, repetition, symbols or \
                     words_absent, then a colon and its value",
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    use crate::picture::Rgb8;

    fn filter(rules: &[&str]) -> Result<Filter> {
        let rules: Vec<_> = rules.iter().map(|&rule| rule.to_owned()).collect();
        Filter::new(&rules, &CaptionFields::default())
    }

    fn draft(key: &str, members: &[(&str, &[u8])]) -> Draft {
        let members = members.iter().map(|(extension, bytes)| ((*extension).to_owned(), bytes.to_vec()));
        Draft::new(key.to_owned(), members.collect()).unwrap()
    }

    fn png(picture: &Rgb8) -> Vec<u8> {
        picture.encode_png().unwrap()
    }

    /// Keys of the samples that stay.
    fn kept<'a>(filter: &mut Filter, samples: &'a mut [Draft]) -> Vec<&'a str> {
        let stay = samples.iter_mut().filter_map(|draft| filter.keeps(draft).unwrap().then_some(&*draft));
        stay.map(|draft| draft.key.as_str()).collect()
    }

    #[test]
    fn sizes_and_aspects_of_pictures() {
        let sizes = [("small", 3, 9), ("wide", 8, 4), ("square", 5, 5)];
        for (rule, stay) in [
            ("min_side:4", vec!["wide", "square", "text"]),
            ("max_side:8", vec!["wide", "square", "text"]),
            ("aspect:0.5..1.5", vec!["square", "text"]),
            ("aspect:1..", vec!["wide", "square", "text"]),
            ("aspect:..1", vec!["small", "square", "text"]),
        ] {
            let pictures = sizes.map(|(key, width, height)| (key, png(&Rgb8::filled(width, height, [7; 3]))));
            let mut samples: Vec<_> = pictures.iter().map(|(key, png)| draft(key, &[("png", png)])).collect();
            samples.push(draft("text", &[("txt", b"no picture")]));
            assert_eq!(kept(&mut filter(&[rule]).unwrap(), &mut samples), stay, "{rule}");
        }
    }

    #[test]
    fn rules_for_texts() {
        let texts = ["a red heart", "heart", "红心", "!?! sale", "ha ha ha", "кот"];
        for (rule, stay) in [
            ("text_length:3..8", vec!["heart", "!?! sale", "ha ha ha", "кот"]),
            ("text_length:9..", vec!["a red heart"]),
            ("text_words:2..2", vec!["红心", "!?! sale", "кот"]),
            ("script:han|other", vec!["红心", "кот"]),
            ("script:latin", vec!["a red heart", "heart", "!?! sale", "ha ha ha"]),
            ("symbols:0.3", vec!["a red heart", "heart", "红心", "ha ha ha", "кот"]),
            ("repetition:0.5", vec!["a red heart", "heart", "红心", "!?! sale", "кот"]),
        ] {
            let mut samples: Vec<_> =
                texts.iter().map(|text| draft(text, &[("txt", text.as_bytes())])).collect();
            assert_eq!(kept(&mut filter(&[rule]).unwrap(), &mut samples), stay, "{rule}");
        }
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("words.txt");
        std::fs::write(&list, "sale\n红\n").unwrap();
        let mut filter = filter(&[&format!("words_absent:{}", list.display())]).unwrap();
        let mut samples: Vec<_> = texts.iter().map(|text| draft(text, &[("txt", text.as_bytes())])).collect();
        assert_eq!(kept(&mut filter, &mut samples), ["a red heart", "heart", "ha ha ha", "кот"]);
    }

    #[test]
    fn texts_are_removed_and_samples_without_any_are_left_out() {
        let json = r#"{"en": ["heart", "a red heart"], "n": 1, "zh": "红心", "alt": "sign"}"#;
        let mut rest = draft("a", &[("json", json.as_bytes()), ("txt", b"red"), ("cls", b"3")]);
        let mut all = draft("b", &[("json", br#"{"en": "no"}"#), ("txt", b" x ")]);
        let mut none = draft("c", &[("json", br#"{"en": " ",  "n": 1}"#), ("cls", b"3")]);
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("dropped.jsonl");
        let rules = ["min_side:9", "text_length:5..", "script:latin"];
        let mut filter = filter(&rules).unwrap().log_to(&log).unwrap();
        assert!(filter.keeps(&mut rest).unwrap() && filter.keeps(&mut none).unwrap());
        assert!(!filter.keeps(&mut all).unwrap());
        let extensions: Vec<_> = rest.members.iter().map(|(extension, _)| extension.as_str()).collect();
        assert_eq!(extensions, ["json", "cls"]);
        let left: Value = serde_json::from_slice(&rest.members[0].1).unwrap();
        assert_eq!(left, serde_json::json!({"en": ["heart", "a red heart"], "n": 1}));
        assert_eq!(none.members[0].1, br#"{"en": " ",  "n": 1}"#, "unchanged to the byte");

        let counts: Vec<_> =
            filter.finish().unwrap().into_iter().map(|out| (out.samples, out.texts)).collect();
        assert_eq!(counts, [(0, 0), (1, 5), (0, 0)]);
        let lines = std::fs::read_to_string(log).unwrap();
        let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!(lines.len(), 6);
        let last_text = serde_json::json!(
            {"key": "b", "rule": "text_length:5..", "field": ".json en", "text": "no", "value": 2});
        assert_eq!(lines[4], last_text);
        let sample = serde_json::json!({"key": "b", "rule": "text_length:5..", "value": 2});
        assert_eq!(lines[5], sample);
    }
    #[test]
    fn rules_judge_the_given_fields_alone() {
        let fields = |json: &str| serde_json::from_str::<CaptionFields>(json).unwrap();
        let rules = ["text_length:5..".to_owned()];
        let judged = fields(r#"[{"member": "json", "key": "en"}, {"member": "json", "key": "zh"}]"#);
        let mut filter = Filter::new(&rules, &judged).unwrap();
        let mut samples = [
            draft("short", &[("json", br#"{"en": "red", "zh": "x", "id": "a-long-name"}"#)]),
            draft("long", &[("json", br#"{"en": "a heart", "zh": "x", "id": "1"}"#), ("txt", b"x")]),
            draft("neither", &[("json", br#"{"id": "1"}"#)]),
        ];
        assert_eq!(kept(&mut filter, &mut samples), ["long", "neither"]);
        let left: Value = serde_json::from_slice(&samples[1].members[0].1).unwrap();
        assert_eq!(left, serde_json::json!({"en": "a heart", "id": "1"}));
        assert_eq!(samples[1].members[1].1, b"x");

        for other in [r#"[{"member": "json", "template": "{en}"}]"#, r#"[{"member": "srt"}]"#] {
            let error = Filter::new(&rules, &fields(other)).unwrap_err().to_string();
            assert!(error.contains("expected txt or a key of the json"), "{error}");
        }
    }

    #[test]
    fn distinct_keeps_the_first_that_nothing_else_leaves_out() {
        let ramp = |from: u8, step: u8| {
            let pixels = (0..9 * 8).flat_map(|i| [from + step * (i % 9); 3]).collect();
            png(&Rgb8 { width: 9, height: 8, pixels })
        };
        let (first, brighter, falling) = (ramp(0, 5), ramp(100, 5), png(&Rgb8::filled(9, 8, [0; 3])));
        let samples = || {
            [
                draft("a", &[("png", &first), ("txt", b"-")]),
                draft("b", &[("png", &first), ("txt", b"heart")]),
                draft("c", &[("png", &brighter), ("json", br#"{"en": ["heart", "heart"]}"#)]),
                draft("d", &[("png", &falling), ("txt", b"heart")]),
                draft("e", &[("txt", b" heart ")]),
                draft("f", &[("json", br#"{"en": ["heart", "star"]}"#)]),
            ]
        };
        for (rules, stay) in [
            (&["distinct:pictures"][..], vec!["a", "c", "d", "e", "f"]),
            (&["distinct:pictures", "text_length:2.."], vec!["b", "c", "d", "e", "f"]),
            (&["distinct:alike"], vec!["a", "d", "e", "f"]),
            (&["distinct:alike,15"], vec!["a", "d", "e", "f"]),
            (&["distinct:texts"], vec!["a", "b", "c", "f"]),
        ] {
            assert_eq!(kept(&mut filter(rules).unwrap(), &mut samples()), stay, "{rules:?}");
        }
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let mut filter = filter(&["distinct:alike"]).unwrap().log_to(&log).unwrap();
        kept(&mut filter, &mut samples()[..2]);
        filter.finish().unwrap();
        let line = std::fs::read_to_string(log).unwrap();
        assert_eq!(line, "{\"key\":\"b\",\"rule\":\"distinct:alike\",\"value\":\"a\"}\n");
    }

    #[test]
    fn rules_that_do_not_parse_are_named() {
        for (rule, expected) in [
            ("min_side", "a size in pixels"),
            ("min_side:0", "a size in pixels"),
            ("max_side: 8", "a size in pixels"),
            ("aspect:2..1", "MIN..MAX"),
            ("aspect:-1..1", "MIN..MAX"),
            ("aspect:nan..", "MIN..MAX"),
            ("text_length:5", "whole numbers"),
            ("text_length:..", "whole numbers"),
            ("text_words:1.5..2", "whole numbers"),
            ("script:", "han, latin, other"),
            ("script:han,latin", "han, latin, other"),
            ("distinct:images", "pictures, alike, alike,K or texts"),
            ("distinct:texts,1", "pictures, alike, alike,K or texts"),
            ("distinct:alike,16", "0 to 15 bits"),
            ("repetition:2", "a share from 0 to 1"),
            ("symbols:nan", "a share from 0 to 1"),
            ("words_absent:/dev/null", "a file of words"),
            ("sharpness:3", "min_side, max_side"),
            ("", "min_side, max_side"),
        ] {
            let error = filter(&[rule]).unwrap_err().to_string();
            let named = format!("filter \"{rule}\": expected ");
            assert!(error.starts_with(&named) && error.contains(expected), "{error}");
        }
        let error = filter(&["words_absent:absent.txt"]).unwrap_err().to_string();
        assert!(error.starts_with("cannot read absent.txt"), "{error}");
    }

    proptest! {
        #[test]
        fn any_rule_is_survived(rule in "(aspect|text_length|distinct|script|symbols|min_side):.{0,12}") {
            let _ = filter(&[&rule]);
        }

        #[test]
        fn alike_finds_what_a_full_search_finds(
            bits in 0..=MAX_BITS,
            hashes in proptest::collection::vec(any::<u64>(), 1..20),
            at in any::<proptest::sample::Index>(),
            flips in proptest::collection::vec(0..64, 0..20),
        ) {
            let mut alike = Alike::new(bits);
            for (key, hash) in (0..).zip(&hashes) {
                alike.insert(*hash, u64::to_string(&key));
            }
            let asked = flips.iter().fold(*at.get(&hashes), |hash, bit| hash ^ (1u64 << bit));
            let is_near = |hash: &u64| (hash ^ asked).count_ones() <= bits;
            match alike.find(asked) {
                Some(key) => prop_assert!(is_near(&hashes[key.parse::<usize>().unwrap()])),
                None => prop_assert!(!hashes.iter().any(is_near)),
            }
        }
    }
}
