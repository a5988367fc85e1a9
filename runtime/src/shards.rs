//! Tensors of one model in several safetensors files, as Hugging Face stores large ones.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use tch::Tensor;

use crate::error::{Result, RuntimeError};
use crate::weights::TensorFile;

/// Safetensors files whose tensors are read one at a time, by name.
#[derive(Debug)]
pub struct TensorShards {
    path: PathBuf,
    files: BTreeMap<String, TensorFile>,
    /// Which file holds a tensor.
    homes: BTreeMap<String, String>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl TensorShards {
    /// How the name of an index file ends.
    pub const INDEX_SUFFIX: &str = ".safetensors.index.json";

    /// Opens a safetensors file, or those beside an index that it names, and reads what they hold, without the numbers.
    ///
    /// # Errors
    /// When a file is missing or damaged, two files hold the same tensor, or an index leads out of its folder.
    pub fn open(path: &Path) -> Result<Self> {
        let mut shards = Self { path: path.to_owned(), files: BTreeMap::new(), homes: BTreeMap::new() };
        for (name, place) in files_of(path)? {
            let file = TensorFile::open(&place)?;
            for tensor in file.shapes().into_keys() {
                if let Some(other) = shards.homes.insert(tensor.clone(), name.clone()) {
                    return Err(RuntimeError::file(
                        path,
                        format!("`{tensor}` is in both {other} and {name}"),
                    ));
                }
            }
            shards.files.insert(name, file);
        }
        Ok(shards)
    }

    /// Names and shapes, in the order of the names.
    pub fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        self.files.values().flat_map(TensorFile::shapes).collect()
    }

    /// Reads the tensor `name` to the CPU.
    ///
    /// # Errors
    /// When it is not there or has a dtype that libtorch lacks.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        self.file_of(name)?.read(name)
    }

    /// The file that holds the tensor `name`.
    ///
    /// # Errors
    /// When none does.
    pub fn file_of(&self, name: &str) -> Result<&TensorFile> {
        let file = self.homes.get(name).and_then(|home| self.files.get(home));
        file.ok_or_else(|| RuntimeError::file(&self.path, format!("`{name}` is missing")))
    }
}

/// The files that `path` stands for: itself, or those beside it that it names.
fn files_of(path: &Path) -> Result<Vec<(String, PathBuf)>> {
    let own = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    if !own.ends_with(TensorShards::INDEX_SUFFIX) {
        return Ok(vec![(own, path.to_owned())]);
    }
    let text = fs::read_to_string(path).map_err(|error| RuntimeError::file(path, error))?;
    let Index { weight_map } =
        serde_json::from_str(&text).map_err(|error| RuntimeError::file(path, error))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    match names.iter().find(|name| Path::new(name).components().count() != 1) {
        Some(name) => Err(RuntimeError::file(path, format!("{name:?} is not the name of a file beside it"))),
        None => Ok(names.into_iter().map(|name| (name.clone(), path.with_file_name(name))).collect()),
    }
}
