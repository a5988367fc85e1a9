//! Members beside pictures and texts: labels (`cls`), NumPy arrays (`npy`) and named tensors (`safetensors`).

use std::collections::BTreeMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::error::{DataError, Result};
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

    /// By NumPy's name without its byte order, such as `f4`.
    fn of_numpy(name: &str) -> Option<Self> {
        Some(match name {
            "b1" => Self::Bool,
            "i1" => Self::I8,
            "i2" => Self::I16,
            "i4" => Self::I32,
            "i8" => Self::I64,
            "u1" => Self::U8,
            "u2" => Self::U16,
            "u4" => Self::U32,
            "u8" => Self::U64,
            "f2" => Self::F16,
            "f4" => Self::F32,
            "f8" => Self::F64,
            _ => return None,
        })
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
    fn new(element: Element, shape: Vec<usize>, bytes: &'a [u8]) -> std::result::Result<Self, String> {
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

    /// Reads an `npy` file of version 1 to 3 with little-endian numbers or booleans in C order.
    ///
    /// # Errors
    /// Another format, order or element, or damage.
    pub fn read_npy(bytes: &'a [u8]) -> Result<Self> {
        let read = || {
            let (header, data) = split_npy(bytes)?;
            let (element, shape) = NpyHeader { rest: header }.parse()?;
            Self::new(element, shape, data)
        };
        read().map_err(|reason| DataError::Member { kind: "npy", reason })
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
            check(extension, bytes).map_err(|error| self.error(format!("its .{extension}: {error}")))
        })
    }

    fn read<'a, T>(&'a self, extension: &str, read: impl FnOnce(&'a [u8]) -> Result<T>) -> Result<Option<T>> {
        self.member(extension).map(read).transpose().map_err(|error| self.error(error.to_string()))
    }
}

/// Header and data of an `npy` file.
fn split_npy(bytes: &[u8]) -> std::result::Result<(&str, &[u8]), String> {
    const MAGIC: &[u8] = b"\x93NUMPY";
    let cut = || "it ends inside its header".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or("expected NumPy's mark at its begin")?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
    let (length, rest) = match version {
        [1, 0] => rest.split_first_chunk().map(|(length, rest)| (u16::from_le_bytes(*length).into(), rest)),
        [2 | 3, 0] => rest.split_first_chunk().map(|(length, rest)| (u32::from_le_bytes(*length), rest)),
        [major, minor] => return Err(format!("version {major}.{minor}, expected 1.0, 2.0 or 3.0")),
    }
    .ok_or_else(cut)?;
    let (header, data) = rest.split_at_checked(length as usize).ok_or_else(cut)?;
    // Nothing that is read out of a header needs more than ASCII.
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;
    Ok((header, data))
}

/// The header of an `npy` file: a Python dictionary of `descr`, `fortran_order` and `shape`.
struct NpyHeader<'a> {
    rest: &'a str,
}

impl<'a> NpyHeader<'a> {
    fn parse(mut self) -> std::result::Result<(Element, Vec<usize>), String> {
        let (mut element, mut is_fortran, mut shape) = (None, None, None);
        self.expect('{')?;
        while !self.accept('}') {
            let key = self.string()?;
            self.expect(':')?;
            match key {
                "descr" => element = Some(self.element()?),
                "fortran_order" => is_fortran = Some(self.boolean()?),
                "shape" => shape = Some(self.shape()?),
                _ => return Err(format!("its header has the unknown key {key}")),
            }
            if !self.accept(',') {
                self.expect('}')?;
                break;
            }
        }
        if !self.rest.trim_start().is_empty() {
            return Err("its header goes on after its end".to_owned());
        }
        match (element, is_fortran, shape) {
            (Some(_), Some(true), Some(_)) => Err("Fortran order, expected C order".to_owned()),
            (Some(element), Some(false), Some(shape)) => Ok((element, shape)),
            _ => Err("its header lacks descr, fortran_order or shape".to_owned()),
        }
    }

    fn accept(&mut self, mark: char) -> bool {
        let rest = self.rest.trim_start().strip_prefix(mark);
        self.rest = rest.unwrap_or(self.rest);
        rest.is_some()
    }

    fn expect(&mut self, mark: char) -> std::result::Result<(), String> {
        self.accept(mark).then_some(()).ok_or_else(|| format!("its header lacks a {mark}"))
    }

