//! How the codebook is trained: its part of a run's config.

use std::f64::consts::PI;

use serde::{Deserialize, Serialize};

use crate::bottleneck::Passage;
use crate::config::{ConfigProblem, QuantizerKind};
use crate::loss::LossWeights;

/// How the codebook starts, learns and is kept alive.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CodebookConfig {
    /// Steps of plain autoencoding before there are codes. Those of `normalized` and `nearest` are then made from
    /// encoder outputs.
    pub warmup: u64,
    /// Decay a step of a code's running usage.
    pub decay: f64,
    /// A code is dead below this usage; 1 is an equal share of the batch's positions.
    pub threshold: f64,
    /// Fraction of the run after which dead codes are left alone, so that the decoder can settle; 0 for quantisers
    /// whose codes cannot be put elsewhere one by one (`simvq` and `gumbel`).
    pub until: f64,
    /// How the codebook is made from encoder outputs.
    #[serde(default)]
    pub start: CodebookStart,
    /// Decay an update of the running means that the codes then are of the encoder's rows they were given; without it
    /// they learn by gradient.
    #[serde(default)]
    pub ema: Option<f64>,
    /// How the gradient gets from the decoder's input to the encoder's rows.
    #[serde(default)]
    pub gradient: EncoderGradient,
}

/// How the codebook is made from encoder outputs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CodebookStart {
    /// Outputs drawn at random, with those that are badly served among them.
    #[default]
    Rows,
    /// From there some rounds of k-means (Lloyd 1982).
    KMeans,
}

/// How the gradient gets from the decoder's input to the encoder's rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncoderGradient {
    /// As it is (straight-through, Bengio et al. 2013).
    #[default]
    StraightThrough,
    /// Turned and scaled as a row is on its way to its code (the rotation trick, Fifty et al. 2024).
    Rotation,
    /// Through draws of codes by their logits, of the quantiser `gumbel` alone.
    Gumbel(GumbelConfig),
}

/// Draws of codes by their logits (Gumbel-softmax, Jang et al. 2016; DALL-E, Ramesh et al. 2021). The temperature falls
/// along a cosine.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GumbelConfig {
    /// Whether the decoder is given the drawn code alone (straight-through) or the mean of all by their weights.
    pub hard: bool,
    /// Temperature at the first step with codes.
    pub from: f64,
    /// Temperature at the end of its fall, and from there on.
    pub to: f64,
    /// Fraction of the steps with codes over which it falls.
    pub over: f64,
    /// Weight in the loss of the divergence of the codes' probabilities from equal ones.
    pub kl: f64,
}

impl GumbelConfig {
    /// The temperature when `progress`, 0 to 1, of the steps with codes are done.
    fn temperature(&self, progress: f64) -> f64 {
        let falling = 0.5 * (1.0 + (PI * (progress / self.over).min(1.0)).cos());
        self.to + (self.from - self.to) * falling
    }
}

impl EncoderGradient {
    /// What it comes to when `progress`, 0 to 1, of the steps with codes are done.
    pub(crate) fn passage(&self, progress: f64) -> Passage {
        match self {
            Self::StraightThrough => Passage::StraightThrough,
            Self::Rotation => Passage::Rotation,
            Self::Gumbel(gumbel) => {
                Passage::Gumbel { temperature: gumbel.temperature(progress), hard: gumbel.hard }
            }
        }
    }
}

