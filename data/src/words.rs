//! Words of a text, and what can be told of its quality by them.

use std::collections::{BTreeSet, HashMap};

use unicode_normalization::char::is_combining_mark;

use crate::script::is_han;

/// Splits a text into words: runs of letters, digits and marks. A Han character is a word of its own, and so is every other
/// character but white space.
fn words(text: &str) -> Vec<&str> {
    let joins = |c: char| is_part_of_word(c) && !is_han(c);
    let mut words = Vec::new();
    let mut rest = text.trim_start();
    while let Some(first) = rest.chars().next() {
        let end = match joins(first) {
            true => rest.find(|c| !joins(c)).unwrap_or(rest.len()),
            false => first.len_utf8(),
        };
        let (word, tail) = rest.split_at(end);
        words.push(word);
        rest = tail.trim_start();
    }
    words
}

fn is_part_of_word(c: char) -> bool {
    c.is_alphanumeric() || is_combining_mark(c)
}

/// The share of a text's characters, white space aside, that its most frequent pair of neighbouring words covers; 0 where no
/// pair occurs twice. That is the "top 2-gram character fraction" of Gopher's repetition filters (Rae et al. 2021, "Scaling
/// Language Models", table A1, where documents may reach 0.2), with every Han character taken as a word.
pub(crate) fn repetition(text: &str) -> f64 {
    let words = words(text);
    let lengths: Vec<usize> = words.iter().map(|word| word.chars().count()).collect();
    let mut places: HashMap<&[&str], Vec<usize>> = HashMap::new();
    for (at, pair) in words.windows(2).enumerate() {
        places.entry(pair).or_default().push(at);
    }
    // Pairs of equal words overlap; each word counts once.
    let covered = |places: &[usize]| -> usize {
        let words: BTreeSet<usize> = places.iter().flat_map(|&at| [at, at + 1]).collect();
        words.into_iter().map(|word| lengths[word]).sum()
    };
    let repeated = places.values().filter(|places| places.len() > 1);
    let most_frequent = repeated.map(|places| (places.len(), covered(places))).max();
    most_frequent.map_or(0.0, |(_, covered)| covered as f64 / lengths.iter().sum::<usize>() as f64)
}

/// The share of a text's characters that are neither letters, digits, marks nor white space; 0 of none.
pub(crate) fn symbols(text: &str) -> f64 {
    let symbols = text.chars().filter(|&c| !is_part_of_word(c) && !c.is_whitespace()).count();
    symbols as f64 / text.chars().count().max(1) as f64
}

/// Words and phrases to look for in texts: whole words, whatever their case and the white space between them.
#[derive(Debug)]
pub(crate) struct WordList {
    by_first_word: HashMap<String, Vec<Phrase>>,
}

#[derive(Debug)]
struct Phrase {
    line: String,
    words: Vec<String>,
}

impl WordList {
    /// The words or phrases of `text`, one a line; `None` without any.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let mut by_first_word: HashMap<_, Vec<_>> = HashMap::new();
        for line in text.lines().map(str::trim) {
            let words: Vec<String> = words(&line.to_lowercase()).into_iter().map(str::to_owned).collect();
            if let Some(first) = words.first() {
                by_first_word.entry(first.clone()).or_default().push(Phrase { line: line.to_owned(), words });
            }
        }
        (!by_first_word.is_empty()).then_some(Self { by_first_word })
    }

    /// The line of a word or phrase that stands in `text`.
    pub(crate) fn find(&self, text: &str) -> Option<&str> {
        let text = text.to_lowercase();
        let words = words(&text);
        let starting_at = |at: usize| {
            let begins = |phrase: &&Phrase| {
                let there = words[at..].iter().take(phrase.words.len());
                there.copied().eq(phrase.words.iter().map(String::as_str))
            };
            self.by_first_word.get(words[at])?.iter().find(begins)
        };
        (0..words.len()).find_map(starting_at).map(|phrase| phrase.line.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn texts_are_split_into_words() {
        assert_eq!(words(" a re\u{301}d T-shirt, 3D "), ["a", "re\u{301}d", "T", "-", "shirt", ",", "3D"]);
        assert_eq!(words("红色T恤"), ["红", "色", "T", "恤"]);
        assert!(words(" \n").is_empty());
    }

    #[test]
    fn repetition_is_what_the_most_frequent_pair_covers() {
        for (text, share) in [
            ("", 0.0),
            ("heart", 0.0),
            ("a red heart", 0.0),
            ("buy now buy now cheap", 12.0 / 17.0),
            ("ha ha ha ha", 1.0),
            ("哈哈哈哈", 1.0),
            ("红心，红心", 4.0 / 5.0),
            ("!!!! sale", 4.0 / 8.0),
            // One of two pairs that are equally frequent: the longer one.
            ("a b a b long words long words", 18.0 / 22.0),
        ] {
            assert_eq!(repetition(text), share, "{text}");
        }
    }

    #[test]
    fn symbols_are_a_share_of_characters() {
        for (text, share) in
            [("", 0.0), ("a re\u{301}d 心 3", 0.0), ("?!", 1.0), ("ab !", 0.25), ("❤ heart!", 0.25)]
        {
            assert_eq!(symbols(text), share, "{text}");
        }
    }

    #[test]
    fn words_and_phrases_are_found_whole() {
        let list = WordList::parse("Ass\n\n  buy  now \n赌博\n").unwrap();
        for (text, found) in [
            ("an ASS.", Some("Ass")),
            ("a class", None),
            ("Buy\nnow!", Some("buy  now")),
            ("buy it now", None),
            ("buy buy now", Some("buy  now")),
            ("buy", None),
            ("网上赌博网站", Some("赌博")),
            ("赌一博", None),
        ] {
            assert_eq!(list.find(text), found, "{text}");
        }
        assert!(WordList::parse(" \n\n").is_none());
    }

    proptest! {
        #[test]
        fn shares_of_any_text(text in ".{0,60}") {
            for share in [repetition(&text), symbols(&text)] {
                prop_assert!((0.0..=1.0).contains(&share), "{}", share);
            }
            if let Some(list) = WordList::parse(&text) {
                let line = text.lines().find(|line| !line.trim().is_empty()).unwrap();
                prop_assert!(list.find(line).is_some());
            }
        }
    }
}
