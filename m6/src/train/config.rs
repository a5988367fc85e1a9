//! The settings of a training run, read from TOML.

use std::path::PathBuf;

use m6_runtime::FloatDtype;
use m6_runtime::merging::MergingConfig;
use m6_runtime::optim::OptimizerConfig;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::generate::{DrawRequest, Sampling};
use crate::model::ModelConfig;
use crate::objectives::{DataConfig, SourceConfig, TasksConfig};

/// A whole run: model, data, training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainConfig {
    /// Folder of the run.
    pub run: PathBuf,
    /// Seed of weights, order, augmentation and dropout.
    pub seed: u64,
    /// `cpu`, `auto` or `cuda:N`.
    pub device: String,
    /// Folder of the image tokenizer.
    pub vqgan: PathBuf,
    /// A model folder whose weights are the start, in place of fresh ones.
    #[serde(default)]
    pub init: Option<PathBuf>,
    /// Weights of the network that `model.patches` takes trained, under torchvision's names. Not read where the run starts
    /// from a model, which has them.
    #[serde(default)]
    pub extractor: Option<PathBuf>,
    /// Text tokenizer.
    pub tokenizer: TokenizerConfig,
    /// The transformer.
    pub model: ModelConfig,
    /// Training data.
    pub data: DataConfig,
    /// Shares of the tasks, for sources without their own.
    pub tasks: TasksConfig,
    /// Length, batch and learning rate.
    pub schedule: ScheduleConfig,
    /// Whether blocks keep their input alone and are computed again for their gradients: less memory, more time.
    #[serde(default)]
    pub recompute: bool,
    /// The numbers in which tables and matrices are kept. In bf16 they have no float32 masters: two bytes a weight in place of
    /// six on a GPU. AdamW rounds them by lot, so that small updates are not lost (Gupta et al. 2015). Vectors stay float32.
    #[serde(default)]
    pub weights: FloatDtype,
    /// AdamW, and Muon beside it.
    #[serde(default)]
    pub optimizer: OptimizerConfig,
    /// Updates that are merged with what tuning had made of a model before; needs `init`, the tuned model.
    #[serde(default)]
    pub merging: Option<RunMergingConfig>,
    /// Decay of the averaged weights, which are the ones that are evaluated and exported. With 0 these are the last weights,
    /// and nothing more is kept.
    pub ema: f64,
    /// Validation data and how often it is used.
    #[serde(default)]
    pub validation: Option<ValidationConfig>,
    /// Pictures drawn while training.
    #[serde(default)]
    pub samples: Option<SamplesConfig>,
    /// Steps between progress lines and rows of metrics.
    pub log_every: u64,
    /// Steps between checkpoints.
    pub checkpoint_every: u64,
    /// Checkpoints that stay on disk.
    pub keep: usize,
}

/// Where the text tokenizer comes from: one of the two.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TokenizerConfig {
    /// A `tokenizer.json`, a WordPiece `vocab.txt` or a tiktoken file.
    #[serde(default)]
    pub file: Option<PathBuf>,
    /// Trains a byte-level BPE of this size on the captions and prompts.
    #[serde(default)]
    pub train: Option<usize>,
}

/// Online merging; see [`m6_runtime::merging`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunMergingConfig {
    /// Folder of the model that `init` was tuned from.
    pub base: PathBuf,
    /// Weight of what tuning had changed, beside `1 - alpha` of the update.
    #[serde(default = "alpha")]
    pub alpha: f64,
    /// Share of the weights that an update reaches.
    #[serde(default = "reserve")]
    pub reserve: f64,
}

fn alpha() -> f64 {
    MergingConfig::default().alpha
}

fn reserve() -> f64 {
    MergingConfig::default().reserve
}

impl RunMergingConfig {
    /// How updates are merged.
    pub fn settings(&self) -> MergingConfig {
        MergingConfig { alpha: self.alpha, reserve: self.reserve }
    }
}

/// Length, batch and learning rate of a run.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// Updates.
    pub steps: u64,
    /// Tokens of one micro-batch, at most.
    pub tokens: usize,
    /// Micro-batches of one update, each of examples of its own.
    pub accumulation: u64,
    /// Highest learning rate.
    pub lr: f64,
    /// Steps of linear warm-up.
    pub warmup: u64,
    /// Last learning rate as a share of the highest.
    pub min_ratio: f64,
    /// Largest global norm of the gradients.
    pub clip: f64,
}

/// Validation while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValidationConfig {
    /// Held-out shards.
    pub shards: Vec<String>,
    /// The source of training data whose texts and tasks they share; may be absent where there is only one.
    #[serde(default)]
    pub source: Option<String>,
    /// Steps between validations.
    pub every: u64,
    /// Examples of each task.
    pub examples: u64,
}

/// Pictures drawn while training.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SamplesConfig {
    /// Steps between grids.
    pub every: u64,
    /// One row of pictures each.
    pub prompts: Vec<String>,
    /// Pictures of each prompt.
    pub count: usize,
    /// Classifier-free guidance.
    pub guidance: f64,
    /// Sampling of the codes.
    pub sampling: Sampling,
}

impl SamplesConfig {
    /// What to draw.
    pub fn request(&self, seed: u64) -> DrawRequest {
        let Self { prompts, count, guidance, sampling, .. } = self.clone();
        DrawRequest { prompts, count, best_of: 1, seed, sampling, guidance }
    }
}