impl CodebookConfig {
    /// Checks that the keys, and those of the `loss` about codes, mean something for a quantiser of `kind`.
    ///
    /// # Errors
    /// The first key, in full, whose value does not fit.
    pub(crate) fn validate(&self, kind: QuantizerKind, loss: &LossWeights) -> Result<(), ConfigProblem> {
        let check = |fits: bool, key, value: String, expected: &str| {
            if fits {
                Ok(())
            } else {
                Err(ConfigProblem { key, message: format!("{value}, expected {expected}") })
            }
        };
        let with_kind = |text: &str| format!("{text} with the quantiser `{kind}`");
        if let EncoderGradient::Gumbel(gumbel) = self.gradient {
            let expected = with_kind("straight_through or rotation");
            check(kind == QuantizerKind::Gumbel, "codebook.gradient", "gumbel".into(), &expected)?;
            gumbel.validate()?;
            for (key, weight) in [("loss.codebook", loss.codebook), ("loss.commitment", loss.commitment)] {
                check(weight == 0.0, key, weight.to_string(), &with_kind("0"))?;
            }
            check(loss.entropy.is_none(), "loss.entropy", "a table".into(), &with_kind("none"))?;
        } else {
            let expected = with_kind("a table `gumbel`");
            check(kind != QuantizerKind::Gumbel, "codebook.gradient", "no draws".into(), &expected)?;
        }
        if !kind.has_free_codes() {
            check(self.until == 0.0, "codebook.until", self.until.to_string(), &with_kind("0"))?;
            let start = self.start == CodebookStart::Rows;
            check(start, "codebook.start", "kmeans".into(), &with_kind("no start from data"))?;
        }
        if let Some(decay) = self.ema {
            check((0.0..1.0).contains(&decay), "codebook.ema", decay.to_string(), "0 to less than 1")?;
            check(kind.has_free_codes(), "codebook.ema", decay.to_string(), &with_kind("none"))?;
            let weight = loss.codebook;
            check(weight == 0.0, "loss.codebook", weight.to_string(), "0 with `codebook.ema`")?;
        }
        if let Some(entropy) = loss.entropy {
            for (key, value) in
                [("loss.entropy.weight", entropy.weight), ("loss.entropy.temperature", entropy.temperature)]
            {
                check(value > 0.0 && value.is_finite(), key, value.to_string(), "more than 0")?;
            }
        }
        Ok(())
    }
}

