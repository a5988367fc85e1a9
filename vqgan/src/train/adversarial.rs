//! The table `[discriminator]` of a run.

use serde::{Deserialize, Serialize};

use super::range::{fraction, out_of_range};
use crate::augment::AugmentConfig;
use crate::config::ConfigProblem;
use crate::discriminator::{AdversarialLoss, DiscriminatorNorm};

/// Layers of stride 2 that pictures of ordinary sizes have room for.
const MAX_LAYERS: i64 = 4;
/// Side that they have to leave: each of the two convolutions after them takes one pixel of it.
const MIN_SIDE: i64 = 3;

/// The adversarial part of the loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiscriminatorConfig {
    /// Layers of stride 2: 2 at 64 to 128 pixels, 3 at 256.
    pub layers: i64,
    /// What holds its activations in bounds.
    #[serde(default)]
    pub norm: DiscriminatorNorm,
    /// What discriminator and model minimise.
    #[serde(default)]
    pub loss: AdversarialLoss,
    /// Learning rate, constant.
    pub lr: f64,
    /// Fraction of the run after which the discriminator is trained.
    pub start: f64,
    /// Steps it is trained alone before the model sees it.
    pub alone: u64,
    /// Steps over which its weights in the loss then rise to their values.
    pub ramp: u64,
    /// Weight of the adversarial loss.
    pub weight: f64,
    /// Where given, the weight of the adversarial loss is adaptive (VQGAN, Esser et al. 2021): multiplied by the length
    /// of the reconstruction loss's gradient at the decoder's last kernel over that of its own, and at most by this.
    #[serde(default)]
    pub adaptive_max: Option<f64>,
    /// Weight of the distance of its activations.
    pub feature_matching: f64,
    /// How what it sees is changed.
    #[serde(default)]
    pub augment: AugmentConfig,
    /// Weight of LeCam regularisation (Tseng et al. 2021) in what the discriminator minimises.
    #[serde(default)]
    pub lecam: f64,
    /// Weight of R1 (Mescheder et al. 2018) in what the discriminator minimises, which is half of it times the squared
    /// length of the gradient of a real picture's score, the mean of those of its patches.
    #[serde(default)]
    pub r1: f64,
    /// Steps between those with R1, whose weight is then as many times as large (Karras et al. 2020).
    #[serde(default = "r1_every")]
    pub r1_every: u64,
}

fn r1_every() -> u64 {
    16
}

impl DiscriminatorConfig {
    /// Whether the discriminator is trained at `step` of `steps`.
    pub(super) fn is_on(&self, step: u64, steps: u64) -> bool {
        step >= fraction(steps, self.start)
    }

    /// By how much the model's loss listens to it at `step` of `steps`, 0 to 1.
    pub(super) fn ratio(&self, step: u64, steps: u64) -> f64 {
        let heard_from = fraction(steps, self.start) + self.alone;
        if step < heard_from {
            return 0.0;
        }
        ((step - heard_from + 1) as f64 / self.ramp.max(1) as f64).min(1.0)
    }

    /// The weight of R1 at `step`, where the step has it.
    pub(super) fn r1_weight(&self, step: u64) -> Option<f64> {
        let due = self.r1 > 0.0 && (step + 1).is_multiple_of(self.r1_every);
        due.then_some(self.r1 / 2.0 * self.r1_every as f64)
    }

