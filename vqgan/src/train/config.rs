//! The config of a training run.

use std::path::{Path, PathBuf};

use m6_data::{SkipLimits, Transform};
use m6_run::Schedule;
use m6_runtime::optim::OptimizerConfig;
use serde::{Deserialize, Serialize};

use super::adversarial::DiscriminatorConfig;
use super::range::{fraction, out_of_range};
use crate::codebook::CodebookConfig;
use crate::config::VqganConfig;
use crate::error::{Result, VqganError};
use crate::loss::LossWeights;
use crate::lpips::LpipsConfig;

/// A whole run: what is trained, on what, and how.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Decides the initial weights, the order of the samples and every random choice.
    pub seed: u64,
    /// Folder of the run, relative to the working directory.
    pub run: PathBuf,
    /// `cpu`, `cuda:N` or `auto`.
    pub device: String,
    /// A model folder to start from instead of random weights; the codebook is then taken over too.
    pub init: Option<PathBuf>,
    /// Decay of the running average of the weights, which is what is validated and exported.
    pub ema: f64,
    /// Steps between reports; the only time a step waits for the device.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints to keep.
    pub keep: usize,
    /// Training pictures.
    pub data: DataConfig,
    /// Held-out pictures.
    pub validation: ValidationConfig,
    /// The model.
    pub model: VqganConfig,
    /// Weights of the loss.
    pub loss: LossWeights,
    /// Where the weights of LPIPS are, for runs that take it.
    #[serde(default)]
    pub lpips: Option<LpipsConfig>,
    /// How the codebook starts, learns and is kept alive.
    pub codebook: CodebookConfig,
    /// The discriminator; a run without this table has none.
    pub discriminator: Option<DiscriminatorConfig>,
    /// AdamW of the model.
    pub optimizer: OptimizerConfig,
    /// Steps, batch and learning rate.
    pub schedule: ScheduleConfig,
}

/// Where training pictures come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Shards: files, globs, urls, commands or brace lists.
    pub shards: Vec<String>,
    /// Augmentation; its result has the model's resolution.
    pub transform: Transform,
    /// Threads that decode.
    pub workers: usize,
    /// When pictures that cannot be used end the run.
    #[serde(default)]
    pub skip: SkipLimits,
}

/// Where held-out pictures come from and how often they are looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Shards: files, globs, urls, commands or brace lists.
    pub shards: Vec<String>,
    /// Preparation; its result has the model's resolution.
    pub transform: Transform,
    /// Steps between validations, each with scores and a picture of reconstructions.
    pub every: u64,
    /// How many pictures, from the first.
    pub samples: usize,
}

/// Steps, batch and learning rate.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Updates.
    pub steps: u64,
    /// Pictures in a micro-batch.
    pub batch: usize,
    /// Micro-batches in an update.
    pub accumulation: u64,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Final learning rate as a part of the peak.
    pub min_ratio: f64,
    /// Largest norm of a gradient.
    pub clip: f64,
}

impl TrainConfig {
    /// Learning rates of the model.
    pub(super) fn schedule(&self) -> Schedule {
        let ScheduleConfig { lr, warmup, steps, min_ratio, .. } = self.schedule;
        Schedule { lr, warmup_steps: warmup, total_steps: steps, min_ratio }
    }

    /// First step whose loss goes through the codebook.
    pub(super) fn codes_from(&self) -> u64 {
        if self.init.is_some() { 0 } else { self.codebook.warmup }
    }

    /// First step after which dead codes are left alone.
    pub(super) fn revive_until(&self) -> u64 {
        fraction(self.schedule.steps, self.codebook.until)
    }

