//! The zip files that `torch.save` writes: a pickle that describes the tensors, and a file of numbers for each storage.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};

use tch::{Kind, Tensor};
use zip::ZipArchive;

use crate::error::{Result, RuntimeError};
use crate::pickle::{Element, Pickle, StridedTensor, Value};

/// The file that describes the tensors.
const PICKLE: &str = "data.pkl";
/// A pickle that describes tensors is some hundred kilobytes long.
const MAX_PICKLE: u64 = 1 << 26;
/// Where checkpoints of training programs keep their state dict; averaged weights are taken first, as LlamaGen does.
const STATE_DICTS: [&str; 3] = ["ema", "model", "state_dict"];

/// A zip file of `torch.save`.
#[derive(Debug)]
pub(crate) struct TorchFile {
    path: PathBuf,
    zip: RefCell<ZipArchive<BufReader<File>>>,
    /// The archive's folder, which all its files are in.
    folder: String,
    tensors: BTreeMap<String, StridedTensor>,
    /// What the state dict holds under a name that is no tensor, by the class it is of.
    others: BTreeMap<String, String>,
}

impl TorchFile {
    /// Opens a file and reads its state dict, without the numbers.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let problem = |reason: &dyn std::fmt::Display| RuntimeError::file(path, reason);
        let file = File::open(path).map_err(|error| problem(&error))?;
        let mut zip = ZipArchive::new(BufReader::new(file)).map_err(|error| problem(&error))?;
        let name = zip.file_names().flatten().find(|name| name.ends_with(PICKLE));
        let folder = name.and_then(|name| Some(name.strip_suffix(PICKLE)?.to_owned()));
        let folder = folder.ok_or_else(|| problem(&"holds no `data.pkl`, expected a file of torch.save"))?;
        if read(&mut zip, &format!("{folder}byteorder"), MAX_PICKLE).is_ok_and(|order| order == b"big") {
            return Err(problem(&"was written on a big-endian machine, expected little-endian numbers"));
        }
        let bytes =
            read(&mut zip, &format!("{folder}{PICKLE}"), MAX_PICKLE).map_err(|error| problem(&error))?;
        let pickle = Pickle::parse(&bytes).map_err(|error| problem(&error))?;
        let (mut tensors, mut others) = (BTreeMap::new(), BTreeMap::new());
        for (name, value) in pickle.members(state_dict(&pickle)) {
            match value {
                Value::Tensor(tensor) => drop(tensors.insert(name.to_owned(), tensor.clone())),
                Value::Opaque(class) => drop(others.insert(name.to_owned(), class.clone())),
                _ => {}
            }
        }
        if tensors.is_empty() {
            let expected =
                "holds no tensors by name, expected a state dict, alone or as `ema`, `model` or `state_dict`";
            return Err(problem(&expected));
        }
        Ok(Self { path: path.to_owned(), zip: RefCell::new(zip), folder, tensors, others })
    }

    /// Names and shapes.
    pub(crate) fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        // A length that does not fit is no network's, and the tensor is not read.
        let shape = |tensor: &StridedTensor| {
            tensor.shape.iter().map(|&n| i64::try_from(n).unwrap_or(i64::MAX)).collect()
        };
        self.tensors.iter().map(|(name, tensor)| (name.clone(), shape(tensor))).collect()
    }

    /// The class of what stands under `name` and is no tensor.
    pub(crate) fn other(&self, name: &str) -> Option<&str> {
        self.others.get(name).map(String::as_str)
    }

    /// Reads the tensor `name`.
    pub(crate) fn read(&self, name: &str) -> Result<Tensor> {
        let problem = |reason: String| RuntimeError::file(&self.path, format!("`{name}` {reason}"));
        let tensor = self.tensors.get(name).ok_or_else(|| problem("is missing".into()))?;
        let span = tensor.span().ok_or_else(|| problem("does not lie in its storage".into()))?;
        let kind = kind_of(tensor.storage.element);
        let entry = format!("{}data/{}", self.folder, tensor.storage.key);
        let width = kind.elt_size_in_bytes() as u64;
        let expected = tensor.storage.len.checked_mul(width);
        let bytes = read(&mut self.zip.borrow_mut(), &entry, expected.unwrap_or(0))
            .map_err(|error| problem(format!("in `{entry}`: {error}")))?;
        if Some(bytes.len() as u64) != expected {
            let reason =
                format!("in `{entry}`: {} bytes, expected {} numbers", bytes.len(), tensor.storage.len);
            return Err(problem(reason));
        }
        // All are at most the length of `bytes`, as `span` has checked.
        let (first, last) = ((tensor.offset * width) as usize, ((tensor.offset + span) * width) as usize);
        let signed = |sizes: &[u64]| sizes.iter().map(|&n| n as i64).collect::<Vec<_>>();
        let numbers = Tensor::f_from_data_size(&bytes[first..last], &[span as i64], kind)?;
        Ok(numbers.f_as_strided(signed(&tensor.shape), signed(&tensor.strides), None)?.f_contiguous()?)
    }
}

