//! Members beside pictures and texts: labels (`cls`), arrays (`npy`, whose format is in the file `npy.rs`) and named tensors
//! (`safetensors`).

use std::collections::BTreeMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{DataError, Result};
use crate::flaw::FlawClass;
use crate::shard::Sample;

/// What an array is made of; in memory little endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// A byte that is 0 or 1.
    Bool,
    /// 8-bit signed.
    I8,
    /// 16-bit signed.
    I16,
    /// 32-bit signed.
    I32,
    /// 64-bit signed.
    I64,
    /// 8-bit unsigned.
    U8,
    /// 16-bit unsigned.
    U16,
    /// 32-bit unsigned.
    U32,
    /// 64-bit unsigned.
    U64,
    /// Half precision.
    F16,
    /// bfloat16; not in NumPy.
    BF16,
    /// Single precision.
    F32,
    /// Double precision.
    F64,
}

impl Element {
    /// Size in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Bool | Self::I8 | Self::U8 => 1,
            Self::I16 | Self::U16 | Self::F16 | Self::BF16 => 2,
            Self::I32 | Self::U32 | Self::F32 => 4,
            Self::I64 | Self::U64 | Self::F64 => 8,
        }
    }

    fn of_safetensors(dtype: Dtype) -> Option<Self> {
        Some(match dtype {
            Dtype::BOOL => Self::Bool,
            Dtype::I8 => Self::I8,
            Dtype::I16 => Self::I16,
            Dtype::I32 => Self::I32,
            Dtype::I64 => Self::I64,
            Dtype::U8 => Self::U8,
            Dtype::U16 => Self::U16,
            Dtype::U32 => Self::U32,
            Dtype::U64 => Self::U64,
            Dtype::F16 => Self::F16,
            Dtype::BF16 => Self::BF16,
            Dtype::F32 => Self::F32,
            Dtype::F64 => Self::F64,
            _ => return None,
        })
    }
}

/// An array that lies in the bytes of its member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Array<'a> {
    /// Type of its elements.
    pub element: Element,
    /// Its dimensions; none for a single number.
    pub shape: Vec<usize>,
    /// The elements, little endian, the last dimension fastest.
    pub bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Checks that the bytes are as many as the shape says, and 0 or 1 where they stand for booleans.
    pub(crate) fn new(
        element: Element,
        shape: Vec<usize>,
        bytes: &'a [u8],
    ) -> std::result::Result<Self, String> {
        let size = shape.iter().try_fold(element.size(), |size, &side| size.checked_mul(side));
        if size != Some(bytes.len()) {
            let found = bytes.len();
            return Err(format!("{found} bytes of data, which do not fill {shape:?} of {element:?}"));
        }
        if element == Element::Bool && bytes.iter().any(|&byte| byte > 1) {
            return Err("a boolean that is neither 0 nor 1".to_owned());
        }
        Ok(Self { element, shape, bytes })
    }
}

/// Reads the tensors of a `safetensors` file by name.
///
/// # Errors
/// Damage, or elements of another kind than [`Element`] has.
pub fn read_safetensors(bytes: &[u8]) -> Result<BTreeMap<String, Array<'_>>> {
    let fail = |reason: String| DataError::Member { kind: "safetensors", reason };
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| fail(e.to_string()))?;
    let named = tensors.tensors().into_iter().map(|(name, view)| {
        let array = array_of(&view).map_err(|reason| fail(format!("{name}: {reason}")))?;
        Ok((name, array))
    });
    named.collect()
}

fn array_of<'a>(view: &TensorView<'a>) -> std::result::Result<Array<'a>, String> {
    let element = Element::of_safetensors(view.dtype());
    let element = element
        .ok_or_else(|| format!("elements {:?}, expected integers, floats or booleans", view.dtype()))?;
    Array::new(element, view.shape().to_vec(), view.data())
}

/// Reads a `cls` file: a whole number in decimal digits, which white space may surround.
///
/// # Errors
/// Anything else.
pub fn read_class(bytes: &[u8]) -> Result<i64> {
    let class = std::str::from_utf8(bytes).ok().and_then(|text| text.trim().parse().ok());
    class
        .ok_or_else(|| DataError::Member { kind: "cls", reason: "expected a whole number, such as 7".into() })
}

/// Checks a member that this file can read, by the last part of its extension.
pub(crate) fn check(extension: &str, bytes: &[u8]) -> Result<()> {
    match extension.rsplit('.').next().unwrap_or(extension) {
        "cls" => read_class(bytes).map(drop),
        "npy" => Array::read_npy(bytes).map(drop),
        "safetensors" => read_safetensors(bytes).map(drop),
        _ => Ok(()),
    }
}