    /// Checks what the types do not; `path` is the config file, for messages.
    ///
    /// # Errors
    /// The first key whose value does not fit.
    pub(super) fn validate(&self, path: &Path) -> Result<()> {
        let problem = |key: &str, message: String| {
            Err(VqganError::Config { path: path.to_owned(), key: key.to_owned(), message })
        };
        if let Err(bad) = self.model.validate() {
            return problem(&format!("model.{}", bad.key), bad.message);
        }
        for (key, value) in [
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
            ("keep", self.keep as u64),
            ("data.workers", self.data.workers as u64),
            ("validation.every", self.validation.every),
            ("validation.samples", self.validation.samples as u64),
            ("schedule.steps", self.schedule.steps),
            ("schedule.batch", self.schedule.batch as u64),
            ("schedule.accumulation", self.schedule.accumulation),
        ] {
            if value == 0 {
                return problem(key, "0, expected at least 1".into());
            }
        }
        if let Err(message) = self.data.skip.validate() {
            return problem("data.skip", message);
        }
        if self.loss.lpips > 0.0 && self.lpips.as_ref().is_none_or(|lpips| lpips.weights.is_empty()) {
            let weight = self.loss.lpips;
            return problem("loss.lpips", format!("{weight}, expected a table [lpips] with its weights"));
        }
        if let Err(message) = self.optimizer.validate() {
            return problem("optimizer", message);
        }
        let side = self.model.resolution;
        if let Some(Err(bad)) = self.discriminator.map(|discriminator| discriminator.validate(side)) {
            return problem(&format!("discriminator.{}", bad.key), bad.message);
        }
        let numbers = [
            ("ema", self.ema, 1.0),
            ("loss.l1", self.loss.l1, f64::MAX),
            ("loss.l2", self.loss.l2, f64::MAX),
            ("loss.lpips", self.loss.lpips, f64::MAX),
            ("loss.gradient", self.loss.gradient, f64::MAX),
            ("loss.ssim", self.loss.ssim, f64::MAX),
            ("loss.codebook", self.loss.codebook, f64::MAX),
            ("loss.commitment", self.loss.commitment, f64::MAX),
            ("codebook.decay", self.codebook.decay, 1.0),
            ("codebook.threshold", self.codebook.threshold, 1.0),
            ("codebook.until", self.codebook.until, 1.0),
            ("schedule.lr", self.schedule.lr, f64::MAX),
            ("schedule.min_ratio", self.schedule.min_ratio, 1.0),
            ("schedule.clip", self.schedule.clip, f64::MAX),
        ];
        for (key, value, high) in numbers {
            if let Some(message) = out_of_range(value, high) {
                return problem(key, message);
            }
        }
        if let Err(bad) = self.codebook.validate(self.model.quantizer, &self.loss) {
            return problem(bad.key, bad.message);
        }
        if self.codes_from() >= self.schedule.steps {
            let message = format!(
                "{}, expected less than `schedule.steps` = {}",
                self.codebook.warmup, self.schedule.steps
            );
            return problem("codebook.warmup", message);
        }
        for (key, transform) in
            [("data.transform", &self.data.transform), ("validation.transform", &self.validation.transform)]
        {
            if transform.output_size().map(|(w, h)| (i64::from(w), i64::from(h))) != Some((side, side)) {
                let message = format!(
                    "expected pictures of {side}x{side}, such as `resize:{side} | center_crop:{side}`"
                );
                return problem(key, message);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shipped(name: &str) -> TrainConfig {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/vqgan").join(name);
        let config = m6_run::config::load::<TrainConfig>(&path, &[]).unwrap().config;
        config.validate(&path).unwrap();
        config
    }

    #[test]
    fn shipped_configs_are_whole() {
        let emoji = shipped("emoji.toml");
        assert_eq!((emoji.model.downsample(), emoji.model.grid()), (8, 16));
        for name in ["tiny.toml", "photos.toml", "vq16.toml"] {
            shipped(name);
        }
    }

    #[test]
    fn bad_values_name_file_key_and_expectation() {
        let message = |change: fn(&mut TrainConfig)| {
            let mut config = shipped("tiny.toml");
            change(&mut config);
            config.validate(Path::new("run.toml")).unwrap_err().to_string()
        };
        assert_eq!(
            message(|c| c.schedule.batch = 0),
            "run.toml: key `schedule.batch`: 0, expected at least 1"
        );
        assert_eq!(message(|c| c.ema = 1.5), "run.toml: key `ema`: 1.5, expected 0 to 1");
        assert_eq!(
            message(|c| c.schedule.lr = f64::NAN),
            "run.toml: key `schedule.lr`: NaN, expected 0 or more"
        );
        assert_eq!(
            message(|c| c.codebook.warmup = c.schedule.steps),
            "run.toml: key `codebook.warmup`: 200, expected less than `schedule.steps` = 200"
        );
        assert_eq!(
            message(|c| c.loss.lpips = 1.0),
            "run.toml: key `loss.lpips`: 1, expected a table [lpips] with its weights"
        );
        assert_eq!(
            message(|c| c.discriminator.as_mut().unwrap().layers = 4),
            "run.toml: key `discriminator.layers`: 4, expected 1 to 3 at 32 pixels"
        );
        assert_eq!(
            message(|c| c.codebook.ema = Some(0.9)),
            "run.toml: key `loss.codebook`: 1, expected 0 with `codebook.ema`"
        );
        assert!(
            message(|c| c.model.resolution = 33)
                .contains("key `model.resolution`: 33, expected a multiple of")
        );
        assert!(
            message(|c| c.data.transform = "resize:64".parse().unwrap())
                .contains("key `data.transform`: expected")
        );
    }
}