/// The dict that holds the tensors.
fn state_dict(pickle: &Pickle) -> &Value {
    let root = pickle.root();
    let has_tensors = |value: &Value| pickle.members(value).any(|(_, v)| matches!(v, Value::Tensor(_)));
    let member = |key: &str| pickle.members(root).find(|&(name, value)| name == key && has_tensors(value));
    STATE_DICTS.iter().find_map(|key| member(key)).map_or(root, |(_, value)| value)
}

/// The file `name` of at most `limit` bytes, checked against its checksum.
fn read(
    zip: &mut ZipArchive<BufReader<File>>,
    name: &str,
    limit: u64,
) -> std::result::Result<Vec<u8>, String> {
    let file = zip.by_name(name).map_err(|error| error.to_string())?;
    if file.size() > limit {
        return Err(format!("{} bytes, expected at most {limit}", file.size()));
    }
    let mut bytes = Vec::new();
    // The checksum is compared at the end of the file, which has to be reached.
    file.take(limit.saturating_add(1)).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    Ok(bytes)
}

fn kind_of(element: Element) -> Kind {
    match element {
        Element::F64 => Kind::Double,
        Element::F32 => Kind::Float,
        Element::F16 => Kind::Half,
        Element::Bf16 => Kind::BFloat16,
        Element::I64 => Kind::Int64,
        Element::I32 => Kind::Int,
        Element::I16 => Kind::Int16,
        Element::U8 => Kind::Uint8,
        Element::Bool => Kind::Bool,
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    /// A checkpoint that torch wrote, as `tests/odd.py` describes it.
    fn odd() -> TorchFile {
        TorchFile::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/odd.pt")).unwrap()
    }

    #[test]
    fn every_kind_of_tensor_is_read() {
        let file = odd();
        let grid = Tensor::arange(12, (Kind::Float, Device::Cpu)).reshape([3, 4]) / 7.0;
        for (name, expected) in [
            ("float", grid.copy()),
            ("half", grid.to_kind(Kind::Half)),
            ("bfloat", grid.to_kind(Kind::BFloat16)),
            ("double", grid.to_kind(Kind::Double)),
            ("long", grid.to_kind(Kind::Int64)),
            ("transposed", grid.tr()),
            ("part", grid.narrow(0, 1, 2).narrow(1, 2, 2)),
            ("scalar", grid.get(2).get(3)),
            ("empty", grid.narrow(0, 0, 0)),
            ("channels_last", grid.reshape([1, 2, 2, 3])),
            ("parameter", grid.copy()),
        ] {
            let tensor = file.read(name).unwrap();
            assert_eq!((tensor.kind(), tensor.size()), (expected.kind(), expected.size()), "{name}");
            assert_eq!(tensor, expected, "{name}");
            assert_eq!(file.shapes()[name], expected.size());
        }
        assert_eq!(file.shapes().len(), 11);
    }

    #[test]
    fn what_is_no_tensor_is_known_by_its_maker() {
        let file = odd();
        assert_eq!(file.other("complex"), Some("torch._utils._rebuild_tensor_v2"));
        assert_eq!((file.other("epoch"), file.other("float")), (None, None));
        assert!(file.read("complex").unwrap_err().to_string().ends_with("odd.pt: `complex` is missing"));
    }

    #[test]
    fn damaged_numbers_are_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let mut bytes = std::fs::read(odd().path).unwrap();
        let third = (2.0f32 / 7.0).to_le_bytes();
        let place = bytes.windows(4).position(|window| window == third).unwrap();
        bytes[place] ^= 1;
        let path = dir.path().join("damaged.pt");
        std::fs::write(&path, bytes).unwrap();
        let file = TorchFile::open(&path).unwrap();
        let message = file.read("float").unwrap_err().to_string();
        assert!(message.contains("`float` in `odd/data/"), "{message}");
        assert!(message.ends_with("Invalid checksum"), "{message}");
    }
}
