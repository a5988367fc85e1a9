//! Language models to folders: our own, and those of Hugging Face's layout.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use m6_run::write_atomic;
use m6_runtime::{FloatDtype, write_tensors_as};
use serde::Serialize;
use serde_json::json;
use tch::Tensor;

use super::config::publish;
use super::{CONFIG, INDEX, LanguageModel, WEIGHTS};
use crate::error::{Error, Result};

/// Most bytes of weights in one file, as in the folders that are published; one tensor may be larger.
const SHARD_BYTES: usize = 5_000_000_000;

/// Files beside config and weights that say how text becomes ids and how to generate, and those with which transformers
/// reads Qwen's own layout; those that are there are copied.
const COMPANIONS: [&str; 13] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "qwen.tiktoken",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
    "configuration_qwen.py",
    "modeling_qwen.py",
    "qwen_generation_utils.py",
    "tokenization_qwen.py",
];

impl LanguageModel {
    /// Writes a folder of our own, floats stored as `dtype`. Each file appears by rename, the config last, so that a
    /// folder with a config is whole.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path, dtype: FloatDtype) -> Result<()> {
        fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
        self.params.save(&dir.join(WEIGHTS), dtype.kind())?;
        self.copy_companions(dir)?;
        write_json(&dir.join(CONFIG), &self.info(dtype)?)
    }

    /// Writes a folder of Hugging Face's layout, floats stored as `dtype`, in the same order.
    ///
    /// # Errors
    /// When a setting has no counterpart there, or a file cannot be written.
    pub fn publish(&self, dir: &Path, dtype: FloatDtype) -> Result<()> {
        self.publish_in_shards(dir, dtype, SHARD_BYTES)
    }

    pub(super) fn publish_in_shards(&self, dir: &Path, dtype: FloatDtype, most: usize) -> Result<()> {
        let config = publish(&self.described, dtype).map_err(|problem| Error::file(&self.folder, problem))?;
        fs::create_dir_all(dir).map_err(|error| Error::file(dir, error))?;
        let width = dtype.kind().elt_size_in_bytes();
        let (shards, bytes) = shards(self.published(&self.params.tensors()), width, most);
        let mut weight_map = BTreeMap::new();
        for (number, shard) in (1..).zip(&shards) {
            let file = match shards.len() {
                1 => WEIGHTS.to_owned(),
                count => format!("model-{number:05}-of-{count:05}.safetensors"),
            };
            write_tensors_as(&dir.join(&file), shard, dtype.kind())?;
            weight_map.extend(shard.iter().map(|(name, _)| (name, file.clone())));
        }
        if shards.len() > 1 {
            let index = json!({ "metadata": { "total_size": bytes }, "weight_map": weight_map });
            write_json(&dir.join(INDEX), &index)?;
        }
        self.copy_companions(dir)?;
        write_json(&dir.join(CONFIG), &config)
    }

    fn copy_companions(&self, dir: &Path) -> Result<()> {
        for name in COMPANIONS {
            let source = self.folder.join(name);
            if source.is_file() {
                let bytes = fs::read(&source).map_err(|error| Error::file(&source, error))?;
                write_atomic(dir.join(name), &bytes)?;
            }
        }
        Ok(())
    }
}

/// Tensors in groups of at most `most` bytes at `width` bytes a value, in their order; and the bytes of all.
fn shards(tensors: Vec<(String, Tensor)>, width: usize, most: usize) -> (Vec<Vec<(String, Tensor)>>, usize) {
    let mut shards: Vec<Vec<_>> = Vec::new();
    let (mut total, mut filled) = (0, 0);
    for (name, tensor) in tensors {
        let bytes = tensor.numel() * width;
        total += bytes;
        match shards.last_mut().filter(|_| filled + bytes <= most) {
            Some(shard) => {
                shard.push((name, tensor));
                filled += bytes;
            }
            None => {
                shards.push(vec![(name, tensor)]);
                filled = bytes;
            }
        }
    }
    (shards, total)
}

fn write_json(path: &Path, value: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec_pretty(value).map_err(|error| Error::file(path, error))?;
    Ok(write_atomic(path, &text)?)
}
