//! Which texts of a sample are its captions: chosen by config, in several languages, with weights.

use std::collections::BTreeMap;
use std::fmt;

use rand::Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::error::{DataError, Result};
use crate::flaw::FlawClass;
use crate::shard::Sample;

/// Extensions of the members whose texts can be listed without a config.
pub(crate) const TEXT_EXTENSIONS: [&str; 2] = ["txt", "json"];

/// One place where captions are found in a sample.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CaptionField {
    /// Extension of the member: `json` for a JSON object, any other (such as `txt`) for plain UTF-8 text.
    pub member: String,
    /// Key of the JSON object whose value, a string or an array of strings, is the caption.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// Caption with JSON keys in braces, such as `"{en}, {style_en}"`; instead of `key`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub template: Option<String>,
    /// Language of the caption, such as `zh` or `en`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lang: Option<String>,
    /// How often this field is chosen, relative to the others.
    #[serde(default = "one")]
    pub weight: f64,
}

fn one() -> f64 {
    1.0
}

/// A caption of a sample.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Caption {
    /// The text, without surrounding white space; never empty.
    pub text: String,
    /// Language of its field.
    pub lang: Option<String>,
}

/// The caption fields of a data set. With none, its samples have no captions.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Vec<CaptionField>", into = "Vec<CaptionField>")]
pub struct CaptionFields(Vec<CaptionField>);

impl CaptionFields {
    /// Checks the fields.
    ///
    /// # Errors
    /// A JSON field without exactly one of `key` and `template`, a text field with either, a malformed template, or a
    /// weight that is not a positive number.
    pub fn new(fields: Vec<CaptionField>) -> Result<Self> {
        fields.iter().try_for_each(CaptionField::check)?;
        Ok(Self(fields))
    }

    /// The fields.
    pub fn fields(&self) -> &[CaptionField] {
        &self.0
    }

    /// Chooses one caption of `sample`, by weight among the fields that have a text in it; an array gives one of its
    /// entries. `None` when every field that the sample has is empty.
    ///
    /// # Errors
    /// The sample has none of the fields, or its text is not UTF-8, or its JSON is malformed.
    pub fn pick(&self, sample: &Sample, rng: &mut impl Rng) -> Result<Option<Caption>> {
        let mut found = self.find(sample)?;
        let total: f64 = found.iter().map(|(field, _)| field.weight).sum();
        if found.is_empty() {
            return Ok(None);
        }
        let mut draw = rng.random_range(0.0..total);
        let chosen = found.iter().position(|(field, _)| {
            draw -= field.weight;
            draw < 0.0
        });
        let (field, mut texts) = found.swap_remove(chosen.unwrap_or(found.len() - 1));
        let text = texts.swap_remove(rng.random_range(0..texts.len()));
        Ok(Some(Caption { text, lang: field.lang.clone() }))
    }

    /// Every caption of `sample`, in the order of the fields.
    ///
    /// # Errors
    /// As [`CaptionFields::pick`].
    pub fn all(&self, sample: &Sample) -> Result<Vec<Caption>> {
        let captions = |(field, texts): (&CaptionField, Vec<String>)| {
            let lang = field.lang.clone();
            texts.into_iter().map(move |text| Caption { text, lang: lang.clone() })
        };
        Ok(self.find(sample)?.into_iter().flat_map(captions).collect())
    }

    /// The fields that have a text in `sample`, with their texts (at least one each).
    fn find(&self, sample: &Sample) -> Result<Vec<(&CaptionField, Vec<String>)>> {
        let mut found = Vec::new();
        let mut present = self.0.is_empty();
        for field in &self.0 {
            let Some(texts) = field.texts(sample)? else { continue };
            present = true;
            if !texts.is_empty() {
                found.push((field, texts));
            }
        }
        if present {
            return Ok(found);
        }
        Err(sample.error(FlawClass::MissingMember, format!("has none of the caption fields {self}")))
    }
}

impl fmt::Display for CaptionFields {
    /// The fields' names, such as `.txt, .json en`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(CaptionField::name).collect();
        f.write_str(&names.join(", "))
    }
}

/// The first text of one field of a sample, if it has any.
///
/// # Errors
/// The member is not UTF-8, or its JSON is malformed.
pub fn text(sample: &Sample, field: &CaptionField) -> Result<Option<String>> {
    Ok(field.texts(sample)?.and_then(|texts| texts.into_iter().next()))
}

