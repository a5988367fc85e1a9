//! Tensors in and out of safetensors files, with atomic writes and dtypes kept as they are.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorInfo, View};
use tch::{Device, Kind, Tensor};

use crate::error::{Result, RuntimeError};

/// Mode of weight files.
const READABLE: u32 = 0o644;

/// Whose tensors a file holds. transformers before 5 reads none that does not say it.
const FORMAT: [&str; 2] = ["format", "pt"];

struct HostView {
    dtype: Dtype,
    shape: Vec<usize>,
    tensor: Tensor,
}

impl View for HostView {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    // One tensor at a time is on the host, so saving costs no second copy of the model.
    fn data(&self) -> Cow<'_, [u8]> {
        let host = self.tensor.to_device(Device::Cpu).contiguous();
        let mut bytes = vec![0; self.data_len()];
        host.copy_data_u8(&mut bytes, host.numel());
        Cow::Owned(bytes)
    }

    fn data_len(&self) -> usize {
        self.tensor.numel() * self.tensor.kind().elt_size_in_bytes()
    }
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Double => Dtype::F64,
        Kind::Int64 => Dtype::I64,
        Kind::Int => Dtype::I32,
        Kind::Int16 => Dtype::I16,
        Kind::Uint8 => Dtype::U8,
        Kind::Bool => Dtype::BOOL,
        _ => return None,
    })
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::F64 => Kind::Double,
        Dtype::I64 => Kind::Int64,
        Dtype::I32 => Kind::Int,
        Dtype::I16 => Kind::Int16,
        Dtype::U8 => Kind::Uint8,
        Dtype::BOOL => Kind::Bool,
        _ => return None,
    })
}

/// Writes named tensors as safetensors; the file appears whole, by rename.
///
/// # Errors
/// When a dtype has no place in the format or the file cannot be written; an earlier file stays as it was.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let dtype = dtype_of(tensor.kind())
            .ok_or_else(|| RuntimeError::file(path, format!("`{name}`: no dtype for {:?}", tensor.kind())))?;
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        views.push((name.as_str(), HostView { dtype, shape, tensor: tensor.shallow_clone() }));
    }
    let format = HashMap::from([FORMAT.map(str::to_owned).into()]);
    safetensors::serialize_to_file(views, Some(format), path)
        .map_err(|error| RuntimeError::file(path, format!("cannot be written: {error}")))?;
    // The temporary file was made for its owner alone; weights are files like any other.
    fs::set_permissions(path, Permissions::from_mode(READABLE))
        .map_err(|error| RuntimeError::file(path, error))
}

/// A safetensors file whose tensors are read one at a time.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    map: Mmap,
    metadata: Metadata,
    /// Where the numbers begin.
    start: usize,
}

impl TensorFile {
    /// Opens a file and reads what it holds, without the numbers.
    ///
    /// # Errors
    /// When the file is missing or damaged.
    pub fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| RuntimeError::file(path, error))?;
        // SAFETY: weight files appear by rename (those of this program) or whole and are not written in place, so the
        // map does not change.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| RuntimeError::file(path, error))?;
        let (header, metadata) = SafeTensors::read_metadata(&map)
            .map_err(|error| RuntimeError::file(path, format!("is not a whole safetensors file: {error}")))?;
        Ok(Self { path: path.to_owned(), map, metadata, start: size_of::<u64>() + header })
    }

    /// Names and shapes, in the order of the names.
    pub fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        let shape = |info: &TensorInfo| info.shape.iter().map(|&n| n as i64).collect();
        self.metadata.tensors().into_iter().map(|(name, info)| (name, shape(info))).collect()
    }

    /// Reads the tensor `name` to the CPU.
    ///
    /// # Errors
    /// When it is not there or has a dtype that libtorch lacks.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let info = self
            .metadata
            .info(name)
            .ok_or_else(|| RuntimeError::file(&self.path, format!("`{name}` is missing")))?;
        let kind = kind_of(info.dtype)
            .ok_or_else(|| RuntimeError::file(&self.path, format!("`{name}` is {:?}", info.dtype)))?;
        let shape: Vec<i64> = info.shape.iter().map(|&n| n as i64).collect();
        let (begin, end) = info.data_offsets;
        Ok(Tensor::f_from_data_size(&self.map[self.start + begin..self.start + end], &shape, kind)?)
    }
}

/// Reads all tensors of a safetensors file to the CPU, in the order of their names.
///
/// # Errors
/// When the file is missing, damaged, or holds a dtype that libtorch lacks.
pub fn read_tensors(path: &Path) -> Result<Vec<(String, Tensor)>> {
    let file = TensorFile::open(path)?;
    file.shapes().into_keys().map(|name| file.read(&name).map(|tensor| (name, tensor))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_dtype_and_layout_survives() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.safetensors");
        let base = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([3, 4]) / 7.0;
        let mut tensors = vec![("transposed".to_string(), base.tr())];
        for kind in [Kind::BFloat16, Kind::Half, Kind::Double, Kind::Int64, Kind::Uint8, Kind::Bool] {
            tensors.push((format!("{kind:?}"), base.to_kind(kind)));
        }
        write_tensors(&file, &tensors).unwrap();
        let back = read_tensors(&file).unwrap();
        assert_eq!(back.len(), tensors.len());
        for (name, tensor) in back {
            let (_, expected) = tensors.iter().find(|(n, _)| *n == name).unwrap();
            assert_eq!(tensor.kind(), expected.kind());
            assert_eq!(&tensor, expected, "{name}");
        }
    }

    #[test]
    fn bf16_slices_of_tch_are_wrong_and_ours_are_not_used_that_way() {
        // The trap: tch wires `half::bf16` to Kind::Half. This test fails when tch mends it.
        let bits: Vec<u8> = [1.0f32, 2.0, -0.5]
            .iter()
            .flat_map(|v| (v.to_bits() >> 16).to_le_bytes()[..2].to_vec())
            .collect();
        let right = Tensor::from_data_size(&bits, &[3], Kind::BFloat16).to_kind(Kind::Float);
        assert_eq!(Vec::<f32>::try_from(right).unwrap(), [1.0, 2.0, -0.5]);
        assert_eq!(<half::bf16 as tch::kind::Element>::KIND, Kind::Half);
    }

    #[test]
    fn a_failed_save_leaves_the_old_file() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no-such-folder").join("t.safetensors");
        let tensors = [("w".to_string(), Tensor::ones([2], (Kind::Float, Device::Cpu)))];
        let message = write_tensors(&missing, &tensors).unwrap_err().to_string();
        assert!(message.contains("no-such-folder"), "{message}");
        assert_eq!(message.lines().count(), 1);
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("t.safetensors");
        write_tensors(&file, &[("w".to_string(), Tensor::ones([64], (Kind::Float, Device::Cpu)))]).unwrap();
        let whole = std::fs::read(&file).unwrap();
        std::fs::write(&file, &whole[..whole.len() - 8]).unwrap();
        let message = read_tensors(&file).unwrap_err().to_string();
        assert!(message.contains("t.safetensors: is not a whole safetensors file"), "{message}");
    }
}