impl TrainConfig {
    /// The tasks that a source serves.
    pub fn tasks_of<'a>(&'a self, source: &'a SourceConfig) -> &'a TasksConfig {
        source.tasks.as_ref().unwrap_or(&self.tasks)
    }

    /// The source whose texts and tasks a validation is about.
    ///
    /// # Errors
    /// When there is no such source, or several and none is named.
    pub fn validated_source(&self, validation: &ValidationConfig) -> Result<(&str, &SourceConfig)> {
        let sources = &self.data.sources;
        let names = || sources.keys().map(String::as_str).collect::<Vec<_>>().join(", ");
        let problem = match &validation.source {
            Some(name) => match sources.get_key_value(name) {
                Some((name, source)) => return Ok((name, source)),
                None => format!("validation.source = \"{name}\": expected one of {}", names()),
            },
            None => match sources.iter().next() {
                Some((name, source)) if sources.len() == 1 => return Ok((name, source)),
                _ => format!("validation.source is missing: expected one of {}", names()),
            },
        };
        Err(Error::Usage(problem))
    }

    fn validate_sources(&self) -> Result<()> {
        self.tasks.validate().map_err(Error::Usage)?;
        if self.data.sources.is_empty() {
            return Err(Error::Usage("data.sources: expected at least one source".into()));
        }
        self.data.skip.validate().map_err(|problem| Error::Usage(format!("data.skip.{problem}")))?;
        for (name, source) in &self.data.sources {
            let tasks = self.tasks_of(source);
            let at = |problem: String| Error::Usage(format!("data.sources.{name}.{problem}"));
            source.validate(tasks).map_err(at)?;
            if tasks.text_to_image.shuffled > 0.0 && !self.model.any_order {
                return Err(Error::Usage(
                    "tasks.text_to_image.shuffled is above 0: expected model.any_order = true, so that the model \
                     knows which code comes next"
                        .into(),
                ));
            }
        }
        self.validation.as_ref().map_or(Ok(()), |validation| self.validated_source(validation).map(drop))
    }

    /// What else changes or follows weights in small steps does so in their own dtype, and would be lost in bf16.
    fn check_weights(&self) -> Result<()> {
        let beside = match self {
            _ if self.weights == FloatDtype::Fp32 => return Ok(()),
            _ if self.ema > 0.0 => format!("ema = {}: expected 0", self.ema),
            _ if self.merging.is_some() => "merging: expected none".to_owned(),
            Self { optimizer: OptimizerConfig { muon_momentum: Some(momentum), .. }, .. } => {
                format!("optimizer.muon_momentum = {momentum}: expected none")
            }
            _ => return Ok(()),
        };
        Err(Error::Usage(format!("{beside} with weights = \"bf16\", which only AdamW rounds by lot")))
    }

    /// Finds what no single key shows to be wrong.
    ///
    /// # Errors
    /// One line that names the key, its value and what was expected.
    pub fn validate(&self) -> Result<()> {
        let usage = |problem: String| Err(Error::Usage(problem));
        self.model.validate().map_err(|problem| Error::Usage(format!("model.{problem}")))?;
        self.validate_sources()?;
        let positive = [
            ("schedule.steps", self.schedule.steps),
            ("schedule.tokens", self.schedule.tokens as u64),
            ("schedule.accumulation", self.schedule.accumulation),
            ("log_every", self.log_every),
            ("checkpoint_every", self.checkpoint_every),
            ("data.workers", self.data.workers as u64),
        ];
        let validation = self.validation.iter().map(|v| ("validation.examples", v.examples));
        let samples = self.samples.iter().map(|s| ("samples.count", s.count as u64));
        if let Some((key, _)) =
            positive.into_iter().chain(validation).chain(samples).find(|(_, value)| *value == 0)
        {
            return usage(format!("{key} = 0: expected 1 or more"));
        }
        if self.tokenizer.file.is_some() == self.tokenizer.train.is_some() {
            return usage("tokenizer: expected either `file` or `train`, not both".into());
        }
        if !(0.0..1.0).contains(&self.ema) {
            return usage(format!("ema = {}: expected 0 <= ema < 1", self.ema));
        }
        for (key, value) in [("lr", self.schedule.lr), ("clip", self.schedule.clip)] {
            if !(value > 0.0 && value.is_finite()) {
                return usage(format!("schedule.{key} = {value}: expected a positive number"));
            }
        }
        if !(0.0..=1.0).contains(&self.schedule.min_ratio) {
            return usage(format!("schedule.min_ratio = {}: expected 0 to 1", self.schedule.min_ratio));
        }
        self.model.check_extractor(self.extractor.as_deref(), self.init.is_some()).map_err(Error::Usage)?;
        self.optimizer.validate().map_err(|problem| Error::Usage(format!("optimizer.{problem}")))?;
        if let Some(merging) = &self.merging {
            let problem = |problem: String| Error::Usage(format!("merging.{problem}"));
            merging.settings().validate().map_err(problem)?;
            if self.init.is_none() {
                return usage(
                    "init is missing: expected the tuned model that merging.base is the base of".into(),
                );
            }
        }
        self.check_weights()?;
        if let Some(samples) = &self.samples {
            samples
                .request(self.seed)
                .validate()
                .map_err(|error| Error::Usage(format!("samples: {error}")))?;
        }
        Ok(())
    }
}
