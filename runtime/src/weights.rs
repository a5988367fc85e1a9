//! Tensors in and out of safetensors files, with atomic writes and dtypes kept as they are.

use std::collections::{BTreeMap, HashMap};
use std::fs::{File, Permissions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype, Metadata, SafeTensorError, SafeTensors, TensorInfo};
use tch::{Device, Kind, Tensor};

use crate::error::{Result, RuntimeError};

/// What a new file may be used for before the user's umask takes its part, as for `File::create`.
const DEFAULT_FILE_MODE: u32 = 0o666;

/// Whose tensors a file holds. transformers before 5 reads none that does not say it.
const FORMAT: [&str; 2] = ["format", "pt"];

/// Where the numbers begin is a multiple of this many bytes.
const ALIGNMENT: usize = 8;

/// Values that are read, checked or written at once, so that no large tensor is in memory twice.
const PART: i64 = 1 << 20;

/// `tensor` in runs of rows of about [`PART`] values, which share its storage.
fn parts(tensor: &Tensor) -> Vec<Tensor> {
    match tensor.size().as_slice() {
        [] => vec![tensor.shallow_clone()],
        [_, row @ ..] => tensor.split((PART / row.iter().product::<i64>().max(1)).max(1), 0),
    }
}

/// Whether all of `tensor` are numbers, found with little memory beside it.
pub fn is_finite(tensor: &Tensor) -> bool {
    // A sum is no number where one of its parts is none.
    parts(&tensor.detach()).iter().all(|part| part.sum(Kind::Double).double_value(&[]).is_finite())
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

/// Writes named tensors as safetensors; the file appears whole, by rename. Part after part is on the host, so that
/// saving costs no second copy of the model.
///
/// # Errors
/// When a dtype has no place in the format or the file cannot be written; an earlier file stays as it was.
pub fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    write(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor, tensor.kind())).collect())
}

/// As [`write_tensors`], with all of them stored as `kind`.
///
/// # Errors
/// As those of [`write_tensors`].
pub fn write_tensors_as(path: &Path, tensors: &[(String, Tensor)], kind: Kind) -> Result<()> {
    write(path, tensors.iter().map(|(name, tensor)| (name.as_str(), tensor, kind)).collect())
}

/// Writes tensors by name, and as what they are stored.
fn write(path: &Path, tensors: Vec<(&str, &Tensor, Kind)>) -> Result<()> {
    let mut entries = Vec::with_capacity(tensors.len());
    for (name, tensor, kind) in tensors {
        let dtype = dtype_of(kind)
            .ok_or_else(|| RuntimeError::file(path, format!("`{name}`: no dtype for {kind:?}")))?;
        entries.push((dtype, name, tensor, kind));
    }
    // Dtypes are in the order of their alignment, which is to sink along the file.
    entries.sort_by(|(a, left, ..), (b, right, ..)| b.cmp(a).then(left.cmp(right)));
    write_entries(path, &entries)
        .map_err(|error| RuntimeError::file(path, format!("cannot be written: {error}")))
}