    fn string(&mut self) -> std::result::Result<&'a str, String> {
        let text = self.rest.trim_start();
        let quoted = ['\'', '"'].iter().find_map(|&quote| text.strip_prefix(quote)?.split_once(quote));
        let (string, rest) = quoted.ok_or("its header lacks a string")?;
        self.rest = rest;
        Ok(string)
    }

    /// Letters and digits.
    fn word(&mut self) -> &'a str {
        let text = self.rest.trim_start();
        let end = text.find(|c: char| !c.is_ascii_alphanumeric()).unwrap_or(text.len());
        let (word, rest) = text.split_at(end);
        self.rest = rest;
        word
    }

    fn element(&mut self) -> std::result::Result<Element, String> {
        if self.rest.trim_start().starts_with('[') {
            return Err("elements of several fields, expected numbers or booleans".to_owned());
        }
        let name = self.string()?;
        let element = name.strip_prefix(['<', '|']).and_then(Element::of_numpy);
        // Of a single byte the order is `|`, and `<` says the same.
        let element = element.filter(|element| element.size() == 1 || name.starts_with('<'));
        element.ok_or_else(|| {
            format!("elements {name:?}, expected one of <f2 <f4 <f8 |i1 <i2 <i4 <i8 |u1 <u2 <u4 <u8 |b1")
        })
    }

    fn boolean(&mut self) -> std::result::Result<bool, String> {
        match self.word() {
            "True" => Ok(true),
            "False" => Ok(false),
            other => Err(format!("fortran_order = {other}, expected True or False")),
        }
    }

    fn shape(&mut self) -> std::result::Result<Vec<usize>, String> {
        let mut shape = Vec::new();
        self.expect('(')?;
        while !self.accept(')') {
            let side = self.word();
            shape.push(
                side.parse().map_err(|_| format!("a side of its shape is {side:?}, expected a number"))?,
            );
            if !self.accept(',') {
                self.expect(')')?;
                break;
            }
        }
        Ok(shape)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shard::ShardSet;
    use crate::testing::shard;
    use proptest::prelude::*;

    // Written by `numpy.lib.format.write_array` of NumPy 2.4.
    const F4: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1, 3), }                                                          \n\x00\x00\xc0?\x00\x00\x00\xc0\x00\x00\x80>";
    const F2: &[u8] = b"\x93NUMPY\x02\x00t\x00\x00\x00{'descr': '<f2', 'fortran_order': False, 'shape': (2,), }                                                          \n\x00>\x00\xc0";
    const I8: &[u8] = b"\x93NUMPY\x03\x00t\x00\x00\x00{'descr': '<i8', 'fortran_order': False, 'shape': (), }                                                            \n\xfd\xff\xff\xff\xff\xff\xff\xff";
    const B1: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '|b1', 'fortran_order': False, 'shape': (2,), }                                                            \n\x01\x00";
    const U2: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '<u2', 'fortran_order': False, 'shape': (2, 0), }                                                          \n";
    const FORTRAN: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '|i1', 'fortran_order': True, 'shape': (2, 2), }                                                           \n\x01\x01\x01\x01";
    const BIG_ENDIAN: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '>i4', 'fortran_order': False, 'shape': (1,), }                                                            \n\x00\x00\x00\x01";
    const FIELDS: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': [('a', '<i4')], 'fortran_order': False, 'shape': (1,), }                                                   \n\x00\x00\x00\x00";
    const STRINGS: &[u8] = b"\x93NUMPY\x01\x00v\x00{'descr': '<U2', 'fortran_order': False, 'shape': (1,), }                                                            \na\x00\x00\x00b\x00\x00\x00";

    /// Version 1 with this header.
    fn npy(header: &str, data: &[u8]) -> Vec<u8> {
        let length = (header.len() as u16).to_le_bytes();
        [b"\x93NUMPY\x01\x00", &length[..], header.as_bytes(), data].concat()
    }

    fn tensors(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
    }

    #[test]
    fn arrays_that_numpy_wrote() {
        for (bytes, element, shape, data) in [
            (F4, Element::F32, &[1, 3][..], [1.5f32, -2.0, 0.25].map(f32::to_le_bytes).concat()),
            (F2, Element::F16, &[2], [0x3e00u16, 0xc000].map(u16::to_le_bytes).concat()),
            (I8, Element::I64, &[], (-3i64).to_le_bytes().to_vec()),
            (B1, Element::Bool, &[2], vec![1, 0]),
            (U2, Element::U16, &[2, 0], vec![]),
        ] {
            let array = Array::read_npy(bytes).unwrap();
            assert_eq!(array, Array { element, shape: shape.to_vec(), bytes: &data });
        }
    }

    #[test]
    fn headers_of_others_are_read() {
        let header = r#"{"shape":(2,),"fortran_order":False,"descr":"<i1"}"#;
        let array = npy(header, b"\xff\x01");
        let array = Array::read_npy(&array).unwrap();
        assert_eq!((array.element, array.shape, array.bytes), (Element::I8, vec![2], &b"\xff\x01"[..]));
    }

    #[test]
    fn other_and_damaged_arrays_are_refused() {
        let header = |descr: &str, shape: &str| {
            npy(&format!("{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"), b"\x02")
        };
        for (bytes, expected) in [
            (FORTRAN.to_vec(), "Fortran order, expected C order"),
            (BIG_ENDIAN.to_vec(), "elements \">i4\", expected one of"),
            (STRINGS.to_vec(), "elements \"<U2\", expected one of"),
            (FIELDS.to_vec(), "elements of several fields"),
            (F4[..F4.len() - 1].to_vec(), "11 bytes of data, which do not fill [1, 3] of F32"),
            (F4[..100].to_vec(), "it ends inside its header"),
            (F4[..9].to_vec(), "it ends inside its header"),
            (b"NUMPY".to_vec(), "expected NumPy's mark"),
            (b"\x93NUMPY\x04\x00".to_vec(), "version 4.0"),
            (header("'|b1'", "(1,)"), "a boolean that is neither 0 nor 1"),
            (header("'|u4'", "(1,)"), "elements \"|u4\""),
            (header("'|u1'", "(-1,)"), "a side of its shape is \"\""),
            (header("'|u1'", "(2 3)"), "its header lacks a )"),
            (header("'|u1'", "(4294967296, 4294967296)"), "do not fill"),
            (header("'|u1'", "(1,)} x"), "goes on after its end"),
            (header("'|u1'", "(1,), 'x': 1"), "the unknown key x"),
            (npy("{}", b""), "lacks descr, fortran_order or shape"),
        ] {
            let error = Array::read_npy(&bytes).unwrap_err().to_string();
            assert!(error.starts_with("broken npy: ") && error.contains(expected), "{error}");
        }
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
        let path = shard(
            dir.path(),
            &[
                ("a", &[("cls", b"3"), ("depth.npy", F4), ("safetensors", &file)]),
                ("b", &[("cls", b"three")]),
            ],
        );
        let set = ShardSet::open(&[path.display().to_string()]).unwrap();
        let (a, b) = (set.sample(0).unwrap(), set.sample(1).unwrap());
        assert_eq!(a.class().unwrap(), Some(3));
        assert_eq!(a.array("depth.npy").unwrap(), Some(Array::read_npy(F4).unwrap()));
        assert_eq!((a.array("npy").unwrap(), b.tensors("safetensors").unwrap()), (None, None));
        assert_eq!(a.tensors("safetensors").unwrap(), Some(BTreeMap::new()));
        let error = b.class().unwrap_err().to_string();
        assert!(error.starts_with("sample b of ") && error.contains("broken cls"), "{error}");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = (read_class(&bytes), Array::read_npy(&bytes), read_safetensors(&bytes));
        }

        #[test]
        fn any_header_is_survived(header in "[{}()\\[\\]'\",:<|0-9a-z ]{0,60}", data in "[ab]{0,8}") {
            let _ = read_safetensors(&tensors(&header, data.as_bytes()));
            let _ = Array::read_npy(&npy(&header, data.as_bytes()));
        }

        #[test]
        fn damaged_files_are_survived(at in 0..F4.len(), byte in any::<u8>(), length in 0..=F4.len()) {
            let mut bytes = F4[..length].to_vec();
            if let Some(damaged) = bytes.get_mut(at) {
                *damaged = byte;
            }
            if let Ok(array) = Array::read_npy(&bytes) {
                prop_assert_eq!(array.bytes.len(), array.element.size() * array.shape.iter().product::<usize>());
            }
        }
    }
}
