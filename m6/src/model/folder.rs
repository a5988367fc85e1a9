//! A model folder: `config.json`, `model.safetensors`, `tokenizer.json` and the image tokenizer in `vqgan/`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use m6_data::tokenizer::Tokenizer;
use m6_run::write_atomic;
use m6_runtime::{FloatDtype, Params};
use m6_vqgan::Vqgan;
use serde::{Deserialize, Serialize};
use tch::{Device, Tensor};

use super::{ModelConfig, PATCHES, Transformer, Upcycling, Vocab, compute_dtype};
use crate::error::{Error, Result};

/// What the names of the blocks' tensors begin with.
const BLOCKS: &str = "blocks.";
const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const TOKENIZER: &str = "tokenizer.json";
/// Folder of the image tokenizer in a model folder.
pub const VQGAN: &str = "vqgan";

/// What `config.json` holds: everything needed to rebuild the stack, and which tokenizers it was trained with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelInfo {
    /// Settings of the stack.
    pub model: ModelConfig,
    /// Sizes of the vocabulary.
    pub vocab: Vocab,
    /// Codes a side of a picture.
    pub code_grid: i64,
    /// How the weights are stored.
    pub dtype: FloatDtype,
    /// Hash of the text tokenizer.
    pub tokenizer: String,
    /// Hash of the image tokenizer's weights.
    pub vqgan: String,
}

/// A transformer with both of its tokenizers.
pub struct Model {
    /// Settings and hashes.
    pub info: ModelInfo,
    /// The weights by name.
    pub params: Params,
    /// The stack.
    pub transformer: Transformer,
    /// Text to ids and back.
    pub tokenizer: Tokenizer,
    /// Pictures to codes and back.
    pub vqgan: Vqgan,
}

impl Model {
    /// A model with fresh weights in `params`, which is empty.
    ///
    /// # Errors
    /// When the settings are wrong.
    pub fn new(config: &ModelConfig, tokenizer: Tokenizer, vqgan: Vqgan, params: Params) -> Result<Self> {
        let problem = config.validate().and_then(|()| resolution(config)).err();
        if let Some(problem) = problem {
            return Err(Error::Usage(format!("model.{problem}")));
        }
        let vqgan_hash = vqgan.hash().ok_or_else(|| Error::Usage("vqgan: has no weight file yet".into()))?;
        let info = ModelInfo {
            model: config.clone(),
            vocab: Vocab { text: tokenizer.vocab_size() as i64, codes: vqgan.config().codebook_size },
            code_grid: vqgan.config().grid(),
            dtype: FloatDtype::Bf16,
            tokenizer: tokenizer.hash()?,
            vqgan: vqgan_hash.to_string(),
        };
        let transformer = Transformer::new(&params, config, info.vocab, info.code_grid);
        Ok(Self { info, params, transformer, tokenizer, vqgan })
    }

    /// The same with experts.
    ///
    /// # Errors
    /// When this is not the dense model that `upcycling` is for.
    pub fn upcycled(self, upcycling: &Upcycling) -> Result<Self> {
        upcycling.check(&self.info.model)?;
        let params = Params::new(self.params.device(), upcycling.seed);
        let mut model = Self::new(&upcycling.model, self.tokenizer, self.vqgan, params)?;
        model.info.dtype = self.info.dtype;
        upcycling.fill(&self.params, &model.params);
        Ok(model)
    }

    /// The same with weights of its own for each block, where all have those of the first ("Pseudo-to-Real", Lin et al. 2021,
    /// M6-10T): it computes what it did, and its blocks can now learn apart.
    ///
    /// # Errors
    /// When the blocks share nothing.
    pub fn delinked(self) -> Result<Self> {
        let config = ModelConfig { share_layers: false, ..self.info.model.clone() };
        if config == self.info.model {
            return Err(Error::Usage("share_layers = false: the blocks have weights of their own".into()));
        }
        let params = Params::unfilled(self.params.device());
        let mut model = Self::new(&config, self.tokenizer, self.vqgan, params)?;
        model.info.dtype = self.info.dtype;
        delink(&self.params, &model.params);
        Ok(model)
    }

    /// Side of the pictures that it sees, in pixels.
    pub fn resolution(&self) -> i64 {
        resolution(&self.info.model).expect("a model without patches is not opened")
    }

    /// Takes the weights of the network that its patches take trained; see [`m6_vision::load_trained`].
    ///
    /// # Errors
    /// When the file cannot be read or is of another network.
    pub fn load_extractor(&self, file: &Path) -> Result<()> {
        Ok(m6_vision::load_trained(&(&self.params / PATCHES), file)?)
    }

    /// Takes the weights of another model folder of the same settings and tokenizers.
    ///
    /// # Errors
    /// When a file cannot be read, or settings or tokenizers differ.
    pub fn load_weights(&self, dir: &Path) -> Result<()> {
        Self::load_into(&self.params, &self.info, dir)
    }

