//! What is planned: the shape of a stack, from any file that describes one.

use std::path::Path;

use m6_data::tokenizer::Tokenizer;
use m6_runtime::optim::OptimizerConfig;
use m6_vqgan::Vqgan;
use serde::Deserialize;

use crate::error::{Error, Result};
use crate::model::{ModelConfig, Positions, Vocab, language_shape, read_info};
use crate::train::TrainConfig;

/// Far above any vocabulary, and low enough for the arithmetic.
const MAX_ROWS: i64 = 1 << 24;
const MAX_CODE_GRID: i64 = 1 << 12;

/// What the size of a stack follows from; also the layout of the files in `configs/model`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Shape {
    /// Settings of the stack.
    pub model: ModelConfig,
    /// Sizes of the vocabulary.
    pub vocab: Vocab,
    /// Codes a side of a picture.
    #[serde(default)]
    pub code_grid: i64,
}

/// What a plan is made from.
#[derive(Debug, Clone, PartialEq)]
pub struct Subject {
    /// The stack.
    pub shape: Shape,
    /// What updates it.
    pub optimizer: OptimizerConfig,
    /// Whether its updates are merged.
    pub merges: bool,
    /// Whether averages of its weights are kept.
    pub averages: bool,
    /// Backward passes before an update.
    pub passes: u64,
}

impl Subject {
    /// Reads a file of `configs/model`, the config of a training run, a model folder, or a folder of Hugging Face's layout.
    ///
    /// # Errors
    /// When there is nothing at `path`, it cannot be read, or what it describes is no stack.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_dir() {
            return Ok(Self::alone(Shape::of_folder(path)?));
        }
        if !path.exists() {
            let expected = "expected a config or a model folder";
            return Err(Error::Usage(format!("{}: does not exist; {expected}", path.display())));
        }
        let keys = m6_run::config::load::<toml::Table>(path, &[])?.table;
        if !keys.contains_key("schedule") {
            let shape = m6_run::config::load::<Shape>(path, &[])?.config;
            let problem = |problem: String| Error::Usage(format!("{}: {problem}", path.display()));
            return Ok(Self::alone(shape.validated().map_err(problem)?));
        }
        let config = m6_run::config::load::<TrainConfig>(path, &[])?.config;
        config.validate()?;
        let (optimizer, merges) = (config.optimizer, config.merging.is_some());
        let passes = config.schedule.accumulation;
        let averages = config.ema > 0.0;
        Ok(Self { optimizer, merges, averages, passes, shape: Shape::of_run(config)? })
    }

    /// With nothing said of its training.
    pub(super) fn alone(shape: Shape) -> Self {
        Self { shape, optimizer: OptimizerConfig::default(), merges: false, averages: true, passes: 1 }
    }
}

impl Shape {
    fn of_folder(dir: &Path) -> Result<Self> {
        if let Some((model, vocab)) = language_shape(dir)? {
            return Ok(Self { model, vocab, code_grid: 0 });
        }
        let info = read_info(dir)?;
        Ok(Self { model: info.model, vocab: info.vocab, code_grid: info.code_grid })
    }

    /// A tokenizer that is yet to be trained counts with the size that the config asks for.
    fn of_run(config: TrainConfig) -> Result<Self> {
        let text = match (&config.tokenizer.file, config.tokenizer.train) {
            (Some(file), _) => Tokenizer::load(file)?.vocab_size(),
            (None, size) => size.unwrap_or_default(),
        };
        let vqgan = Vqgan::read_config(&config.vqgan)?;
        let vocab = Vocab { text: text as i64, codes: vqgan.codebook_size };
        Ok(Self { model: config.model, vocab, code_grid: vqgan.grid() })
    }

    fn validated(self) -> std::result::Result<Self, String> {
        self.model.validate().map_err(|problem| format!("model.{problem}"))?;
        let sizes = [
            ("vocab.text", self.vocab.text, 1, MAX_ROWS),
            ("vocab.codes", self.vocab.codes, 0, MAX_ROWS),
            ("code_grid", self.code_grid, 0, MAX_CODE_GRID),
        ];
        match sizes.iter().find(|(_, value, least, most)| !(*least..=*most).contains(value)) {
            Some((key, value, least, most)) => Err(format!("{key} = {value}: expected {least} to {most}")),
            None => Ok(self),
        }
    }

    /// The rows of the position table.
    pub fn positions(&self) -> Positions {
        let patch_grid = self.model.patches.as_ref().map_or(0, |patches| patches.grid());
        Positions { text: self.model.max_text, patch_grid, code_grid: self.code_grid }
    }

    /// Whether there is anything but text.
    pub fn has_pictures(&self) -> bool {
        self.model.patches.is_some() || !self.vocab.is_language()
    }

    /// Tokens of the longest example of a picture and its text, or of a text.
    pub fn longest(&self) -> i64 {
        self.model.max_text + self.positions().patches() as i64
    }
}
