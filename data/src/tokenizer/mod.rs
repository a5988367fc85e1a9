//! Texts to token ids and back, for every vocabulary file we read.
//!
//! All of them become one engine, the `tokenizers` crate: a tiktoken or WordPiece file is converted to the `tokenizer.json`
//! that describes it.

mod tiktoken;
mod train;
mod wordpiece;

use std::path::Path;

use serde_json::{Value, json};

use crate::atomic_file::write_atomic;
use crate::error::{DataError, Result};
pub use train::train_bpe;

/// Split pattern of Qwen and Qwen2: words with the punctuation before them, single digits, runs of punctuation, line ends.
const SPLIT_PATTERN: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// A vocabulary with its rules.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    vocab_size: usize,
}

impl Tokenizer {
    /// Loads a `tokenizer.json` (`*.json`), a WordPiece `vocab.txt` (`*.txt`) or Qwen's tiktoken ranks (`*.tiktoken`).
    ///
    /// # Errors
    /// The file is absent, or not what its name says.
    pub fn load(path: &Path) -> Result<Self> {
        let fail = |reason: String| DataError::TokenizerFile { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(DataError::io("read", path))?;
        let text = String::from_utf8(bytes).map_err(|_| fail("not UTF-8 text".to_owned()))?;
        let json = match path.extension().and_then(|e| e.to_str()) {
            Some("json") => serde_json::from_str(&text).map_err(|e| fail(e.to_string())),
            Some("txt") => wordpiece::to_json(&text).map_err(fail),
            Some("tiktoken") => tiktoken::to_json(&text).map_err(fail),
            _ => Err(fail("expected a file named *.json, *.txt (WordPiece) or *.tiktoken".to_owned())),
        }?;
        Self::from_json(json).map_err(fail)
    }

    /// Token ids of `text`. Nothing is added, and the name of a special token in the text is text like any other, so that
    /// no caption or prompt can forge one.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        let encoding =
            self.inner.encode_fast(text, false).map_err(|e| DataError::Tokenizer(e.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The same vocabulary, for which the name of a special token in a text is that token: for texts of a template, never
    /// for what a user has written.
    pub fn with_special_names(mut self) -> Self {
        self.inner.set_encode_special_tokens(false);
        self
    }

    /// Text of `ids`, without special tokens; bytes that are not UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// An id that is not in the vocabulary.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        if let Some(id) = ids.iter().find(|&&id| self.inner.id_to_token(id).is_none()) {
            return Err(DataError::Tokenizer(format!(
                "token id {id} is not in the vocabulary of {}",
                self.vocab_size()
            )));
        }
        self.inner.decode(ids, true).map_err(|e| DataError::Tokenizer(e.to_string()))
    }

    /// One more than the largest token id, special tokens included: the rows that an embedding needs.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Id of a token by its name, such as `<|endoftext|>` or `[SEP]`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.inner.token_to_id(name)
    }

    /// Writes a `tokenizer.json` that appears whole or not at all.
    pub fn save(&self, path: &Path) -> Result<()> {
        write_atomic(path, self.to_json()?.as_bytes())
    }

    /// Identity of the vocabulary and its rules (BLAKE3, hexadecimal): equal exactly when encoding is.
    pub fn hash(&self) -> Result<String> {
        Ok(blake3::hash(self.to_json()?.as_bytes()).to_hex().to_string())
    }

    fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| DataError::Tokenizer(e.to_string()))
    }

    fn from_json(json: Value) -> std::result::Result<Self, String> {
        // The engine's parser takes text and borrows from it, which rules out `serde_json::from_value`.
        let inner: tokenizers::Tokenizer =
            json.to_string().parse().map_err(|e: tokenizers::Error| e.to_string())?;
        Ok(Self::from_engine(inner))
    }

    fn from_engine(mut inner: tokenizers::Tokenizer) -> Self {
        inner.set_encode_special_tokens(true);
        // Published files often pad every text to a fixed length.
        inner.with_padding(None);
        let vocab_size = inner.get_vocab(true).into_values().max().map_or(0, |id| id as usize + 1);
        Self { inner, vocab_size }
    }
}

/// `tokenizer.json` of a byte-level BPE in the manner of Qwen: NFC, [`SPLIT_PATTERN`], bytes written as printable
/// characters.
fn byte_level_bpe(vocab: Value, merges: Value, added_tokens: Value) -> Value {
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false});
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": false},
            byte_level,
        ]},
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            // tiktoken takes a piece that is a token whole, even if merging would not reach it.
            "ignore_merges": true, "vocab": vocab, "merges": merges,
        },
    })
}

/// One entry of `added_tokens`: a special token, found in a text as it stands.
fn special_token(id: usize, content: &str) -> Value {
    json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false,
           "special": true})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(name: &str, text: &[u8]) -> Result<Tokenizer> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        Tokenizer::load(&path)
    }

    #[test]
    fn unusable_files_are_named() {
        let error = |name: &str, text: &[u8]| load(name, text).err().unwrap().to_string();
        assert!(error("vocab.bin", b"").contains("vocab.bin: expected a file named *.json"));
        assert!(error("tokenizer.json", b"{}").contains("tokenizer.json: "));
        assert!(error("tokenizer.json", b"\xff").ends_with("not UTF-8 text"));
        let error = Tokenizer::load(Path::new("absent/tokenizer.json")).err().unwrap().to_string();
        assert!(error.starts_with("cannot read absent/tokenizer.json"), "{error}");
    }

    #[test]
    fn unknown_ids_are_an_error() {
        let tokenizer = train_bpe(["a"].map(str::to_owned).into_iter(), 256).unwrap();
        let error = tokenizer.decode(&[9999]).unwrap_err().to_string();
        assert_eq!(error, "tokenizer: token id 9999 is not in the vocabulary of 256");
    }
}