    /// Checks what the types do not, for pictures of side `resolution`.
    ///
    /// # Errors
    /// The first key of the table whose value does not fit.
    pub(super) fn validate(&self, resolution: i64) -> Result<(), ConfigProblem> {
        let problem = |key, message| Err(ConfigProblem { key, message });
        for (key, value, high) in [
            ("lr", self.lr, f64::MAX),
            ("start", self.start, 1.0),
            ("weight", self.weight, f64::MAX),
            ("feature_matching", self.feature_matching, f64::MAX),
            ("lecam", self.lecam, f64::MAX),
            ("r1", self.r1, f64::MAX),
        ] {
            if let Some(message) = out_of_range(value, high) {
                return problem(key, message);
            }
        }
        let most = (1..=MAX_LAYERS).rev().find(|layers| resolution >> layers >= MIN_SIDE).unwrap_or(0);
        if !(1..=most).contains(&self.layers) {
            let message = format!("{}, expected 1 to {most} at {resolution} pixels", self.layers);
            return problem("layers", message);
        }
        if self.r1_every == 0 {
            return problem("r1_every", "0, expected at least 1".into());
        }
        match self.adaptive_max {
            Some(max) if !(max > 0.0 && max.is_finite()) => {
                problem("adaptive_max", format!("{max}, expected more than 0"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(super) mod tests {
    use m6_runtime::Params;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::discriminator::Discriminator;

    /// One with every key that has no default.
    pub(in crate::train) fn plain() -> DiscriminatorConfig {
        let table =
            "layers = 2\nlr = 1e-4\nstart = 0.5\nalone = 10\nramp = 4\nweight = 0.1\nfeature_matching = 1.0";
        toml::from_str(table).unwrap()
    }

    #[test]
    fn it_learns_alone_and_is_then_heard_more_and_more() {
        let d = plain();
        assert!(!d.is_on(49, 100) && d.is_on(50, 100));
        let ratios: Vec<f64> = [59, 60, 61, 63, 64].map(|step| d.ratio(step, 100)).to_vec();
        assert_eq!(ratios, [0.0, 0.25, 0.5, 1.0, 1.0]);
    }

    #[test]
    fn keys_that_came_later_change_nothing_where_they_are_not_given() {
        let d = plain();
        assert_eq!(d.augment, AugmentConfig { colour: true, translation: true, cutout: true });
        assert_eq!(d.norm, DiscriminatorNorm::Group);
        assert_eq!((d.loss, d.adaptive_max, d.lecam), (AdversarialLoss::Hinge, None, 0.0));
        assert!((0..100).all(|step| d.r1_weight(step).is_none()));
    }

    #[test]
    fn r1_comes_every_nth_step_with_n_times_its_weight() {
        let d = DiscriminatorConfig { r1: 10.0, r1_every: 4, ..plain() };
        let weights: Vec<Option<f64>> = (0..9).map(|step| d.r1_weight(step)).collect();
        let (none, due) = (None, Some(20.0));
        assert_eq!(weights, [none, none, none, due, none, none, none, due, none]);
    }

    #[test]
    fn bad_values_are_named() {
        let message = |config: DiscriminatorConfig| {
            let problem = config.validate(128).unwrap_err();
            format!("{}: {}", problem.key, problem.message)
        };
        plain().validate(128).unwrap();
        assert_eq!(message(DiscriminatorConfig { start: 2.0, ..plain() }), "start: 2, expected 0 to 1");
        assert_eq!(
            message(DiscriminatorConfig { layers: 5, ..plain() }),
            "layers: 5, expected 1 to 4 at 128 pixels"
        );
        assert_eq!(message(DiscriminatorConfig { lecam: -1.0, ..plain() }), "lecam: -1, expected 0 or more");
        assert_eq!(message(DiscriminatorConfig { r1: f64::NAN, ..plain() }), "r1: NaN, expected 0 or more");
        assert_eq!(
            message(DiscriminatorConfig { r1_every: 0, ..plain() }),
            "r1_every: 0, expected at least 1"
        );
        let adaptive = |max| message(DiscriminatorConfig { adaptive_max: Some(max), ..plain() });
        assert_eq!(adaptive(0.0), "adaptive_max: 0, expected more than 0");
        assert_eq!(adaptive(f64::NAN), "adaptive_max: NaN, expected more than 0");
    }

    #[test]
    fn as_many_layers_are_taken_as_pictures_have_room_for() {
        for (resolution, most) in [(16, 2), (24, 3), (32, 3), (48, 4)] {
            let fits = |layers| DiscriminatorConfig { layers, ..plain() }.validate(resolution).is_ok();
            assert!(fits(most) && !fits(most + 1), "{resolution}");
            let discriminator =
                Discriminator::new(&Params::new(Device::Cpu, 1), most, DiscriminatorNorm::Group);
            let x = Tensor::zeros([1, 3, resolution, resolution], (Kind::Float, Device::Cpu));
            let scores = discriminator.forward(&x).scores();
            assert!(scores.isfinite().all().int64_value(&[]) == 1, "{resolution}");
        }
    }
}
