//! Rules by which samples, or texts of them, are left out on their way into shards.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::Value;

use crate::caption::{CaptionField, CaptionFields, TEXT_EXTENSIONS, Texts};
use crate::error::{DataError, Result};
use crate::picture::Measured;
pub use crate::rule::LeftOut;
use crate::rule::{Check, FieldText, Rule, TextCheck};
use crate::shard::PICTURE_EXTENSIONS;

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
/// * `words_absent:FILE`: none of the file's words or phrases, one a line, stands in a text, whatever its case,
/// * `perplexity:MIN..MAX`: a model finds a text so surprising, by a [`Scorer`].
///
/// Limits are inclusive, and one of the two may be left out. *Earlier* are samples that were not left out.
///
/// The rules are asked in their order. A rule for pictures leaves out the sample. A rule for texts removes the texts that
/// fail it, and leaves out the sample when none stays. Samples without a picture pass the rules for pictures, those without
/// a text those for texts.
///
/// [`Script`]: crate::Script
#[derive(Debug, Default)]
pub struct Filter {
    rules: Vec<Rule>,
    fields: Vec<String>,
    log: Option<Log>,
    scorer: Option<Scorer>,
}

type Score = dyn FnMut(&[String]) -> std::result::Result<Vec<f64>, String>;

/// Measures the perplexity of texts by a model, of many at once: e to the mean of what each token costs in nats.
pub struct Scorer(Box<Score>);

impl Scorer {
    /// One that asks `score`, which gives a value for each text.
    pub fn new(score: impl FnMut(&[String]) -> std::result::Result<Vec<f64>, String> + 'static) -> Self {
        Self(Box::new(score))
    }
}

impl fmt::Debug for Scorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Scorer")
    }
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
    /// for every text of a `.txt` and a `.json`. Rules about perplexity ask the `scorer`.
    ///
    /// # Errors
    /// A rule that does not parse or lacks its scorer, a file that cannot be read or is empty, or a field that is neither the
    /// `.txt` nor a key of the `.json`.
    pub fn new(rules: &[String], fields: &CaptionFields, scorer: Option<Scorer>) -> Result<Self> {
        let rules = rules.iter().map(|rule| Rule::parse(rule)).collect::<Result<Vec<_>>>()?;
        let scored = rules.iter().find(|rule| matches!(rule.check, Check::Text(TextCheck::Perplexity(_))));
        if let (Some(rule), None) = (scored, &scorer) {
            let reason = "expected a model that measures it".to_owned();
            return Err(DataError::Filter { rule: rule.left_out.rule.clone(), reason });
        }
        let fields = fields.fields().iter().map(judged_field).collect::<Result<_>>()?;
        Ok(Self { rules, fields, log: None, scorer })
    }

    /// Measures the texts of samples that will be asked about next, together.
    ///
    /// # Errors
    /// Those of the scorer.
    pub(crate) fn measure<'a>(&mut self, drafts: impl Iterator<Item = &'a Draft>) -> Result<()> {
        let Some(Scorer(score)) = &mut self.scorer else { return Ok(()) };
        let fields = &self.fields;
        let is_judged = |field: &str| fields.is_empty() || fields.iter().any(|name| name == field);
        let texts = drafts.flat_map(|draft| draft.texts.all());
        let texts: BTreeSet<String> =
            texts.filter(|(field, _)| is_judged(field)).map(|(_, text)| text).collect();
        let texts: Vec<String> = texts.into_iter().collect();
        let scored = self.rules.iter_mut().filter_map(|rule| match &mut rule.check {
            Check::Text(TextCheck::Perplexity(perplexities)) => Some((perplexities, &rule.left_out.rule)),
            _ => None,
        });
        for (perplexities, rule) in scored {
            let values = score(&texts).map_err(|reason| DataError::Filter { rule: rule.clone(), reason })?;
            perplexities.known = texts.iter().cloned().zip(values).collect();
        }
        Ok(())
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
            rule.check.remember(&draft.key, draft.picture.as_ref(), &draft.texts, is_judged);
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

impl Log {
    fn write(log: &mut Option<Self>, line: &Line) -> Result<()> {
        let Some(Self { path, file }) = log else { return Ok(()) };
        let written = serde_json::to_writer(&mut *file, line).map_err(io::Error::from);
        written.and_then(|()| writeln!(file)).map_err(DataError::io("write", path))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::rc::Rc;

    use super::*;
    use crate::picture::Rgb8;

    fn filter(rules: &[&str]) -> Result<Filter> {
        let rules: Vec<_> = rules.iter().map(|&rule| rule.to_owned()).collect();
        Filter::new(&rules, &CaptionFields::default(), None)
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
    fn perplexity_is_measured_of_many_texts_at_once_and_of_judged_ones_alone() {
        let asked = Rc::new(RefCell::new(Vec::new()));
        let scorer = || {
            let asked = Rc::clone(&asked);
            Scorer::new(move |texts| {
                asked.borrow_mut().push(texts.to_vec());
                Ok(texts.iter().map(|text| text.len() as f64).collect())
            })
        };
        let rules = ["perplexity:2..4".to_owned()];
        let judged =
            CaptionFields::new(vec![serde_json::from_str(r#"{"member": "json", "key": "en"}"#).unwrap()])
                .unwrap();
        let error = Filter::new(&rules, &judged, None).unwrap_err().to_string();
        assert_eq!(error, "filter \"perplexity:2..4\": expected a model that measures it");
        let mut filter = Filter::new(&rules, &judged, Some(scorer())).unwrap();
        let draft = |json: &str| {
            Draft::new("key".to_owned(), vec![("json".to_owned(), json.as_bytes().to_vec())]).unwrap()
        };
        let mut drafts = [r#"{"en": ["four", "longer"], "zh": "x"}"#, r#"{"en": "a"}"#].map(draft);
        filter.measure(drafts.iter()).unwrap();
        assert_eq!(*asked.borrow(), [["a", "four", "longer"].map(str::to_owned).to_vec()]);
        assert_eq!(drafts.each_mut().map(|draft| filter.keeps(draft).unwrap()), [true, false]);
        assert_eq!(drafts[0].members[0].1, br#"{"en":["four"],"zh":"x"}"#);
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
    fn a_log_on_a_full_disk_is_an_error() {
        let mut filter = filter(&["text_length:9.."]).unwrap().log_to(Path::new("/dev/full")).unwrap();
        assert!(!filter.keeps(&mut draft("a", &[("txt", b"short")])).unwrap());
        let error = filter.finish().unwrap_err().to_string();
        assert!(error.starts_with("cannot write /dev/full: No space left"), "{error}");
    }

    #[test]
    fn rules_judge_the_given_fields_alone() {
        let fields = |json: &str| serde_json::from_str::<CaptionFields>(json).unwrap();
        let rules = ["text_length:5..".to_owned()];
        let judged = fields(r#"[{"member": "json", "key": "en"}, {"member": "json", "key": "zh"}]"#);
        let mut filter = Filter::new(&rules, &judged, None).unwrap();
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
            let error = Filter::new(&rules, &fields(other), None).unwrap_err().to_string();
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
}