    /// The weights of another model folder of the same settings and tokenizers, by name.
    ///
    /// # Errors
    /// As for [`Model::load_weights`].
    pub fn other_weights(&self, dir: &Path) -> Result<BTreeMap<String, Tensor>> {
        let params = Params::unfilled(self.params.device());
        let _transformer = Transformer::new(&params, &self.info.model, self.info.vocab, self.info.code_grid);
        Self::load_into(&params, &self.info, dir)?;
        Ok(params.tensors())
    }

    fn load_into(params: &Params, expected: &ModelInfo, dir: &Path) -> Result<()> {
        let info = read_info(dir)?;
        if (ModelInfo { dtype: expected.dtype, ..info.clone() }) != *expected {
            return Err(Error::file(&dir.join(CONFIG), "its model or tokenizers are not those of this run"));
        }
        Ok(params.load(&dir.join(WEIGHTS), info.dtype.kind())?)
    }

    /// Opens a model folder to use it: its matrices are held in the dtype in which the device computes.
    ///
    /// # Errors
    /// When a file is missing or damaged, or a tokenizer is not the one that the model was trained with.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        if !dir.is_dir() {
            return Err(Error::file(dir, "is not a folder; expected a model folder with config.json"));
        }
        let info = read_info(dir)?;
        let tokenizer = Tokenizer::load(&dir.join(TOKENIZER))?;
        let vqgan = Vqgan::load(&dir.join(VQGAN), device)?;
        same(&dir.join(TOKENIZER), "text tokenizer", &tokenizer.hash()?, &info.tokenizer)?;
        same(&dir.join(VQGAN), "image tokenizer", vqgan.hash().unwrap_or_default(), &info.vqgan)?;
        let vocab = Vocab { text: tokenizer.vocab_size() as i64, codes: vqgan.config().codebook_size };
        if info.vocab != vocab || info.code_grid != vqgan.config().grid() {
            let problem = "vocab, code_grid: not those of the tokenizers beside it";
            return Err(Error::file(&dir.join(CONFIG), problem));
        }
        let params = Params::unfilled(device).with_matrices(compute_dtype(device));
        let transformer = Transformer::new(&params, &info.model, info.vocab, info.code_grid);
        params.load(&dir.join(WEIGHTS), info.dtype.kind())?;
        Ok(Self { info, params, transformer, tokenizer, vqgan })
    }

    /// Writes the model folder; `vqgan_dir` is the folder of its image tokenizer. Each file appears by rename, the
    /// config last, so that a folder with a config is whole.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path, vqgan_dir: &Path) -> Result<()> {
        let target = dir.join(VQGAN);
        fs::create_dir_all(&target).map_err(|error| Error::file(&target, error))?;
        for name in m6_vqgan::FILES {
            let source = vqgan_dir.join(name);
            let bytes = fs::read(&source).map_err(|error| Error::file(&source, error))?;
            write_atomic(target.join(name), &bytes)?;
        }
        self.tokenizer.save(&dir.join(TOKENIZER))?;
        self.params.save(&dir.join(WEIGHTS), self.info.dtype.kind())?;
        let text = serde_json::to_string_pretty(&self.info).expect("plain settings become JSON");
        Ok(write_atomic(dir.join(CONFIG), text.as_bytes())?)
    }
}

/// The config of a model folder.
///
/// # Errors
/// When it cannot be read or its settings are wrong.
pub fn read_info(dir: &Path) -> Result<ModelInfo> {
    let config = dir.join(CONFIG);
    let text = fs::read_to_string(&config).map_err(|error| Error::file(&config, error))?;
    let info: ModelInfo = serde_json::from_str(&text).map_err(|error| Error::file(&config, error))?;
    let problem = info.model.validate().and_then(|()| resolution(&info.model)).err();
    problem.map_or(Ok(info), |problem| Err(Error::file(&config, format!("model.{problem}"))))
}

/// Fills `target`, a stack, with the weights of one that is the same but for blocks that share those of the first.
fn delink(shared: &Params, target: &Params) {
    let shared = shared.tensors();
    for (name, mut tensor) in target.tensors() {
        let of_block = name.strip_prefix(BLOCKS).and_then(|rest| rest.split_once('.'));
        let source = of_block.map_or(name.clone(), |(_, rest)| format!("{BLOCKS}0.{rest}"));
        tensor.copy_(&shared[&source]);
    }
}

/// Side of the pictures that a model of this config sees.
fn resolution(config: &ModelConfig) -> std::result::Result<i64, String> {
    let patches = config.patches.as_ref().ok_or("patches is missing: expected how pictures are seen")?;
    Ok(patches.resolution)
}

pub(super) fn same(path: &Path, what: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let problem = format!(
        "this {what} (hash {found}) is not the one that the model was trained with (hash {expected})"
    );
    Err(Error::file(path, problem))
}