impl GumbelConfig {
    fn validate(&self) -> Result<(), ConfigProblem> {
        for (key, value, fits, expected) in [
            ("codebook.gradient.gumbel.from", self.from, self.from > 0.0, "more than 0"),
            ("codebook.gradient.gumbel.to", self.to, self.to > 0.0, "more than 0"),
            (
                "codebook.gradient.gumbel.over",
                self.over,
                self.over > 0.0 && self.over <= 1.0,
                "more than 0, up to 1",
            ),
            ("codebook.gradient.gumbel.kl", self.kl, self.kl >= 0.0, "0 or more"),
        ] {
            if !fits || !value.is_finite() {
                return Err(ConfigProblem { key, message: format!("{value}, expected {expected}") });
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::loss::EntropyLoss;

    const LOSS: LossWeights = LossWeights {
        l1: 1.0,
        l2: 0.0,
        lpips: 0.0,
        gradient: 0.0,
        ssim: 0.0,
        codebook: 0.0,
        commitment: 0.0,
        entropy: None,
    };

    fn config(changes: Value) -> CodebookConfig {
        let mut config = json!({ "warmup": 2, "decay": 0.5, "threshold": 0.1, "until": 0.0 });
        config.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        serde_json::from_value(config).unwrap()
    }

    fn gumbel(changes: Value) -> CodebookConfig {
        let mut gumbel = json!({ "hard": true, "from": 1.0, "to": 0.1, "over": 0.5, "kl": 0.01 });
        gumbel.as_object_mut().unwrap().extend(changes.as_object().unwrap().clone());
        config(json!({ "gradient": { "gumbel": gumbel } }))
    }

    #[test]
    fn keys_that_came_later_have_the_meaning_of_before() {
        let expected = CodebookConfig {
            warmup: 2,
            decay: 0.5,
            threshold: 0.1,
            until: 0.0,
            start: CodebookStart::Rows,
            ema: None,
            gradient: EncoderGradient::StraightThrough,
        };
        assert_eq!(config(json!({})), expected);
        let loss = json!({ "l1": 1.0, "gradient": 0.0, "ssim": 0.0, "codebook": 0.0, "commitment": 0.0 });
        assert_eq!(serde_json::from_value::<LossWeights>(loss).unwrap(), LOSS);
        // Without a word codes would not learn at all.
        let silent = json!({ "l1": 1.0, "gradient": 0.0, "ssim": 0.0, "commitment": 0.0 });
        let message = serde_json::from_value::<LossWeights>(silent).unwrap_err().to_string();
        assert!(message.starts_with("missing field `codebook`"), "{message}");
    }

    #[test]
    fn the_temperature_falls_along_a_cosine_and_stays() {
        let EncoderGradient::Gumbel(gumbel) = gumbel(json!({})).gradient else { panic!("no gumbel") };
        let found = [0.0, 0.25, 0.5, 1.0].map(|progress| gumbel.temperature(progress));
        for (found, expected) in found.into_iter().zip([1.0, 0.55, 0.1, 0.1]) {
            assert!((found - expected).abs() < 1e-12, "{found}, expected {expected}");
        }
    }

    #[test]
    fn keys_without_meaning_for_a_quantiser_are_named() {
        use QuantizerKind::{Gumbel, Nearest, Normalized, SimVq};
        let message = |config: CodebookConfig, kind, loss: LossWeights| {
            let problem = config.validate(kind, &loss).unwrap_err();
            format!("{}: {}", problem.key, problem.message)
        };
        config(json!({ "ema": 0.99, "start": "kmeans", "until": 0.8 })).validate(Normalized, &LOSS).unwrap();
        config(json!({ "gradient": "rotation" })).validate(SimVq, &LOSS).unwrap();
        gumbel(json!({})).validate(Gumbel, &LOSS).unwrap();
        for (config, kind, expected) in [
            (
                gumbel(json!({})),
                Nearest,
                "codebook.gradient: gumbel, expected straight_through or rotation with the quantiser `nearest`",
            ),
            (
                config(json!({})),
                Gumbel,
                "codebook.gradient: no draws, expected a table `gumbel` with the quantiser `gumbel`",
            ),
            (
                config(json!({ "until": 0.5 })),
                SimVq,
                "codebook.until: 0.5, expected 0 with the quantiser `simvq`",
            ),
            (
                config(json!({ "start": "kmeans" })),
                SimVq,
                "codebook.start: kmeans, expected no start from data with the quantiser `simvq`",
            ),
            (
                config(json!({ "ema": 0.9 })),
                SimVq,
                "codebook.ema: 0.9, expected none with the quantiser `simvq`",
            ),
            (config(json!({ "ema": 1.0 })), Nearest, "codebook.ema: 1, expected 0 to less than 1"),
            (
                gumbel(json!({ "from": 0.0 })),
                Gumbel,
                "codebook.gradient.gumbel.from: 0, expected more than 0",
            ),
            (
                gumbel(json!({ "over": 1.5 })),
                Gumbel,
                "codebook.gradient.gumbel.over: 1.5, expected more than 0, up to 1",
            ),
            (gumbel(json!({ "kl": -1.0 })), Gumbel, "codebook.gradient.gumbel.kl: -1, expected 0 or more"),
        ] {
            assert_eq!(message(config, kind, LOSS), expected);
        }
        let entropy =
            |weight, temperature| LossWeights { entropy: Some(EntropyLoss { weight, temperature }), ..LOSS };
        assert_eq!(
            message(config(json!({})), Nearest, entropy(0.1, 0.0)),
            "loss.entropy.temperature: 0, expected more than 0"
        );
        assert_eq!(
            message(gumbel(json!({})), Gumbel, entropy(0.1, 1.0)),
            "loss.entropy: a table, expected none with the quantiser `gumbel`"
        );
        assert_eq!(
            message(gumbel(json!({})), Gumbel, LossWeights { commitment: 0.25, ..LOSS }),
            "loss.commitment: 0.25, expected 0 with the quantiser `gumbel`"
        );
    }

    #[test]
    fn unknown_keys_of_a_gradient_are_named() {
        let text = json!({ "warmup": 2, "decay": 0.5, "threshold": 0.1, "until": 0.0, "gradient": { "gumbel":
            { "hard": true, "from": 1.0, "to": 0.1, "over": 0.5, "kl": 0.01, "speed": 1 } } });
        let message = serde_json::from_value::<CodebookConfig>(text).unwrap_err().to_string();
        assert!(message.starts_with("unknown field `speed`"), "{message}");
    }
}
