//! The codes of one picture, as files of NumPy hold them, and pictures of any size to such codes and back.

use m6_data::{Array, Element, Rgb8};
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;
use crate::error::{Result, VqganError};
use crate::model::{Tiling, Vqgan};
use crate::pictures::{bytes_to_pictures, pictures_to_tensor, to_bytes};
use crate::tiles::Area;

/// Codes of one picture.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeGrid {
    /// Rows of codes.
    pub rows: usize,
    /// Codes a row.
    pub columns: usize,
    /// `rows * columns` codes, row by row.
    pub codes: Vec<i64>,
}

impl CodeGrid {
    /// The codes as an `npy` file: `[rows, columns]`, int64, which is what indexes take in NumPy and torch.
    ///
    /// # Errors
    /// Never for a grid whose codes are as many as its places.
    pub fn to_npy(&self) -> Result<Vec<u8>> {
        let bytes: Vec<u8> = self.codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        let shape = vec![self.rows, self.columns];
        Ok(Array { element: Element::I64, shape, bytes: &bytes }.to_npy()?)
    }

    /// Reads an `npy` file of `[rows, columns]` integers of any width.
    ///
    /// # Errors
    /// When it is damaged, or of another shape or element.
    pub fn from_npy(bytes: &[u8]) -> Result<Self> {
        let array = Array::read_npy(bytes)?;
        let &[rows, columns] = array.shape.as_slice() else {
            return Err(VqganError::Codes(format!("shape {:?}, expected [rows, columns]", array.shape)));
        };
        if rows == 0 || columns == 0 {
            return Err(VqganError::Codes(format!("shape [{rows}, {columns}], expected at least one code")));
        }
        Ok(Self { rows, columns, codes: integers(&array)? })
    }

    /// The codes as the model takes them, `[1, rows * columns]`.
    fn tensor(&self) -> Tensor {
        Tensor::from_slice(&self.codes).view([1, -1])
    }
}

/// The elements of an array of integers.
fn integers(array: &Array) -> Result<Vec<i64>> {
    let is_signed = match array.element {
        Element::I8 | Element::I16 | Element::I32 | Element::I64 => true,
        Element::U8 | Element::U16 | Element::U32 | Element::U64 => false,
        other => return Err(VqganError::Codes(format!("elements {other:?}, expected integers"))),
    };
    let integer = |bytes: &[u8]| {
        let is_negative = is_signed && bytes.last().is_some_and(|byte| byte >> 7 == 1);
        let mut wide = [if is_negative { u8::MAX } else { 0 }; size_of::<i64>()];
        wide[..bytes.len()].copy_from_slice(bytes);
        i64::from_le_bytes(wide)
    };
    Ok(array.bytes.chunks_exact(array.element.size()).map(integer).collect())
}

impl Vqgan {
    /// Codes of a picture of any size. Where its sides are no multiples of the downsampling factor, it is continued to
    /// the right and below by its mirror image. Where its feature maps are large the outer levels are computed in tiles,
    /// with the same result in less memory and more time; after each tile `advance` gets the operations of its
    /// convolutions and those of all tiles.
    ///
    /// # Errors
    /// When a side is smaller than the factor.
    pub fn encode_picture(&self, picture: &Rgb8, mut advance: impl FnMut(u64, u64)) -> Result<CodeGrid> {
        let bytes = self.padded(picture)?;
        let factor = self.config().downsample();
        let codes = self.encode_large(&bytes, Tiling::DEFAULT, &mut advance)?;
        let [.., height, width] = bytes.size()[..] else { unreachable!("pictures have four axes") };
        let codes = Vec::<i64>::try_from(codes.view([-1]))?;
        Ok(CodeGrid { rows: (height / factor) as usize, columns: (width / factor) as usize, codes })
    }

    /// The picture of `grid`, whose sides are those of the grid times the downsampling factor. Tiles are as in
    /// [`Vqgan::encode_picture`].
    ///
    /// # Errors
    /// When a code is not in the codebook.
    pub fn decode_picture(&self, grid: &CodeGrid, mut advance: impl FnMut(u64, u64)) -> Result<Rgb8> {
        let (rows, columns) = (grid.rows as i64, grid.columns as i64);
        let factor = self.config().downsample();
        let picture =
            Tensor::f_empty([1, COLOURS, rows * factor, columns * factor], (Kind::Uint8, Device::Cpu))?;
        let write = |area: Area, pixels: &Tensor| area.of(&picture).copy_(&to_bytes(pixels));
        self.decode_large(&grid.tensor(), (rows, columns), Tiling::DEFAULT, &mut advance, write)?;
        Ok(bytes_to_pictures(&picture).remove(0))
    }

