//! Weight files of both kinds, behind one door.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};

use crate::error::{Result, RuntimeError};
use crate::shards::TensorShards;
use crate::torch_file::TorchFile;

/// How a zip file begins.
const ZIP_MAGIC: [u8; 4] = *b"PK\x03\x04";
/// How torch files began before they were zip files: a pickle of a large number.
const OLD_MAGIC: [u8; 4] = *b"\x80\x02\x8a\x0a";
/// Names that a folder's weights may have, in the order of preference.
const NAMES: [&str; 6] = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "pytorch_model.bin",
];

/// An open file of weights.
#[derive(Debug)]
pub struct WeightFile {
    path: PathBuf,
    format: Format,
    shapes: BTreeMap<String, Vec<i64>>,
}

#[derive(Debug)]
enum Format {
    Safetensors(TensorShards),
    Torch(TorchFile),
}

impl WeightFile {
    /// Opens `path`, a file or a folder with one, and reads what it holds, without the numbers. Which format a file has
    /// follows from its first bytes.
    pub fn open(path: &Path) -> Result<Self> {
        let path = if path.is_dir() { file_in(path)? } else { path.to_owned() };
        let format = match first_bytes(&path)? {
            ZIP_MAGIC => Format::Torch(TorchFile::open(&path)?),
            OLD_MAGIC => {
                let reason = "is a torch file of the old format; load and save it with a newer torch";
                return Err(RuntimeError::file(&path, reason));
            }
            _ => Format::Safetensors(TensorShards::open(&path)?),
        };
        let shapes = match &format {
            Format::Safetensors(file) => file.shapes(),
            Format::Torch(file) => file.shapes(),
        };
        Ok(Self { path, format, shapes })
    }

    /// The file, which may lie in the folder that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Names and shapes of all tensors.
    pub fn shapes(&self) -> &BTreeMap<String, Vec<i64>> {
        &self.shapes
    }

    /// What is wrong where the tensor `name` is not there.
    pub fn missing(&self, name: &str) -> String {
        let other = if let Format::Torch(file) = &self.format { file.other(name) } else { None };
        match other {
            Some(class) => format!("`{name}` is made by `{class}`, which is not run"),
            None => format!("`{name}` is missing"),
        }
    }

    /// Reads the tensor `name` as float32.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let tensor = match &self.format {
            Format::Safetensors(file) => file.read(name)?,
            Format::Torch(file) => file.read(name)?,
        };
        let problem = |reason: &str| Err(RuntimeError::file(&self.path, format!("`{name}` {reason}")));
        if !matches!(tensor.kind(), Kind::Float | Kind::Double | Kind::Half | Kind::BFloat16) {
            return problem(&format!("is {:?}, expected floating point", tensor.kind()));
        }
        let tensor = tensor.to_kind(Kind::Float);
        if tensor.isfinite().all().int64_value(&[]) == 0 {
            return problem("holds NaN or infinity");
        }
        Ok(tensor)
    }
}

fn file_in(dir: &Path) -> Result<PathBuf> {
    NAMES.iter().map(|name| dir.join(name)).find(|path| path.is_file()).ok_or_else(|| {
        RuntimeError::file(dir, format!("holds none of {}; name the file itself", NAMES.join(", ")))
    })
}

fn first_bytes(path: &Path) -> Result<[u8; 4]> {
    let mut bytes = [0; 4];
    let file = File::open(path);
    file.and_then(|mut file| file.read_exact(&mut bytes)).map_err(|error| RuntimeError::file(path, error))?;
    Ok(bytes)
}
