//! Trains a byte-level BPE on the captions of a data set (Sennrich et al. 2016, arXiv:1508.07909; bytes as in GPT-2).

use serde_json::json;
use tokenizers::models::bpe::BpeTrainer;
use tokenizers::models::{ModelWrapper, TrainerWrapper};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;

use super::{Tokenizer, byte_level_bpe};
use crate::error::{DataError, Result};

/// Every byte is a token, so that every text can be encoded.
const BYTES: usize = 256;

/// Trains a vocabulary of `vocab_size` tokens: 256 bytes and the merges that are most frequent in `texts` (fewer when the
/// texts are too small to merge more). The same texts give the same vocabulary.
///
/// # Errors
/// `vocab_size` is below 256.
pub fn train_bpe(texts: impl Iterator<Item = String> + Send, vocab_size: usize) -> Result<Tokenizer> {
    if vocab_size < BYTES {
        return Err(DataError::VocabSize { size: vocab_size, smallest: BYTES });
    }
    let fail = |e: tokenizers::Error| DataError::Tokenizer(e.to_string());
    let untrained = byte_level_bpe(json!({}), json!([]), json!([]));
    let mut tokenizer = Tokenizer::from_json(untrained).map_err(DataError::Tokenizer)?.inner;
    let bpe = BpeTrainer::builder()
        .vocab_size(vocab_size)
        .show_progress(false)
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build();
    let mut trainer = TrainerWrapper::from(bpe);
    tokenizer.train(&mut trainer, texts).map_err(fail)?;
    let ModelWrapper::BPE(_) = tokenizer.get_model() else {
        return Err(DataError::Tokenizer("training did not give a BPE model".to_owned()));
    };
    Ok(Tokenizer::from_engine(tokenizer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn texts() -> impl Iterator<Item = String> + Send {
        ["red heart", "red apple", "a heart", "红心", "红苹果", "心"]
            .into_iter()
            .cycle()
            .take(60)
            .map(str::to_owned)
    }

    #[test]
    fn frequent_words_become_single_tokens() {
        let tokenizer = train_bpe(texts(), 300).unwrap();
        assert!(tokenizer.vocab_size() <= 300);
        assert_eq!(tokenizer.encode("red heart").unwrap().len(), 2);
        assert_eq!(tokenizer.encode("红心").unwrap().len(), 1);
    }

    #[test]
    fn training_is_reproducible_and_files_round_trip() {
        let (a, b) = (train_bpe(texts(), 300).unwrap(), train_bpe(texts(), 300).unwrap());
        assert_eq!(a.hash().unwrap(), b.hash().unwrap());
        assert_ne!(a.hash().unwrap(), train_bpe(texts(), 260).unwrap().hash().unwrap());
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tokenizer.json");
        a.save(&path).unwrap();
        let loaded = Tokenizer::load(&path).unwrap();
        assert_eq!(loaded.hash().unwrap(), a.hash().unwrap());
        assert_eq!(loaded.encode("红苹果 and more").unwrap(), a.encode("红苹果 and more").unwrap());
    }

    #[test]
    fn too_small_a_vocabulary_is_refused() {
        let error = train_bpe(texts(), 255).err().unwrap().to_string();
        assert_eq!(error, "tokenizer: vocab_size = 255, expected at least 256 (one a byte)");
    }

    #[test]
    fn text_is_composed_first() {
        let tokenizer = train_bpe(texts(), 256).unwrap();
        assert_eq!(tokenizer.encode("e\u{301}").unwrap(), tokenizer.encode("é").unwrap());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_composed_text_round_trips(text in "[\\PC\\s]{0,40}") {
            use tokenizers::{NormalizedString, Normalizer, normalizers::NFC};
            let tokenizer = train_bpe(texts(), 280).unwrap();
            let mut composed = NormalizedString::from(text.as_str());
            NFC.normalize(&mut composed).unwrap();
            let ids = tokenizer.encode(&text).unwrap();
            prop_assert_eq!(tokenizer.decode(&ids).unwrap(), composed.get());
        }
    }
}