    /// Bytes `[1, 3, h, w]` with sides in multiples of the downsampling factor.
    fn padded(&self, picture: &Rgb8) -> Result<Tensor> {
        let (width, height) = (i64::from(picture.width), i64::from(picture.height));
        let factor = self.config().downsample();
        if width < factor || height < factor {
            let reason =
                format!("{width}x{height}, expected at least {factor}x{factor}, the pixels of one code");
            return Err(VqganError::Pictures(reason));
        }
        let bytes = pictures_to_tensor(std::slice::from_ref(picture))?;
        let missing = |side: i64| (factor - side % factor) % factor;
        let (right, below) = (missing(width), missing(height));
        if (right, below) == (0, 0) {
            return Ok(bytes);
        }
        // libtorch mirrors floating point numbers only, which hold every byte.
        Ok(bytes.to_kind(Kind::Float).f_reflection_pad2d([0, right, 0, below])?.to_kind(Kind::Uint8))
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::Params;
    use proptest::prelude::*;

    use super::*;
    use crate::config::tests::tiny;
    use crate::pictures::{to_pictures, to_unit};

    fn model() -> Vqgan {
        Vqgan::new(&Params::new(Device::Cpu, 1), &tiny())
    }

    fn picture(width: u32, height: u32) -> Rgb8 {
        Rgb8 { width, height, pixels: (0..width * height * 3).map(|i| (i * 37 % 251) as u8).collect() }
    }

    #[test]
    fn a_picture_of_any_size_is_continued_by_its_mirror_image() {
        let model = model();
        let odd = picture(17, 21);
        let padded = to_pictures(&to_unit(&model.padded(&odd).unwrap(), Device::Cpu).unwrap()).remove(0);
        assert_eq!((padded.width, padded.height), (18, 22));
        assert_eq!(padded.crop(0, 0, 17, 21).unwrap(), odd);
        let column = |x| padded.crop(x, 0, 1, 22).unwrap();
        assert_eq!(column(17), column(15));
        let grid = model.encode_picture(&odd, |_, _| ()).unwrap();
        assert_eq!((grid.rows, grid.columns, grid.codes.len()), (11, 9, 99));
        assert_eq!(grid, model.encode_picture(&padded, |_, _| ()).unwrap());
        let decoded = model.decode_picture(&grid, |_, _| ()).unwrap();
        assert_eq!((decoded.width, decoded.height), (18, 22));
    }

    #[test]
    fn a_picture_of_less_than_a_code_is_refused() {
        let message = model().encode_picture(&picture(40, 1), |_, _| ()).unwrap_err().to_string();
        assert_eq!(message, "pictures: 40x1, expected at least 2x2, the pixels of one code");
        assert_eq!(model().encode_picture(&picture(2, 2), |_, _| ()).unwrap().codes.len(), 1);
    }

    #[test]
    fn codes_of_any_integers_are_read_and_others_refused() {
        let read = |element, shape: &[usize], bytes: &[u8]| {
            let npy = Array { element, shape: shape.to_vec(), bytes }.to_npy().unwrap();
            CodeGrid::from_npy(&npy).map(|grid| grid.codes).map_err(|error| error.to_string())
        };
        assert_eq!(read(Element::U16, &[1, 2], &[1, 2, 255, 255]), Ok(vec![513, 65535]));
        assert_eq!(read(Element::I8, &[2, 1], &[5, 255]), Ok(vec![5, -1]));
        assert_eq!(read(Element::U32, &[1, 1], &[0, 0, 0, 128]), Ok(vec![1 << 31]));
        assert_eq!(
            read(Element::U8, &[2], &[5, 6]),
            Err("codes: shape [2], expected [rows, columns]".to_owned())
        );
        assert_eq!(
            read(Element::U8, &[0, 3], &[]),
            Err("codes: shape [0, 3], expected at least one code".to_owned())
        );
        assert_eq!(
            read(Element::F32, &[1, 1], &[0; 4]),
            Err("codes: elements F32, expected integers".to_owned())
        );
        assert!(CodeGrid::from_npy(b"nothing").unwrap_err().to_string().contains("broken npy"));
        let grid = CodeGrid { rows: 1, columns: 2, codes: vec![0, 32] };
        let message = model().decode_picture(&grid, |_, _| ()).unwrap_err().to_string();
        assert_eq!(message, "codes: 0 to 32, expected 0 to 31");
    }

    proptest! {
        #[test]
        fn grids_come_back(rows in 1..5usize, columns in 1..5usize, start in 0..1_000_000i64) {
            let grid = CodeGrid { rows, columns, codes: (start..start + (rows * columns) as i64).collect() };
            prop_assert_eq!(CodeGrid::from_npy(&grid.to_npy().unwrap()).unwrap(), grid);
        }
    }
}
