//! The script of a text, from which its language is guessed.

use serde::Serialize;

/// What a text is written in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Script {
    /// It has a Han character, as every Chinese text does (and many a Japanese one).
    Han,
    /// At least half of its letters are Latin, as in English.
    Latin,
    /// Another script, or no letters at all.
    Other,
}

impl Script {
    /// The script of `text`. A single Han character decides, because Chinese texts quote Latin words and English ones
    /// hardly ever quote Han.
    pub fn of(text: &str) -> Self {
        if text.chars().any(is_han) {
            return Self::Han;
        }
        let letters = text.chars().filter(|c| c.is_alphabetic()).count();
        let latin = text.chars().filter(|&c| is_latin(c)).count();
        if latin > 0 && 2 * latin >= letters { Self::Latin } else { Self::Other }
    }
}

/// The unified ideographs: the basic block with extension A, and the two planes of later extensions.
pub(crate) fn is_han(c: char) -> bool {
    ('\u{3400}'..='\u{9fff}').contains(&c) || ('\u{20000}'..='\u{3ffff}').contains(&c)
}

/// Letters of Basic Latin to Latin Extended-B, and of Latin Extended Additional, which has Vietnamese.
fn is_latin(c: char) -> bool {
    c.is_alphabetic() && (c <= '\u{24f}' || ('\u{1e00}'..='\u{1eff}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scripts_of_texts() {
        for (text, script) in [
            ("红心", Script::Han),
            ("T恤 (T-shirt)", Script::Han),
            ("a red heart ❤", Script::Latin),
            ("Übergrößenträger, Tiếng Việt", Script::Latin),
            ("3D", Script::Latin),
            ("кот A", Script::Other),
            ("ねこ", Script::Other),
            ("❤ 42", Script::Other),
            ("", Script::Other),
        ] {
            assert_eq!(Script::of(text), script, "{text}");
        }
    }
}
