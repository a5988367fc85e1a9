//! One rule of a filter: how it is written, and what of a picture or text fails it.

use std::collections::HashMap;
use std::path::Path;
use std::str::FromStr;

use serde::Serialize;
use serde_json::Value;

use crate::caption::Texts;
use crate::error::{DataError, Result};
use crate::picture::Measured;
use crate::script::Script;
use crate::words::{WordList, repetition, symbols};

/// Names of scripts in a rule.
const SCRIPTS: [(&str, Script); 3] =
    [("han", Script::Han), ("latin", Script::Latin), ("other", Script::Other)];
/// Bits by which pictures that look alike may differ at most. With more, the parts of [`Alike`] would be so short that
/// each of them agrees with that of many another picture.
const MAX_BITS: u32 = 15;

/// A rule and what became of it.
#[derive(Debug)]
pub(crate) struct Rule {
    pub check: Check,
    pub left_out: LeftOut,
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

/// A text and the field that it stands in.
#[derive(Serialize)]
pub(crate) struct FieldText {
    field: String,
    text: String,
}

/// What a rule looks at.
#[derive(Debug)]
pub(crate) enum Check {
    Picture(PictureCheck),
    Text(TextCheck),
}

/// A rule for pictures.
#[derive(Debug)]
pub(crate) enum PictureCheck {
    MinSide(u32),
    MaxSide(u32),
    Aspect(Limits<f64>),
    Distinct(Seen),
    Alike(Alike),
}

/// A rule for texts.
#[derive(Debug)]
pub(crate) enum TextCheck {
    Length(Limits<usize>),
    Words(Limits<usize>),
    Script(Vec<Script>),
    Distinct(Seen),
    Repetition(f64),
    Symbols(f64),
    WordsAbsent(WordList),
    Perplexity(Perplexities),
}

/// Limits of a measure that a model takes of many texts at once.
#[derive(Debug)]
pub(crate) struct Perplexities {
    limits: Limits<f64>,
    /// By the text.
    pub known: HashMap<String, f64>,
}

/// Keys of samples by the digest of what they have.
pub(crate) type Seen = HashMap<[u8; blake3::OUT_LEN], String>;

impl Check {
    /// Keeps in mind a sample that stays.
    pub(crate) fn remember(
        &mut self,
        key: &str,
        picture: Option<&Measured>,
        texts: &Texts,
        is_judged: impl Fn(&str) -> bool,
    ) {
        match (self, picture) {
            (Self::Picture(PictureCheck::Distinct(seen)), Some(picture)) => {
                seen.insert(picture.digest, key.to_owned());
            }
            (Self::Picture(PictureCheck::Alike(alike)), Some(picture)) => {
                alike.insert(picture.hash, key.to_owned());
            }
            (Self::Text(TextCheck::Distinct(seen)), _) => {
                for (field, text) in texts.all().iter().filter(|(field, _)| is_judged(field)) {
                    seen.entry(text_digest(field, text)).or_insert_with(|| key.to_owned());
                }
            }
            _ => {}
        }
    }
}

impl PictureCheck {
    /// What of a picture fails the rule.
    pub(crate) fn fault(&self, picture: &Measured) -> Option<Value> {
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
    pub(crate) fn remove_faulty(
        &self,
        texts: &mut Texts,
        is_judged: impl Fn(&str) -> bool,
    ) -> Vec<(FieldText, Value)> {
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
            Self::Perplexity(Perplexities { limits, known }) => {
                // One that no model can measure is beyond all limits.
                limits.fault(known.get(text).copied().unwrap_or(f64::INFINITY))
            }
        }
    }
}

fn text_digest(field: &str, text: &str) -> [u8; blake3::OUT_LEN] {
    let mut hasher = blake3::Hasher::new();
    *hasher.update(field.as_bytes()).update(b"\0").update(text.as_bytes()).finalize().as_bytes()
}

/// Inclusive limits, of which one may be open.
#[derive(Debug)]
pub(crate) struct Limits<T> {
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
pub(crate) struct Alike {
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
    /// Parses a rule, and reads the file that it names.
    ///
    /// # Errors
    /// It does not parse, or the file cannot be read or is empty.
    pub(crate) fn parse(rule: &str) -> Result<Self> {
        let left_out = LeftOut { rule: rule.to_owned(), samples: 0, texts: 0 };
        Ok(Self { check: rule.parse()?, left_out })
    }
}

impl FromStr for Check {
    type Err = DataError;

    fn from_str(rule: &str) -> Result<Self> {
        let (name, value) = rule.split_once(':').unwrap_or((rule, ""));
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
        let ratios = || {
            let is_ratio = |limit: f64| limit.is_finite() && limit > 0.0;
            let limits = Limits::parse(value)
                .filter(|limits| limits.min.is_none_or(is_ratio) && limits.max.is_none_or(is_ratio));
            limits.ok_or_else(|| fail("MIN..MAX, MIN.. or ..MAX, such as 0.5..2"))
        };
        Ok(match name {
            "min_side" => Self::Picture(PictureCheck::MinSide(side(value)?)),
            "max_side" => Self::Picture(PictureCheck::MaxSide(side(value)?)),
            "aspect" => Self::Picture(PictureCheck::Aspect(ratios()?)),
            "perplexity" => {
                Self::Text(TextCheck::Perplexity(Perplexities { limits: ratios()?, known: HashMap::new() }))
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
                    "min_side, max_side, aspect, text_length, text_words, script, distinct, repetition, symbols, \
                     words_absent or perplexity, then a colon and its value",
                ));
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn rules_that_do_not_parse_are_named() {
        for (rule, expected) in [
            ("min_side", "a size in pixels"),
            ("min_side:0", "a size in pixels"),
            ("max_side: 8", "a size in pixels"),
            ("aspect:2..1", "MIN..MAX"),
            ("aspect:-1..1", "MIN..MAX"),
            ("aspect:nan..", "MIN..MAX"),
            ("perplexity:0..", "MIN..MAX"),
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
            let error = Rule::parse(rule).unwrap_err().to_string();
            let named = format!("filter \"{rule}\": expected ");
            assert!(error.starts_with(&named) && error.contains(expected), "{error}");
        }
        let error = Rule::parse("words_absent:absent.txt").unwrap_err().to_string();
        assert!(error.starts_with("cannot read absent.txt"), "{error}");
    }

    proptest! {
        #[test]
        fn any_rule_is_survived(rule in "(aspect|text_length|distinct|script|symbols|min_side):.{0,12}") {
            let _ = Rule::parse(&rule);
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
