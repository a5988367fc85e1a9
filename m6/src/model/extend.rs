//! A language model that is to learn pictures: rows for special ids and image codes in its table, a head for codes, an
//! extractor of patch features. What it makes of texts stays what it was.

use std::path::{Path, PathBuf};

use m6_runtime::Params;
use serde::Deserialize;
use tch::{Kind, Tensor};

use super::config::ModelConfig;
use super::difference::difference;
use super::{INIT_STD, Vocab};
use crate::error::{Error, Result};

/// What a language model becomes.
#[derive(Debug, Clone)]
pub struct Extension {
    /// Its own settings, with those of pictures.
    pub(super) model: ModelConfig,
    /// Folder of the image tokenizer.
    pub vqgan: PathBuf,
    /// Weights of the network that its patches take trained, if they do.
    pub(super) extractor: Option<PathBuf>,
    /// Seed of all that is new.
    pub(super) seed: u64,
    /// The file that says it.
    file: String,
}

/// The keys of a training run's config that matter here.
#[derive(Deserialize)]
struct Run {
    model: ModelConfig,
    vqgan: PathBuf,
    extractor: Option<PathBuf>,
}

impl Extension {
    /// To what the config of a training run starts from: its keys `model`, `vqgan` and `extractor`.
    ///
    /// # Errors
    /// When it cannot be read, or describes no stack or one that sees no pictures.
    pub fn open(path: &Path, seed: u64) -> Result<Self> {
        let Run { model, vqgan, extractor } = m6_run::config::load::<Run>(path, &[])?.config;
        let extension = Self { model, vqgan, extractor, seed, file: path.display().to_string() };
        extension.model.validate().map_err(|problem| extension.error(&problem))?;
        if extension.model.patches.is_none() {
            return Err(extension.error("patches is missing: expected how pictures are seen"));
        }
        extension
            .model
            .check_extractor(extension.extractor.as_deref(), false)
            .map_err(|problem| Error::Usage(format!("{}: {problem}", extension.file)))?;
        Ok(extension)
    }

    /// Whether a language model with these settings can become that.
    ///
    /// # Errors
    /// When it differs in more than pictures, dropout and the length of texts, which has no weights.
    pub(super) fn check(&self, language: &ModelConfig) -> Result<()> {
        if language.rotary.is_none() {
            let problem = "rotary is missing: expected places that need no table";
            return Err(Error::Usage(format!("the model to start from: {problem}")));
        }
        let same = ModelConfig {
            patches: language.patches.clone(),
            any_order: language.any_order,
            code_order: language.code_order,
            dropout: language.dropout,
            max_text: language.max_text,
            ..self.model.clone()
        };
        difference(&same, language).map_or(Ok(()), |(key, own, expected)| {
            Err(self.error(&format!("{key} = {own}: expected {expected}, as in the model to start from")))
        })
    }

    fn error(&self, problem: &str) -> Error {
        Error::Usage(format!("{}: model.{problem}", self.file))
    }
}

/// Fills `target`, a stack with fresh weights and the vocabulary `vocab`, with those of a language model. Rows of its
/// table that belong to no text id are left out.
pub(super) fn fill(language: &Params, target: &Params, vocab: Vocab) {
    let _guard = tch::no_grad_guard();
    let old = language.tensors();
    for (name, mut new) in target.tensors() {
        match (name.as_str(), old.get(&name)) {
            ("tokens.weight" | "text_head.weight", Some(old)) => extend(&new, &old.narrow(0, 0, vocab.text)),
            // Added to the rows of texts too, which they are not to change.
            ("segments.weight" | "aims.weight", _) => drop(new.zero_()),
            (_, Some(old)) => new.copy_(old),
            (_, None) => {}
        }
    }
}

/// Fills a table of fresh rows with the old ones first, and gives the others their mean and spread, value by value: a
/// new id is then as likely as an old one, and not likelier than all of them.
fn extend(table: &Tensor, old: &Tensor) {
    let (count, rows) = (old.size()[0], table.size()[0]);
    table.narrow(0, 0, count).copy_(old);
    let mut new = table.narrow(0, count, rows - count);
    let mean = old.mean_dim([0].as_slice(), true, Kind::Float);
    let spread = old.std_dim([0].as_slice(), false, true);
    new.copy_(&(&new / INIT_STD * spread + mean));
}

#[cfg(test)]
mod tests {
    use m6_runtime::attention::{Layout, Span};
    use m6_vision::PatchConfig;
    use tch::Device;