fn write_entries(
    path: &Path,
    entries: &[(Dtype, &str, &Tensor, Kind)],
) -> std::result::Result<(), SafeTensorError> {
    let mut end = 0;
    let infos = entries.iter().map(|(dtype, name, tensor, kind)| {
        let begin = end;
        end += tensor.numel() * kind.elt_size_in_bytes();
        let shape = tensor.size().iter().map(|&n| n as usize).collect();
        ((*name).to_owned(), TensorInfo { dtype: *dtype, shape, data_offsets: (begin, end) })
    });
    let format = HashMap::from([FORMAT.map(str::to_owned).into()]);
    let mut header = serde_json::to_vec(&Metadata::new(Some(format), infos.collect())?)?;
    header.resize(header.len().next_multiple_of(ALIGNMENT), b' ');

    let mut file = tempfile::Builder::new()
        .permissions(Permissions::from_mode(DEFAULT_FILE_MODE))
        .tempfile_in(path.parent().unwrap_or(Path::new(".")))?;
    let mut out = BufWriter::new(&mut file);
    out.write_all(&(header.len() as u64).to_le_bytes())?;
    out.write_all(&header)?;
    for (.., tensor, kind) in entries {
        for part in parts(&tensor.detach()) {
            let part = part.to_kind(*kind);
            let mut bytes = vec![0; part.numel() * kind.elt_size_in_bytes()];
            part.copy_data_u8(&mut bytes, part.numel());
            out.write_all(&bytes)?;
        }
    }
    out.flush()?;
    drop(out);
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
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
        self.metadata.tensors().into_iter().map(|(name, info)| (name, shape_of(info))).collect()
    }

    /// How the tensor `name` is stored.
    ///
    /// # Errors
    /// When it is not there or has a dtype that libtorch lacks.
    pub fn kind(&self, name: &str) -> Result<Kind> {
        let dtype = self.info(name)?.dtype;
        kind_of(dtype).ok_or_else(|| RuntimeError::file(&self.path, format!("`{name}` is {dtype:?}")))
    }

    /// Reads the tensor `name` to the CPU.
    ///
    /// # Errors
    /// When it is not there or has a dtype that libtorch lacks.
    pub fn read(&self, name: &str) -> Result<Tensor> {
        let tensor = Tensor::f_empty(shape_of(self.info(name)?), (self.kind(name)?, Device::Cpu))?;
        self.copy_to(name, &tensor)?;
        Ok(tensor)
    }

    /// Copies the tensor `name` into `target`, whatever its kind and device, with little memory beside it.
    ///
    /// # Errors
    /// When it is not there, has another shape or a dtype that libtorch lacks.
    pub fn copy_to(&self, name: &str, target: &Tensor) -> Result<()> {
        let (info, kind) = (self.info(name)?, self.kind(name)?);
        let (shape, expected) = (shape_of(info), target.size());
        if shape != expected {
            let problem = format!("`{name}` has shape {shape:?}, expected {expected:?}");
            return Err(RuntimeError::file(&self.path, problem));
        }
        let mut begin = self.start + info.data_offsets.0;
        for mut part in parts(&target.detach()) {
            let bytes = part.numel() * kind.elt_size_in_bytes();
            let source = Tensor::f_from_data_size(&self.map[begin..begin + bytes], &part.size(), kind)?;
            part.f_copy_(&source)?;
            // Pages that were read count as memory of this process until they are given back.
            // SAFETY: nothing borrows the map, and a page that is read again is that of the file.
            unsafe { self.map.unchecked_advise_range(UncheckedAdvice::DontNeed, begin, bytes) }
                .map_err(|error| RuntimeError::file(&self.path, error))?;
            begin += bytes;
        }
        Ok(())
    }

    fn info(&self, name: &str) -> Result<&TensorInfo> {
        let info = self.metadata.info(name);
        info.ok_or_else(|| RuntimeError::file(&self.path, format!("`{name}` is missing")))
    }
}

fn shape_of(info: &TensorInfo) -> Vec<i64> {
    info.shape.iter().map(|&n| n as i64).collect()
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
        tensors.push(("one value".to_string(), base.get(1).get(2)));
        tensors.push(("no values".to_string(), base.narrow(0, 0, 0)));
        write_tensors(&file, &tensors).unwrap();
        let back = read_tensors(&file).unwrap();
        assert_eq!(back.len(), tensors.len());
        for (name, tensor) in back {
            let (_, expected) = tensors.iter().find(|(n, _)| *n == name).unwrap();
            assert_eq!(tensor.kind(), expected.kind());
            assert_eq!(&tensor, expected, "{name}");
        }
    }

    /// `[rows, 3]` counted up from 0, in three parts.
    fn long() -> Tensor {
        let rows = 2 * (PART / 3) + 5;
        let long = Tensor::arange(3 * rows, (Kind::Float, Device::Cpu)).reshape([rows, 3]);
        assert_eq!(parts(&long).len(), 3);
        long
    }

    #[test]
    fn parts_come_together_in_other_kinds_and_layouts() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        // Every other value of a row, so that nothing is in one piece.
        let wide = Tensor::zeros([long().size()[0], 6], (Kind::Float, Device::Cpu));
        let mut apart = wide.slice(1, 0, None::<i64>, 2);
        apart.copy_(&long());
        write_tensors_as(&path, &[("w".to_string(), apart)], Kind::BFloat16).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.read("w").unwrap(), long().to_kind(Kind::BFloat16));
        file.copy_to("w", &wide.narrow(1, 3, 3)).unwrap();
        assert_eq!(wide.narrow(1, 3, 3), long().to_kind(Kind::BFloat16).to_kind(Kind::Float));
        let message = file.copy_to("w", &wide).unwrap_err().to_string();
        assert!(message.contains("`w` has shape [699055, 3], expected [699055, 6]"), "{message}");
    }

    #[test]
    fn what_is_no_number_is_found_in_every_part() {
        assert!(is_finite(&long()));
        for row in [0, PART / 3 + 1, long().size()[0] - 1] {
            for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
                let long = long();
                let _ = long.get(row).fill_(value);
                assert!(!is_finite(&long), "{value} in row {row}");
            }
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