impl Sample<'_> {
    /// The label in the sample's `cls`, if it has one.
    ///
    /// # Errors
    /// Names the sample when that is no whole number.
    pub fn class(&self) -> Result<Option<i64>> {
        self.read("cls", read_class)
    }

    /// The array in the member with this extension, such as `npy` or `depth.npy`, if there is one.
    ///
    /// # Errors
    /// Names the sample, as for [`Array::read_npy`].
    pub fn array(&self, extension: &str) -> Result<Option<Array<'_>>> {
        self.read(extension, Array::read_npy)
    }

    /// The tensors in the member with this extension, such as `safetensors`, if there is one.
    ///
    /// # Errors
    /// Names the sample, as for [`read_safetensors`].
    pub fn tensors(&self, extension: &str) -> Result<Option<BTreeMap<String, Array<'_>>>> {
        self.read(extension, read_safetensors)
    }

    /// Checks every `cls`, `npy` and `safetensors`.
    ///
    /// # Errors
    /// Names the sample and the first that is damaged.
    pub(crate) fn check_members(&self) -> Result<()> {
        self.members().try_for_each(|(extension, bytes)| {
            check(extension, bytes)
                .map_err(|error| self.error(FlawClass::BrokenMember, format!("its .{extension}: {error}")))
        })
    }

    fn read<'a, T>(&'a self, extension: &str, read: impl FnOnce(&'a [u8]) -> Result<T>) -> Result<Option<T>> {
        let read = self.member(extension).map(read).transpose();
        read.map_err(|error| self.error(FlawClass::BrokenMember, error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardSet;
    use crate::testing::shard;
    use proptest::prelude::*;

    fn tensors(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn tensors_are_read_by_name() {
        let header = r#"{"b":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"BOOL","shape":[],"data_offsets":[4,5]}}"#;
        let file = tensors(header, b"\x80\x3f\x00\x00\x01");
        let read = read_safetensors(&file).unwrap();
        assert_eq!(read.keys().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(read["a"], Array { element: Element::Bool, shape: vec![], bytes: b"\x01" });
        assert_eq!(read["b"], Array { element: Element::BF16, shape: vec![2], bytes: b"\x80\x3f\x00\x00" });

        let complex = r#"{"z":{"dtype":"C64","shape":[0],"data_offsets":[0,0]}}"#;
        for (bytes, expected) in [
            (file[..file.len() - 1].to_vec(), "broken safetensors: "),
            (b"\xff\xff\xff\xff\xff\xff\xff\x7f".to_vec(), "broken safetensors: "),
            (tensors(header, b"\x80\x3f\x00\x00\x02"), "a: a boolean that is neither"),
            (tensors(complex, b""), "z: elements C64, expected"),
        ] {
            let error = read_safetensors(&bytes).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn labels_are_whole_numbers() {
        assert_eq!(read_class(b" 17\n").unwrap(), 17);
        assert_eq!(read_class(b"-1").unwrap(), -1);
        for bytes in [&b""[..], b"1.5", b"cat", b"\xff", b"99999999999999999999"] {
            let error = read_class(bytes).unwrap_err().to_string();
            assert_eq!(error, "broken cls: expected a whole number, such as 7");
        }
    }

    #[test]
    fn members_of_samples_are_read_and_broken_ones_name_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = tensors("{}", b"");
        let array = Array { element: Element::U16, shape: vec![1, 2], bytes: b"\x01\0\x02\0" };
        let depth = array.to_npy().unwrap();
        let path = shard(
            dir.path(),
            &[
                ("a", &[("cls", b"3"), ("depth.npy", &depth), ("safetensors", &file)]),
                ("b", &[("cls", b"three")]),
            ],
        );
        let set = ShardSet::open(&[path.display().to_string()]).unwrap();
        let (a, b) = (set.sample(0).unwrap(), set.sample(1).unwrap());
        assert_eq!(a.class().unwrap(), Some(3));
        assert_eq!(a.array("depth.npy").unwrap(), Some(array));
        assert_eq!((a.array("npy").unwrap(), b.tensors("safetensors").unwrap()), (None, None));
        assert_eq!(a.tensors("safetensors").unwrap(), Some(BTreeMap::new()));
        let error = b.class().unwrap_err().to_string();
        assert!(error.contains(", sample b: ") && error.contains("broken cls"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (read_class(&bytes), Array::read_npy(&bytes), read_safetensors(&bytes));
        }

        #[test]
        fn any_header_is_survived(header in "[{}()\\[\\]'\",:<|0-9a-z ]{0,60}", data in "[ab]{0,8}") {
            let _ = read_safetensors(&tensors(&header, data.as_bytes()));
        }
    }
}