    use super::super::{Mode, RotaryConfig, Sequence, Transformer};
    use super::*;

    /// Rows of the language model's table, of which the last few belong to no id.
    const ROWS: i64 = 64;
    const VOCAB: Vocab = Vocab { text: 60, codes: 300 };

    fn language(tied: bool) -> ModelConfig {
        let rotary = Some(RotaryConfig::new(1e4));
        ModelConfig { rotary, tied, ..ModelConfig::new(16, 2, 2, 24, 8) }
    }

    fn extension(tied: bool) -> Extension {
        let patches = Some(PatchConfig::convolutions(8, &[16, 16]));
        let model = ModelConfig { patches, any_order: true, dropout: 0.1, max_text: 32, ..language(tied) };
        Extension { model, vqgan: PathBuf::new(), extractor: None, seed: 2, file: "train.toml".into() }
    }

    fn logits(transformer: &Transformer) -> Tensor {
        let mut sequence = Sequence::new(transformer.vocab(), transformer.positions());
        sequence.begin();
        sequence.prefix_text(&[3, 14, 15]);
        sequence.target_text(&[9, 26], 0);
        let layout = Layout::new(vec![Span { prefix: 0, target: 5 }], Device::Cpu).unwrap();
        let tokens = sequence.to_device(Device::Cpu).unwrap();
        let hidden = transformer.forward(&tokens, None, &layout, 5, Mode::Infer).unwrap();
        transformer.text_logits(&hidden.x_nd)
    }

    #[test]
    fn texts_stay_what_they_were_and_new_rows_are_like_the_old() {
        for tied in [true, false] {
            let (old, new) = (Params::new(Device::Cpu, 1), Params::new(Device::Cpu, 2));
            let before = Transformer::new(&old, &language(tied), Vocab::language(ROWS), 0);
            let after = Transformer::new(&new, &extension(tied).model, VOCAB, 4);
            for (name, param) in old.entries() {
                let _guard = tch::no_grad_guard();
                let mut tensor = param.tensor;
                if !name.contains("norm") {
                    let _ = tensor.g_mul_scalar_(8.0).g_add_scalar_(0.1);
                }
            }
            fill(&old, &new, VOCAB);

            let exact = logits(&before).narrow(1, 0, VOCAB.text);
            let gap = (logits(&after).narrow(1, 0, VOCAB.text) - &exact).abs().max() / exact.abs().max();
            assert!(gap.double_value(&[]) < 1e-6, "{gap:?}");

            let table = |params: &Params| params.tensors()["tokens.weight"].shallow_clone();
            let (old, new) = (table(&old).narrow(0, 0, VOCAB.text), table(&new));
            assert_eq!(new.size(), [VOCAB.rows(), 16]);
            assert_eq!(new.narrow(0, 0, VOCAB.text), old);
            let fresh = new.narrow(0, VOCAB.text, VOCAB.rows() - VOCAB.text);
            let moments = |rows: &Tensor| (rows.mean(Kind::Float), rows.std(false));
            let ((old_mean, old_std), (mean, std)) = (moments(&old), moments(&fresh));
            assert!(((mean - old_mean) / &old_std).abs().double_value(&[]) < 0.1);
            assert!((std / old_std - 1.0).abs().double_value(&[]) < 0.1);
        }
    }

    #[test]
    fn what_does_not_fit_is_named_in_one_line() {
        let extension = extension(true);
        extension.check(&language(true)).unwrap();
        let problem = |language: ModelConfig| extension.check(&language).unwrap_err().to_string();
        assert_eq!(
            problem(ModelConfig { hidden: 32, ..language(true) }),
            "train.toml: model.hidden = 24: expected 32, as in the model to start from"
        );
        assert!(problem(ModelConfig { rotary: None, ..language(true) }).contains("rotary is missing"));
        let file = tempfile::NamedTempFile::new().unwrap();
        let message = |text: &str| {
            std::fs::write(file.path(), text).unwrap();
            Extension::open(file.path(), 0).unwrap_err().to_string()
        };
        let stack = "[model]\nwidth = 16\nlayers = 2\nheads = 2\nhidden = 24\nmax_text = 8\n";
        assert!(message(stack).contains("vqgan"), "{}", message(stack));
        let message = message(&format!("vqgan = \"vqgan\"\n{stack}"));
        assert!(message.ends_with("model.patches is missing: expected how pictures are seen"), "{message}");
    }
}
