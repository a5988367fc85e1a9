//! `npy` files: one array each, as NumPy writes them.

use crate::error::{DataError, Result};
use crate::member::{Array, Element};

const MAGIC: &[u8] = b"\x93NUMPY";
/// NumPy has the data begin at a multiple of this.
const ALIGNMENT: usize = 64;
const VERSION_1: [u8; 2] = [1, 0];

/// NumPy's names without their byte order.
const NAMES: [(&str, Element); 12] = [
    ("b1", Element::Bool),
    ("i1", Element::I8),
    ("i2", Element::I16),
    ("i4", Element::I32),
    ("i8", Element::I64),
    ("u1", Element::U8),
    ("u2", Element::U16),
    ("u4", Element::U32),
    ("u8", Element::U64),
    ("f2", Element::F16),
    ("f4", Element::F32),
    ("f8", Element::F64),
];

impl<'a> Array<'a> {
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

    /// The array as an `npy` file of version 1.
    ///
    /// # Errors
    /// Elements that NumPy does not have, or more dimensions than fit into the header.
    pub fn to_npy(&self) -> Result<Vec<u8>> {
        let fail = |reason: String| DataError::Member { kind: "npy", reason };
        let name = NAMES.iter().find(|(_, element)| *element == self.element).map(|(name, _)| name);
        let name = name.ok_or_else(|| fail(format!("NumPy has no {:?}", self.element)))?;
        let order = if self.element.size() == 1 { '|' } else { '<' };
        let sides: Vec<String> = self.shape.iter().map(usize::to_string).collect();
        let mut shape = sides.join(", ");
        // A tuple of one.
        shape.extend((sides.len() == 1).then_some(','));
        let mut header =
            format!("{{'descr': '{order}{name}', 'fortran_order': False, 'shape': ({shape}), }}");
        let start = MAGIC.len() + VERSION_1.len() + size_of::<u16>();
        let end = (start + header.len() + 1).next_multiple_of(ALIGNMENT);
        header.extend(std::iter::repeat_n(' ', end - start - header.len() - 1).chain(['\n']));
        let length = u16::try_from(header.len()).map_err(|_| fail("too many dimensions".to_owned()))?;
        Ok([MAGIC, &VERSION_1, &length.to_le_bytes(), header.as_bytes(), self.bytes].concat())
    }
}

/// Header and data of an `npy` file.
fn split_npy(bytes: &[u8]) -> std::result::Result<(&str, &[u8]), String> {
    let cut = || "it ends inside its header".to_owned();
    let rest = bytes.strip_prefix(MAGIC).ok_or("expected NumPy's mark at its begin")?;
    let (version, rest) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
    let (length, rest) = match version {
        &VERSION_1 => {
            rest.split_first_chunk().map(|(length, rest)| (u16::from_le_bytes(*length).into(), rest))
        }
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
        let bare = name.strip_prefix(['<', '|']).unwrap_or(name);
        let element = NAMES.iter().find(|(name, _)| *name == bare).map(|(_, element)| *element);
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
    fn what_is_written_is_what_numpy_writes() {
        for bytes in [F4, B1, U2] {
            assert_eq!(Array::read_npy(bytes).unwrap().to_npy().unwrap(), bytes);
        }
        let bf16 = Array { element: Element::BF16, shape: vec![0], bytes: &[] };
        assert!(bf16.to_npy().unwrap_err().to_string().contains("NumPy has no BF16"));
    }

    proptest! {
        #[test]
        fn any_header_is_survived(header in "[{}()\\[\\]'\",:<|0-9a-z ]{0,60}", data in "[ab]{0,8}") {
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

        #[test]
        fn arrays_come_back(shape in proptest::collection::vec(0..4_usize, 0..5), fill in any::<u8>()) {
            let bytes = vec![fill; 2 * shape.iter().product::<usize>()];
            let array = Array { element: Element::U16, shape, bytes: &bytes };
            let written = array.to_npy().unwrap();
            prop_assert_eq!(Array::read_npy(&written).unwrap(), array);
        }
    }
}
