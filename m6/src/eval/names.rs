//! Comparing a caption with the true name of what a picture shows.

use std::collections::HashMap;

use serde::Serialize;
use unicode_normalization::UnicodeNormalization;

use crate::model::Language;

/// One value for each language.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ByLanguage<T> {
    /// English.
    pub en: T,
    /// Chinese.
    pub zh: T,
}

impl<T> ByLanguage<T> {
    /// A value made for each language.
    ///
    /// # Errors
    /// The first error of `make`.
    pub fn try_make<E>(mut make: impl FnMut(Language) -> Result<T, E>) -> Result<Self, E> {
        Ok(Self { en: make(Language::En)?, zh: make(Language::Zh)? })
    }

    /// A value made for each language.
    pub fn make(mut make: impl FnMut(Language) -> T) -> Self {
        Self { en: make(Language::En), zh: make(Language::Zh) }
    }

    /// The value of a language.
    pub fn get(&self, language: Language) -> &T {
        match language {
            Language::En => &self.en,
            Language::Zh => &self.zh,
        }
    }
}

/// A caption beside the true name.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Judged {
    /// The true name.
    pub truth: String,
    /// What the model wrote.
    pub caption: String,
    /// Log-probability of the caption.
    pub logprob: f64,
    /// [`is_same_name`].
    pub exact: bool,
    /// [`token_f1`].
    pub token_f1: f64,
}

impl Judged {
    /// Compares `caption` with `truth`.
    pub fn new(truth: &str, caption: &str, logprob: f64, language: Language) -> Self {
        Self {
            exact: is_same_name(truth, caption),
            token_f1: token_f1(truth, caption, language),
            truth: truth.to_owned(),
            caption: caption.to_owned(),
            logprob,
        }
    }
}

/// Scores of the captions of many samples in one language.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct NameScores {
    /// Samples with a true name in this language.
    pub samples: usize,
    /// Share of captions that are the true name ([`is_same_name`]).
    pub exact: f64,
    /// Mean [`token_f1`].
    pub token_f1: f64,
}

impl NameScores {
    /// Means over `judged`; `None` when there is none.
    pub fn of<'a>(judged: impl Iterator<Item = &'a Judged>) -> Option<Self> {
        let (mut samples, mut exact, mut f1) = (0, 0, 0.0);
        for one in judged {
            samples += 1;
            exact += usize::from(one.exact);
            f1 += one.token_f1;
        }
        (samples > 0).then(|| {
            let n = samples as f64;
            Self { samples, exact: exact as f64 / n, token_f1: f1 / n }
        })
    }
}

/// Whether two names are the same but for width and composition of characters (NFKC), case and white space.
pub fn is_same_name(a: &str, b: &str) -> bool {
    normalise(a) == normalise(b)
}

/// F1 of the two bags of tokens: words (runs of letters and digits) in English, characters in Chinese. Names without
/// a token score 1 when they are the same and else 0.
pub fn token_f1(truth: &str, caption: &str, language: Language) -> f64 {
    let (truth, caption) = (normalise(truth), normalise(caption));
    let (expected, found) = (tokens(&truth, language), tokens(&caption, language));
    if expected.is_empty() || found.is_empty() {
        return f64::from(u8::from(truth == caption));
    }
    let mut left: HashMap<&str, usize> = HashMap::new();
    for token in &expected {
        *left.entry(token).or_default() += 1;
    }
    let common = found
        .iter()
        .filter(|token| {
            let left = left.get_mut(**token).filter(|left| **left > 0);
            left.map(|left| *left -= 1).is_some()
        })
        .count();
    2.0 * common as f64 / (expected.len() + found.len()) as f64
}

fn normalise(text: &str) -> String {
    let folded: String = text.nfkc().collect::<String>().to_lowercase();
    folded.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn tokens(text: &str, language: Language) -> Vec<&str> {
    match language {
        Language::En => text.split(|c: char| !c.is_alphanumeric()).filter(|word| !word.is_empty()).collect(),
        Language::Zh => {
            let characters = text.char_indices().filter(|(_, c)| c.is_alphanumeric());
            characters.map(|(at, c)| &text[at..at + c.len_utf8()]).collect()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use Language::{En, Zh};

    #[test]
    fn names_are_the_same_but_for_form() {
        assert!(is_same_name("red heart", "  Red  heart\n"));
        assert!(is_same_name("ABC", "ＡＢＣ"));
        assert!(is_same_name("pin\u{303}ata", "pi\u{f1}ata"));
        assert!(is_same_name("红心", "红心 "));
        assert!(!is_same_name("red heart", "heart"));
        assert!(!is_same_name("红心", "红 心"));
    }

    #[test]
    fn f1_counts_each_token_once() {
        assert_eq!(token_f1("red heart", "red heart", En), 1.0);
        // One word of two in common: precision 1/2, recall 1/2.
        assert_eq!(token_f1("red heart", "red apple", En), 0.5);
        // Precision 1/3, recall 1/2.
        assert!((token_f1("red heart", "red red red", En) - 0.4).abs() < 1e-12);
        assert_eq!(token_f1("red heart", "sun", En), 0.0);
        assert_eq!(token_f1("person: blond hair", "blond person hair", En), 1.0);
    }

    #[test]
    fn chinese_counts_characters() {
        // 2 of 3 and 2 of 2.
        assert!((token_f1("红心脸", "红心", Zh) - 0.8).abs() < 1e-12);
        assert_eq!(token_f1("红心，脸", "脸红心", Zh), 1.0);
        assert_eq!(token_f1("红心", "太阳", Zh), 0.0);
    }

    #[test]
    fn names_without_tokens() {
        assert_eq!(token_f1("!?", "!?", En), 1.0);
        assert_eq!(token_f1("!?", "", En), 0.0);
        assert_eq!(token_f1("red heart", "", En), 0.0);
    }

    #[test]
    fn scores_are_means() {
        let judged = [Judged::new("red heart", "red apple", -1.0, En), Judged::new("sun", "Sun", -1.0, En)];
        let scores = NameScores::of(judged.iter()).unwrap();
        assert_eq!((scores.samples, scores.exact, scores.token_f1), (2, 0.5, 0.75));
        assert_eq!(NameScores::of([].iter()), None);
    }
}