/// All texts of a sample by the name of the caption field that would find them: `.txt`, and `.json KEY` for each key. Fields
/// without a text are left out.
///
/// # Errors
/// As [`text`], or the JSON is not an object.
pub(crate) fn texts_by_field(sample: &Sample) -> Result<BTreeMap<String, Vec<String>>> {
    let texts = Texts::read(|extension| sample.member(extension));
    let texts = texts.map_err(|reason| sample.error(FlawClass::BrokenText, reason))?;
    let mut found: BTreeMap<_, Vec<_>> = BTreeMap::new();
    for (field, text) in texts.all() {
        found.entry(field).or_default().push(text);
    }
    Ok(found)
}

/// The `.txt` and the `.json` of a sample, in which caption fields find its texts.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Texts {
    txt: Option<String>,
    json: Option<Map<String, Value>>,
}

impl Texts {
    /// Reads the members that `member` gives by extension.
    ///
    /// # Errors
    /// Why one of them cannot be used: it is not UTF-8, or not a JSON object.
    pub(crate) fn read<'a>(member: impl Fn(&str) -> Option<&'a [u8]>) -> std::result::Result<Self, String> {
        let utf8 = |extension| {
            let text = member(extension).map(std::str::from_utf8).transpose();
            text.map_err(|_| format!("its .{extension} is not UTF-8 text"))
        };
        let json = utf8("json")?.map(serde_json::from_str).transpose();
        let json = json.map_err(|e| format!("its .json is malformed: {e}"))?;
        Ok(Self { txt: utf8("txt")?.map(str::to_owned), json })
    }

    /// Every text, without surrounding white space and never empty, with the name of its caption field: `.txt` or
    /// `.json KEY`.
    pub(crate) fn all(&self) -> Vec<(String, String)> {
        let txt = self.txt.as_deref().and_then(non_empty).map(|text| (TXT.to_owned(), text));
        let json = self.json.iter().flatten();
        let json =
            json.flat_map(|(key, value)| strings(value).into_iter().map(move |text| (json_field(key), text)));
        txt.into_iter().chain(json).collect()
    }

    /// Removes the texts that are not to be kept, with the `.txt` or the key or place in an array where they stand, and
    /// an array or object that this leaves empty.
    pub(crate) fn retain(&mut self, mut keep: impl FnMut(&str, &str) -> bool) {
        let mut keep = |field: &str, text: &str| non_empty(text).is_none_or(|text| keep(field, &text));
        self.txt.take_if(|text| !keep(TXT, text));
        let Some(json) = &mut self.json else { return };
        let keys = json.len();
        json.retain(|key, value| match value {
            Value::String(text) => keep(&json_field(key), text),
            Value::Array(values) => {
                let all = values.len();
                values.retain(|value| value.as_str().is_none_or(|text| keep(&json_field(key), text)));
                values.len() == all || !values.is_empty()
            }
            _ => true,
        });
        self.json.take_if(|json| json.len() < keys && json.is_empty());
    }

    /// The bytes of a member, if there is such a one.
    pub(crate) fn member(&self, extension: &str) -> Option<Vec<u8>> {
        match extension {
            "txt" => self.txt.as_ref().map(|text| text.clone().into_bytes()),
            "json" => self.json.as_ref().map(|json| Value::from(json.clone()).to_string().into_bytes()),
            _ => None,
        }
    }
}

/// Field of the text of a `.txt`.
const TXT: &str = ".txt";

fn json_field(key: &str) -> String {
    format!(".json {key}")
}

fn member_text<'a>(sample: &'a Sample, member: &str) -> Result<Option<&'a str>> {
    let utf8 = |bytes| {
        let broken = |_| sample.error(FlawClass::BrokenText, format!("its .{member} is not UTF-8 text"));
        std::str::from_utf8(bytes).map_err(broken)
    };
    sample.member(member).map(utf8).transpose()
}

fn parse(sample: &Sample, member: &str, text: &str) -> Result<Value> {
    let malformed = |e| sample.error(FlawClass::BrokenText, format!("its .{member} is malformed: {e}"));
    serde_json::from_str(text).map_err(malformed)
}

impl CaptionField {
    fn check(&self) -> Result<()> {
        let fail = |reason: &str| {
            Err(DataError::CaptionField { member: self.member.clone(), reason: reason.to_owned() })
        };
        if !(self.weight.is_finite() && self.weight > 0.0) {
            return fail(&format!("weight = {}, expected a number above 0", self.weight));
        }
        match (self.is_json(), &self.key, &self.template) {
            (true, Some(_), None) | (false, None, None) => Ok(()),
            (true, None, Some(template)) => match Part::parse(template) {
                Some(parts) if parts.iter().any(|part| matches!(part, Part::Key(_))) => Ok(()),
                _ => fail(&format!(
                    "template = \"{template}\", expected JSON keys in braces such as \"{{en}}\""
                )),
            },
            (true, ..) => fail("expected exactly one of key and template"),
            (false, ..) => fail("key and template are for json members"),
        }
    }

