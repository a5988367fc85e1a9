//! Choosing the next code from its logits.

use rand::Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a code is chosen: logits are divided by the temperature, the `top_k` most likely codes are kept, of these the
/// most likely ones whose probabilities reach `top_p` together, and one of the rest is drawn.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Below 1 sharpens, above 1 flattens the distribution; 0 takes the most likely code.
    pub temperature: f64,
    /// Codes kept by rank; 0 keeps all.
    pub top_k: usize,
    /// Probability kept (nucleus sampling, Holtzman et al. 2020); 1 keeps all.
    pub top_p: f64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.7, top_k: 256, top_p: 1.0 }
    }
}

impl Sampling {
    /// Checks the settings; they are named as the flags of the command.
    ///
    /// # Errors
    /// When a value is out of its range.
    pub fn validate(&self) -> Result<()> {
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return Err(Error::Usage(format!("--temperature {}: expected 0 or more", self.temperature)));
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return Err(Error::Usage(format!("--top-p {}: expected above 0 and up to 1", self.top_p)));
        }
        Ok(())
    }

    /// The index drawn from a row of logits. Among equal logits the lower index ranks first.
    ///
    /// # Panics
    /// When `logits` is empty.
    pub fn sample(&self, logits: &[f32], rng: &mut impl Rng) -> usize {
        let by_rank = |&a: &usize, &b: &usize| logits[b].total_cmp(&logits[a]).then(a.cmp(&b));
        let mut ranked: Vec<usize> = (0..logits.len()).collect();
        let kept = if self.temperature == 0.0 { 1 } else { self.top_k };
        if kept > 0 && kept < ranked.len() {
            ranked.select_nth_unstable_by(kept - 1, by_rank);
            ranked.truncate(kept);
        }
        ranked.sort_unstable_by(by_rank);
        if ranked.len() == 1 {
            return ranked[0];
        }

        let highest = f64::from(logits[ranked[0]]);
        let weight = |&index: &usize| ((f64::from(logits[index]) - highest) / self.temperature).exp();
        let mut weights: Vec<f64> = ranked.iter().map(weight).collect();
        if self.top_p < 1.0 {
            let nucleus = self.top_p * weights.iter().sum::<f64>();
            let mut sum = 0.0;
            let reached = weights.iter().position(|weight| {
                sum += weight;
                sum >= nucleus
            });
            weights.truncate(reached.map_or(weights.len(), |last| last + 1));
        }
        let mut draw = rng.random::<f64>() * weights.iter().sum::<f64>();
        let drawn = weights.iter().position(|weight| {
            draw -= weight;
            draw < 0.0
        });
        ranked[drawn.unwrap_or(weights.len() - 1)]
    }
}

/// Classifier-free guidance (Ho and Salimans 2021) on logits: `unguided + scale * (guided - unguided)`, left in
/// `guided`. Scale 1 changes nothing, larger scales follow the prompt more closely.
pub fn guide(guided: &mut [f32], unguided: &[f32], scale: f64) {
    for (guided, &unguided) in guided.iter_mut().zip(unguided) {
        *guided = unguided + scale as f32 * (*guided - unguided);
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    const ALL: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0 };
    /// Logits of the probabilities 0.1, 0.4, 0.2, 0.3.
    const PROBABILITIES: [f32; 4] = [0.1, 0.4, 0.2, 0.3];

    /// How often each index comes.
    fn shares(sampling: Sampling, probabilities: &[f32]) -> Vec<f64> {
        const DRAWS: usize = 40_000;
        let logits: Vec<f32> = probabilities.iter().map(|p| p.ln()).collect();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let mut counts = vec![0.0; logits.len()];
        for _ in 0..DRAWS {
            counts[sampling.sample(&logits, &mut rng)] += 1.0 / DRAWS as f64;
        }
        counts
    }

    fn assert_near(found: &[f64], expected: &[f64]) {
        for (a, b) in found.iter().zip(expected) {
            // Five standard deviations of a share of 40,000 draws.
            assert!((a - b).abs() < 0.0125 && (*b > 0.0 || *a == 0.0), "{found:?}, expected {expected:?}");
        }
    }

    #[test]
    fn draws_follow_the_distribution() {
        assert_near(&shares(ALL, &PROBABILITIES), &[0.1, 0.4, 0.2, 0.3]);
    }

    #[test]
    fn temperature_is_a_power_of_the_probabilities() {
        // At temperature 1/2: 1, 16, 4, 9 parts of 30.
        let squared = [1.0 / 30.0, 16.0 / 30.0, 4.0 / 30.0, 9.0 / 30.0];
        assert_near(&shares(Sampling { temperature: 0.5, ..ALL }, &PROBABILITIES), &squared);
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_most_likely() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let greedy = Sampling { temperature: 0.0, ..ALL };
        for _ in 0..20 {
            assert_eq!(greedy.sample(&[0.5, 2.0, -1.0, 2.0], &mut rng), 1);
        }
    }

    #[test]
    fn top_k_keeps_the_highest() {
        let two = [0.0, 4.0 / 7.0, 0.0, 3.0 / 7.0];
        assert_near(&shares(Sampling { top_k: 2, ..ALL }, &PROBABILITIES), &two);
        assert_near(&shares(Sampling { top_k: 9, ..ALL }, &PROBABILITIES), &[0.1, 0.4, 0.2, 0.3]);
    }

    #[test]
    fn top_p_keeps_the_smallest_set_that_reaches_it() {
        let three = [0.0, 4.0 / 9.0, 2.0 / 9.0, 3.0 / 9.0];
        assert_near(&shares(Sampling { top_p: 0.75, ..ALL }, &PROBABILITIES), &three);
        assert_near(&shares(Sampling { top_p: 0.01, ..ALL }, &PROBABILITIES), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn top_p_counts_what_top_k_left() {
        // Of the top two, 4/7 and 3/7, the first alone reaches a half.
        let sampling = Sampling { top_k: 2, top_p: 0.5, ..ALL };
        assert_near(&shares(sampling, &PROBABILITIES), &[0.0, 1.0, 0.0, 0.0]);
    }

    #[test]
    fn impossible_codes_are_never_drawn() {
        assert_near(&shares(ALL, &[0.0, 0.5, 0.0, 0.5]), &[0.0, 0.5, 0.0, 0.5]);
    }

    #[test]
    fn guidance_goes_beyond_the_guided_logits() {
        let mut guided = [1.0, 0.0, -2.0];
        guide(&mut guided, &[0.0, 0.0, 2.0], 3.0);
        assert_eq!(guided, [3.0, 0.0, -10.0]);
        guide(&mut guided, &[5.0, 6.0, 7.0], 1.0);
        assert_eq!(guided, [3.0, 0.0, -10.0]);
    }

    #[test]
    fn values_out_of_range_are_named() {
        let message = |sampling: Sampling| sampling.validate().unwrap_err().to_string();
        assert_eq!(message(Sampling { temperature: -1.0, ..ALL }), "--temperature -1: expected 0 or more");
        assert!(message(Sampling { temperature: f64::NAN, ..ALL }).starts_with("--temperature NaN"));
        assert_eq!(message(Sampling { top_p: 0.0, ..ALL }), "--top-p 0: expected above 0 and up to 1");
        assert!(ALL.validate().is_ok());
    }
}
