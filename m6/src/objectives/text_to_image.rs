//! Text to image: the codes of the image tokenizer, predicted after the prompt.

use rand::Rng;
use rand::seq::SliceRandom;
use serde::{Deserialize, Serialize};

use super::{Example, Piece, Target, Task};
use crate::model::{CodeOrder, Special, Vocab};

/// Share and settings of the task.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TextToImage {
    /// Share of the examples.
    pub weight: f64,
    /// How often the whole prompt is dropped, for classifier-free guidance (Ho and Salimans 2021).
    pub drop_prompt: f64,
    /// Share of the seen codes that are replaced by random ones (taming's `pkeep`): the model learns to go on
    /// from pictures that are not perfect, as its own are.
    pub noise: f64,
    /// Share of the pictures whose codes come in random order instead of the model's (Yu et al. 2024, RAR): where few
    /// codes are known, the prompt has to tell what is at any place.
    pub shuffled: f64,
}

impl Default for TextToImage {
    fn default() -> Self {
        Self { weight: 0.0, drop_prompt: 0.1, noise: 0.0, shuffled: 0.0 }
    }
}

impl TextToImage {
    pub(super) fn validate(&self) -> Result<(), String> {
        let shares = [("drop_prompt", self.drop_prompt), ("noise", self.noise), ("shuffled", self.shuffled)];
        for (key, value) in shares {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("tasks.text_to_image.{key} = {value}: expected 0 to 1"));
            }
        }
        Ok(())
    }

    /// The example of a prompt and a picture's codes in row-major order.
    pub(super) fn example(
        &self,
        vocab: Vocab,
        prompt: Vec<i64>,
        codes: &[u32],
        order: CodeOrder,
        rng: &mut impl Rng,
    ) -> Example {
        let mut places = order.places((codes.len() as i64).isqrt());
        // No draw where nothing is shuffled: the examples of a run without it stay what they were.
        if self.shuffled > 0.0 && rng.random_bool(self.shuffled) {
            places.shuffle(rng);
        }
        let codes: Vec<u32> = places.iter().map(|&place| codes[place as usize]).collect();
        let prompt = if rng.random_bool(self.drop_prompt) { null_prompt(vocab) } else { prompt };
        let random = vocab.codes as u32;
        let seen = codes
            .iter()
            .map(|&code| if rng.random_bool(self.noise) { rng.random_range(0..random) } else { code })
            .collect();
        let prefix = vec![Piece::Text(prompt)];
        Example { task: Task::TextToImage, prefix, target: Target::Codes { seen, codes, places } }
    }
}

/// The prompt of an unguided picture.
pub fn null_prompt(vocab: Vocab) -> Vec<i64> {
    vec![vocab.special(Special::Null)]
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn noise_order_and_dropped_prompts_come_as_often_as_asked_and_labels_stay_true() {
        let vocab = Vocab { text: 50, codes: 16 };
        let task = TextToImage { weight: 1.0, drop_prompt: 0.25, noise: 0.5, shuffled: 0.75 };
        let codes: Vec<u32> = (0..16).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut dropped, mut changed, mut shuffled) = (0, 0, 0);
        const ROUNDS: usize = 400;
        for _ in 0..ROUNDS {
            let example = task.example(vocab, vec![1, 2, 3], &codes, CodeOrder::Rows, &mut rng);
            let Target::Codes { seen, codes: labels, places } = &example.target else { panic!("codes") };
            let mut in_place = vec![u32::MAX; codes.len()];
            for (label, place) in labels.iter().zip(places) {
                in_place[*place as usize] = *label;
            }
            assert_eq!(in_place, codes);
            shuffled += usize::from(*labels != codes);
            changed += seen.iter().zip(labels).filter(|(a, b)| a != b).count();
            let Piece::Text(prompt) = &example.prefix[0] else { panic!("text") };
            dropped += usize::from(*prompt == null_prompt(vocab));
        }
        // Half are redrawn, one in sixteen of those to the same code.
        let changed = changed as f64 / (ROUNDS * 16) as f64;
        assert!((changed - 0.5 * 15.0 / 16.0).abs() < 0.03, "{changed}");
        assert!((dropped as f64 / ROUNDS as f64 - 0.25).abs() < 0.08, "{dropped}");
        assert!((shuffled as f64 / ROUNDS as f64 - 0.75).abs() < 0.08, "{shuffled}");
    }
}