    fn is_json(&self) -> bool {
        self.member == "json" || self.member.ends_with(".json")
    }

    /// How messages name the field: `.txt`, `.json en`.
    pub(crate) fn name(&self) -> String {
        let what = self.key.as_ref().or(self.template.as_ref());
        what.map_or_else(|| format!(".{}", self.member), |what| format!(".{} {what}", self.member))
    }

    /// Texts of the field: `None` when the sample does not have it, empty when it has it without any text.
    fn texts(&self, sample: &Sample) -> Result<Option<Vec<String>>> {
        let Some(text) = member_text(sample, &self.member)? else { return Ok(None) };
        if !self.is_json() {
            return Ok(Some(non_empty(text).into_iter().collect()));
        }
        let json = parse(sample, &self.member, text)?;
        match (&self.key, &self.template) {
            (Some(key), _) => Ok(json.get(key).map(strings)),
            (None, Some(template)) => Ok(fill(template, &json)),
            (None, None) => Ok(None),
        }
    }
}

/// A piece of a template.
enum Part<'a> {
    Literal(&'a str),
    Key(&'a str),
}

impl<'a> Part<'a> {
    /// Splits a template; `None` when its braces do not pair.
    fn parse(template: &'a str) -> Option<Vec<Self>> {
        let mut parts = Vec::new();
        let mut rest = template;
        while let Some(open) = rest.find('{') {
            let close = open + rest[open..].find('}')?;
            parts.extend([Part::Literal(&rest[..open]), Part::Key(&rest[open + 1..close])]);
            rest = &rest[close + 1..];
        }
        parts.push(Part::Literal(rest));
        let balanced = parts.iter().all(|part| match part {
            Part::Literal(text) => !text.contains('}'),
            Part::Key(key) => !key.is_empty() && !key.contains('{'),
        });
        balanced.then_some(parts)
    }
}

/// Every filling of a template: one for each combination of its keys' strings. `None` when a key is absent.
fn fill(template: &str, json: &Value) -> Option<Vec<String>> {
    let mut filled = vec![String::new()];
    for part in Part::parse(template)? {
        let choices = match part {
            Part::Literal(text) => vec![text.to_owned()],
            Part::Key(key) => strings(json.get(key)?),
        };
        filled =
            filled.iter().flat_map(|head| choices.iter().map(move |tail| format!("{head}{tail}"))).collect();
    }
    Some(filled)
}

/// The non-empty strings of a JSON string or array; other values have none.
fn strings(value: &Value) -> Vec<String> {
    match value {
        Value::String(text) => non_empty(text).into_iter().collect(),
        Value::Array(values) => values.iter().filter_map(Value::as_str).filter_map(non_empty).collect(),
        _ => Vec::new(),
    }
}

fn non_empty(text: &str) -> Option<String> {
    let text = text.trim();
    (!text.is_empty()).then(|| text.to_owned())
}

impl TryFrom<Vec<CaptionField>> for CaptionFields {
    type Error = DataError;

    fn try_from(fields: Vec<CaptionField>) -> Result<Self> {
        Self::new(fields)
    }
}

impl From<CaptionFields> for Vec<CaptionField> {
    fn from(fields: CaptionFields) -> Self {
        fields.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::sample_rng;
    use crate::shard::ShardSet;
    use crate::writer::ShardWriter;
    use std::collections::BTreeMap;

    /// One sample with the given members, handed to `check`.
    fn with_sample<T>(members: &[(&str, &[u8])], check: impl FnOnce(&Sample) -> T) -> T {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "test", u64::MAX).unwrap();
        writer.write("cat", members).unwrap();
        let path = writer.finish().unwrap().remove(0);
        let set = ShardSet::open(&[path.display().to_string()]).unwrap();
        check(&set.sample(0).unwrap())
    }

    fn fields(json: &str) -> CaptionFields {
        serde_json::from_str(json).unwrap()
    }

    const JSON: &[u8] =
        r#"{"en": "a cat", "zh": "猫", "style": "flat", "tags": ["tom", " ", "kitten"], "none": ""}"#
            .as_bytes();

    #[test]
    fn fields_are_chosen_by_weight() {
        let fields = fields(
            r#"[{"member": "json", "key": "en", "lang": "en", "weight": 3}, {"member": "json", "key": "zh", "lang": "zh"},
                {"member": "json", "key": "absent", "weight": 100}, {"member": "json", "key": "none", "weight": 100}]"#,
        );
        let mut counts = BTreeMap::new();
        with_sample(&[("json", JSON)], |sample| {
            for ordinal in 0..2000 {
                let caption = fields.pick(sample, &mut sample_rng(1, ordinal)).unwrap().unwrap();
                *counts.entry((caption.text, caption.lang.unwrap())).or_insert(0) += 1;
            }
        });
        let count = |text: &str, lang: &str| counts[&(text.to_owned(), lang.to_owned())];
        assert_eq!(counts.len(), 2);
        assert!(
            (1400..1600).contains(&count("a cat", "en")) && (400..600).contains(&count("猫", "zh")),
            "{counts:?}"
        );
    }

    #[test]
    fn templates_arrays_and_plain_text() {
        let fields = fields(
            r#"[{"member": "json", "template": "{en}, {style}"}, {"member": "json", "template": "{tags} ({style})"},
                {"member": "json", "template": "{en} {absent}"}, {"member": "txt", "lang": "en"}]"#,
        );
        with_sample(&[("json", JSON), ("txt", b" a tom cat\n")], |sample| {
            let texts: Vec<_> = fields.all(sample).unwrap().into_iter().map(|c| c.text).collect();
            assert_eq!(texts, ["a cat, flat", "tom (flat)", "kitten (flat)", "a tom cat"]);
            assert_eq!(text(sample, &fields.fields()[1]).unwrap().as_deref(), Some("tom (flat)"));
            assert_eq!(text(sample, &fields.fields()[2]).unwrap(), None);
        });
    }

    #[test]
    fn absent_fields_are_an_error_and_empty_ones_are_not() {
        let fields = fields(r#"[{"member": "txt"}, {"member": "json", "key": "fr"}]"#);
        let pick =
            |members: &[(&str, &[u8])]| with_sample(members, |s| fields.pick(s, &mut sample_rng(1, 1)));
        assert_eq!(pick(&[("txt", b" \n")]).unwrap(), None);
        let error = pick(&[("json", JSON)]).unwrap_err().to_string();
        assert!(
            error.contains(", sample cat: ")
                && error.ends_with("has none of the caption fields .txt, .json fr"),
            "{error}"
        );
        assert!(
            pick(&[("txt", b"\xff\xfe")]).unwrap_err().to_string().contains("its .txt is not UTF-8 text")
        );
        assert!(pick(&[("json", b"{\"fr\": ")]).unwrap_err().to_string().contains("its .json is malformed"));
        assert_eq!(
            with_sample(&[("bin", b"x")], |s| CaptionFields::default().pick(s, &mut sample_rng(1, 1)))
                .unwrap(),
            None
        );
    }

    #[test]
    fn texts_are_removed_with_what_holds_nothing_else() {
        let members = |txt: &'static str, json: &'static str| {
            move |extension: &str| match extension {
                "txt" => Some(txt.as_bytes()),
                _ => Some(json.as_bytes()),
            }
        };
        let without_a = |txt, json| {
            let mut texts = Texts::read(members(txt, json)).unwrap();
            texts.retain(|_, text| text != "a");
            let member = |extension| texts.member(extension).map(|bytes| String::from_utf8(bytes).unwrap());
            (member("txt"), member("json"))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(without_a(" a ", r#"{"x": "a", "y": ["a"]}"#), (None, None));
        assert_eq!(without_a(" b ", r#"{"x": ["b", "a", 1]}"#), (some(" b "), some(r#"{"x":["b",1]}"#)));
        assert_eq!(without_a(" ", r#"{"x": [], "y": " "}"#), (some(" "), some(r#"{"x":[],"y":" "}"#)));
        assert_eq!(without_a("", "{}"), (some(""), some("{}")));
        let error = Texts::read(members("", "[]")).unwrap_err();
        assert!(error.starts_with("its .json is malformed"), "{error}");
    }

    #[test]
    fn contradictory_fields_are_refused() {
        for (json, expected) in [
            (r#"[{"member": "json"}]"#, "exactly one of key and template"),
            (r#"[{"member": "json", "key": "a", "template": "{a}"}]"#, "exactly one of key and template"),
            (r#"[{"member": "txt", "key": "a"}]"#, "are for json members"),
            (r#"[{"member": "json", "template": "no key"}]"#, "expected JSON keys in braces"),
            (r#"[{"member": "json", "template": "{a"}]"#, "expected JSON keys in braces"),
            (r#"[{"member": "txt", "weight": 0}]"#, "weight = 0, expected a number above 0"),
            (r#"[{"member": "txt", "wieght": 1}]"#, "unknown field `wieght`"),
        ] {
            let error = serde_json::from_str::<CaptionFields>(json).unwrap_err().to_string();
            assert!(error.contains(expected), "{json}: {error}");
        }
    }
}
