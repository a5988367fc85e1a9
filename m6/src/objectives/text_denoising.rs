//! Text denoising: one span is replaced by one mask, the whole text is to be written (M6, section 3.3).

use rand::Rng;

use super::{Example, Piece, Target, Task};
use crate::model::{Language, Special, Vocab};

/// Share of a text that is masked.
const MASKED_SHARE: f64 = 0.15;

pub(super) fn example(vocab: Vocab, language: Language, ids: Vec<i64>, rng: &mut impl Rng) -> Example {
    let prefix = vec![Piece::Text(mask_span(vocab, &ids, rng))];
    Example { task: Task::TextDenoising, prefix, target: Target::Text { language, ids } }
}

/// The text with one span, 15 % of it and at least one token, replaced by a single mask: the model has to find the
/// span's length as well.
pub(super) fn mask_span(vocab: Vocab, ids: &[i64], rng: &mut impl Rng) -> Vec<i64> {
    if ids.is_empty() {
        return Vec::new();
    }
    let length = ((ids.len() as f64 * MASKED_SHARE).round() as usize).clamp(1, ids.len());
    let start = rng.random_range(0..=ids.len() - length);
    let mut masked = ids[..start].to_vec();
    masked.push(vocab.special(Special::Mask));
    masked.extend_from_slice(&ids[start + length..]);
    masked
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn one_span_of_fifteen_percent_becomes_one_mask() {
        let vocab = Vocab { text: 1000, codes: 4 };
        let mask = vocab.special(Special::Mask);
        for n in [1, 2, 7, 40, 100] {
            let ids: Vec<i64> = (0..n).collect();
            let masked = mask_span(vocab, &ids, &mut ChaCha8Rng::seed_from_u64(n as u64));
            let gone = ((n as f64 * 0.15).round() as usize).max(1);
            assert_eq!(masked.len(), n as usize - gone + 1);
            let at = masked.iter().position(|&id| id == mask).unwrap();
            assert_eq!(masked[..at], ids[..at]);
            assert_eq!(masked[at + 1..], ids[at + gone..]);
        }
    }
}
