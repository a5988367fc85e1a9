//! WordPiece vocabularies: BERT's `vocab.txt`, one token a line (Devlin et al. 2019, arXiv:1810.04805).

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::special_token;

const UNKNOWN: &str = "[UNK]";
const SPECIAL: [&str; 5] = ["[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]"];
/// BERT's limit: longer words become [`UNKNOWN`].
const MAX_WORD_CHARS: usize = 100;
/// BERT writes a space between any two words; between two Chinese characters there is none.
const SPACE_IN_CHINESE: &str = r"(?<=[\p{Han}，。、！？：；]) (?=[\p{Han}，。、！？：；])";

/// The `tokenizer.json` of an uncased BERT with this vocabulary.
pub(super) fn to_json(text: &str) -> Result<Value, String> {
    let mut lines: HashMap<&str, usize> = HashMap::new();
    let mut vocab = Map::new();
    for (id, line) in text.strip_suffix('\n').unwrap_or(text).split('\n').enumerate() {
        let token = line.strip_suffix('\r').unwrap_or(line);
        if let Some(first) = lines.insert(token, id) {
            return Err(format!(
                "lines {} and {} are both \"{token}\", expected every token once",
                first + 1,
                id + 1
            ));
        }
        vocab.insert(token.to_owned(), id.into());
    }
    if !lines.contains_key(UNKNOWN) {
        return Err(format!("no line {UNKNOWN}, expected a WordPiece vocabulary with one token a line"));
    }
    let added: Vec<Value> =
        SPECIAL.iter().filter_map(|name| Some(special_token(*lines.get(name)?, name))).collect();
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": {"type": "BertNormalizer", "clean_text": true, "handle_chinese_chars": true, "strip_accents": null,
                       "lowercase": true},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": null,
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "WordPiece", "prefix": "##", "cleanup": true},
            {"type": "Fuse"},
            {"type": "Replace", "pattern": {"Regex": SPACE_IN_CHINESE}, "content": ""},
        ]},
        "model": {"type": "WordPiece", "unk_token": UNKNOWN, "continuing_subword_prefix": "##",
                  "max_input_chars_per_word": MAX_WORD_CHARS, "vocab": vocab},
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tokenizer::Tokenizer;

    const VOCAB: &str = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\n红\n心\nheart\nhear\n##s\n,\ne\n";

    fn tokenizer() -> Tokenizer {
        Tokenizer::from_json(to_json(VOCAB).unwrap()).unwrap()
    }

    #[test]
    fn words_pieces_and_chinese_characters() {
        let tokenizer = tokenizer();
        assert_eq!(tokenizer.vocab_size(), 12);
        assert_eq!(tokenizer.encode("红心, Hearts é").unwrap(), [5, 6, 10, 7, 9, 11]);
        assert_eq!(tokenizer.encode("xyz").unwrap(), [1]);
        assert_eq!(tokenizer.decode(&[2, 5, 6, 7, 9, 3]).unwrap(), "红心 hearts");
        assert_eq!(tokenizer.token_id("[SEP]"), Some(3));
    }

    #[test]
    fn names_of_special_tokens_are_text() {
        assert!(!tokenizer().encode("[SEP]").unwrap().contains(&3));
    }

    #[test]
    fn files_of_another_kind_are_refused() {
        assert!(to_json("a\nb\na\n").unwrap_err().contains("lines 1 and 3 are both \"a\""));
        assert!(to_json("some prose\n").unwrap_err().contains("no line [UNK]"));
    }
}
