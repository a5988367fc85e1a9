//! One vocabulary: text ids, then special ids, then image codes.

use m6_data::Script;
use serde::{Deserialize, Serialize};

/// Ids with a meaning of their own, placed between text and codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// Stands for a masked span in denoising.
    Mask,
    /// The whole prompt of an unguided picture.
    Null,
    /// Begins a target text in English.
    English,
    /// Begins a target text in Chinese.
    Chinese,
    /// Ends a target text.
    EndOfText,
    /// Begins a picture's codes.
    BeginOfImage,
}

const SPECIALS: i64 = 6;

/// Sizes of the vocabulary's parts, and the ids that follow from them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vocab {
    /// Size of the text tokenizer.
    pub text: i64,
    /// Size of the image codebook; 0 in a language model, whose only ids are those of its text tokenizer.
    pub codes: i64,
}

impl Vocab {
    /// Of a model that knows nothing but text.
    pub fn language(text: i64) -> Self {
        Self { text, codes: 0 }
    }

    /// Whether there is nothing but text.
    pub fn is_language(&self) -> bool {
        self.codes == 0
    }

    /// Id of a special token.
    pub fn special(&self, special: Special) -> i64 {
        self.text + special as i64
    }

    /// Id of an image code.
    pub fn code(&self, code: u32) -> i64 {
        self.text_rows() + i64::from(code)
    }

    /// Rows of the text head: text and special ids.
    pub fn text_rows(&self) -> i64 {
        if self.is_language() { self.text } else { self.text + SPECIALS }
    }

    /// Rows of the code head: the codes, then the end of the image.
    pub fn code_rows(&self) -> i64 {
        self.codes + 1
    }

    /// The code head's row that ends an image.
    pub fn end_of_image(&self) -> i64 {
        self.codes
    }

    /// Rows of the input table: everything that can stand in a sequence.
    pub fn rows(&self) -> i64 {
        self.text_rows() + self.codes
    }
}

/// The language of a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Language {
    /// English.
    En,
    /// Chinese.
    Zh,
}

impl Language {
    /// The token that begins a target text in this language.
    pub fn start(self) -> Special {
        match self {
            Self::En => Special::English,
            Self::Zh => Special::Chinese,
        }
    }

    /// The language of a text by its script: Chinese where it has a Han character.
    pub fn of(text: &str) -> Self {
        match Script::of(text) {
            Script::Han => Self::Zh,
            Script::Latin | Script::Other => Self::En,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_do_not_overlap() {
        let vocab = Vocab { text: 100, codes: 8 };
        assert_eq!(vocab.special(Special::Mask), 100);
        assert_eq!(vocab.special(Special::BeginOfImage), vocab.text_rows() - 1);
        assert_eq!(vocab.code(0), vocab.text_rows());
        assert_eq!(vocab.code(7), vocab.rows() - 1);
    }

    #[test]
    fn a_language_model_has_the_rows_of_its_tokenizer() {
        let vocab = Vocab::language(100);
        assert_eq!((vocab.text_rows(), vocab.rows()), (100, 100));
    }

    #[test]
    fn language_by_script() {
        assert_eq!(Language::of("红心"), Language::Zh);
        assert_eq!(Language::of("a red heart ❤"), Language::En);
    }
}
