//! Codes as a member of each sample: `codes-HASH.npy`, `[views, grid, grid]` of 16-bit unsigned integers, where HASH is
//! that of the image tokenizer, so that codes of several tokenizers may lie side by side and none is taken for another's.

use m6_data::{Array, Element, FlawClass, Sample, ShardSet};
use m6_vqgan::Vqgan;
use rand::Rng;

use crate::error::{Error, Result};

const PREFIX: &str = "codes-";
const SUFFIX: &str = ".npy";

/// How a tokenizer's codes are found in samples.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CodeMember {
    extension: String,
    grid: usize,
    codebook_size: i64,
}

impl CodeMember {
    /// The member for codes of `vqgan`.
    ///
    /// # Errors
    /// When it has no weight file yet, so that nothing tells it from others.
    pub fn of(vqgan: &Vqgan) -> Result<Self> {
        let hash = vqgan.hash().ok_or_else(|| Error::Usage("vqgan: has no weight file yet".into()))?;
        let config = vqgan.config();
        let extension = format!("{PREFIX}{hash}{SUFFIX}");
        Ok(Self { extension, grid: config.grid() as usize, codebook_size: config.codebook_size })
    }

    /// The member's extension.
    pub fn extension(&self) -> &str {
        &self.extension
    }

    /// Checks that some sample of source `name` has such codes.
    ///
    /// # Errors
    /// Names the codes of another tokenizer, if it has those.
    pub fn check(&self, name: &str, shards: &ShardSet) -> Result<()> {
        if (0..shards.len()).any(|index| shards.has(index, &self.extension)) {
            return Ok(());
        }
        let is_code = |extension: &&str| extension.starts_with(PREFIX) && extension.ends_with(SUFFIX);
        let other = (0..shards.len()).find_map(|index| shards.extensions(index).find(is_code));
        let has = other.map_or("no codes".to_owned(), |other| format!("codes of another tokenizer, {other}"));
        Err(Error::Usage(format!(
            "data.sources.{name}: its samples have {has}; expected members {}, which `m6 data codes` writes, or a \
             code_transform, by which codes are made before the first step",
            self.extension
        )))
    }

    /// The bytes of the member for `[views, grid, grid]` codes.
    ///
    /// # Errors
    /// Never for codes of a tokenizer that [`super::Views`] can use.
    pub(super) fn write(&self, codes: &[i16]) -> Result<Vec<u8>> {
        let bytes: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
        let views = codes.len() / (self.grid * self.grid);
        let array = Array { element: Element::U16, shape: vec![views, self.grid, self.grid], bytes: &bytes };
        Ok(array.to_npy()?)
    }

    /// As [`super::Codes::draw`].
    pub(super) fn draw(&self, sample: &Sample, rng: &mut impl Rng) -> Result<Vec<u32>> {
        let Self { extension, grid, codebook_size } = self;
        let fail = |class, reason: String| Error::from(sample.error(class, reason));
        let array = sample.array(extension)?;
        let array = array.ok_or_else(|| fail(FlawClass::MissingMember, format!("has no .{extension}")))?;
        let is_expected = array.element == Element::U16
            && matches!(*array.shape, [views, rows, columns] if views > 0 && (rows, columns) == (*grid, *grid));
        if !is_expected {
            let (element, shape) = (array.element, &array.shape);
            let reason = format!(
                "its .{extension} is {shape:?} of {element:?}, expected [views, {grid}, {grid}] of U16"
            );
            return Err(fail(FlawClass::BrokenMember, reason));
        }
        let (pairs, _) = array.bytes.as_chunks::<2>();
        let view =
            pairs.chunks_exact(grid * grid).nth(rng.random_range(0..array.shape[0])).unwrap_or_default();
        let codes: Vec<u32> = view.iter().map(|&pair| u16::from_le_bytes(pair).into()).collect();
        match codes.iter().find(|&&code| i64::from(code) >= *codebook_size) {
            Some(code) => {
                let reason =
                    format!("its .{extension} has the code {code}, expected 0 to {}", codebook_size - 1);
                Err(fail(FlawClass::BrokenMember, reason))
            }
            None => Ok(codes),
        }
    }
}
