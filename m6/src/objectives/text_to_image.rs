//! Text to image: the codes of the image tokenizer, predicted in row-major order after the prompt.

use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{Example, Piece, Target, Task};
use crate::model::{Special, Vocab};

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
}

impl Default for TextToImage {
    fn default() -> Self {
        Self { weight: 0.0, drop_prompt: 0.1, noise: 0.0 }
    }
}

impl TextToImage {
    pub(super) fn validate(&self) -> Result<(), String> {
        for (key, value) in [("drop_prompt", self.drop_prompt), ("noise", self.noise)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(format!("tasks.text_to_image.{key} = {value}: expected 0 to 1"));
            }
        }
        Ok(())
    }

    pub(super) fn example(
        &self,
        vocab: Vocab,
        prompt: Vec<i64>,
        codes: Vec<u32>,
        rng: &mut impl Rng,
    ) -> Example {
        let prompt = if rng.random_bool(self.drop_prompt) { null_prompt(vocab) } else { prompt };
        let random = vocab.codes as u32;
        let seen = codes
            .iter()
            .map(|&code| if rng.random_bool(self.noise) { rng.random_range(0..random) } else { code })
            .collect();
        let prefix = vec![Piece::Text(prompt)];
        Example { task: Task::TextToImage, prefix, target: Target::Codes { seen, codes } }
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
    fn noise_and_dropped_prompts_come_as_often_as_asked_and_labels_stay_true() {
        let vocab = Vocab { text: 50, codes: 16 };
        let task = TextToImage { weight: 1.0, drop_prompt: 0.25, noise: 0.5 };
        let codes: Vec<u32> = (0..16).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let (mut dropped, mut changed) = (0, 0);
        const ROUNDS: usize = 400;
        for _ in 0..ROUNDS {
            let example = task.example(vocab, vec![1, 2, 3], codes.clone(), &mut rng);
            let Target::Codes { seen, codes: labels } = &example.target else { panic!("codes") };
            assert_eq!(*labels, codes);
            changed += seen.iter().zip(&codes).filter(|(a, b)| a != b).count();
            let Piece::Text(prompt) = &example.prefix[0] else { panic!("text") };
            dropped += usize::from(*prompt == null_prompt(vocab));
        }
        // Half are redrawn, one in sixteen of those to the same code.
        let changed = changed as f64 / (ROUNDS * 16) as f64;
        assert!((changed - 0.5 * 15.0 / 16.0).abs() < 0.03, "{changed}");
        assert!((dropped as f64 / ROUNDS as f64 - 0.25).abs() < 0.08, "{dropped}");
    }
}
