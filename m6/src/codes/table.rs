//! Codes in a table in the run folder, under a name that says what they were made from.

use std::path::Path;
use std::sync::Arc;

use m6_data::{FlawClass, Sample, ShardSet, SkipCounts, Skipped};
use m6_runtime::{first_line, read_tensors, write_tensors};
use m6_vqgan::Vqgan;
use rand::Rng;
use tch::{Device, Tensor};

use super::encode::Views;
use crate::error::{Error, Result};

/// Stands for the codes of a sample whose picture is absent or broken.
const NO_CODE: i16 = -1;
const NAME: &str = "codes";

/// Code grids of several views for each sample of a shard set.
#[derive(Debug, PartialEq, Eq)]
pub struct CodeTable {
    codes: Vec<i16>,
    views: usize,
    length: usize,
}

/// What a table is made from.
#[derive(Debug)]
pub struct TableRecipe<'a> {
    /// Name of the source, for errors.
    pub source: &'a str,
    /// The pictures.
    pub shards: &'a Arc<ShardSet>,
    /// What is encoded of them.
    pub views: Views,
}

impl CodeTable {
    /// Whether a sample has codes.
    pub(super) fn has(&self, sample: usize) -> bool {
        self.codes[sample * self.views * self.length] != NO_CODE
    }

    /// As [`super::Codes::draw`].
    pub(super) fn draw(&self, sample: &Sample, index: usize, rng: &mut impl Rng) -> Result<Vec<u32>> {
        let view = rng.random_range(0..self.views);
        if !self.has(index) {
            return Err(sample.error(FlawClass::BrokenPicture, "its picture could not be read").into());
        }
        let start = (index * self.views + view) * self.length;
        Ok(self.codes[start..start + self.length].iter().map(|&code| code as u32).collect())
    }

    /// Reads the table from `dir` if it was made by this recipe, else makes and keeps it.
    ///
    /// # Errors
    /// When a picture is of the wrong size, too many are broken, or the table cannot be written.
    pub fn open_or_make(dir: &Path, recipe: &TableRecipe, vqgan: &Vqgan, device: Device) -> Result<Self> {
        let TableRecipe { source, shards, views } = recipe;
        let length = (vqgan.config().grid() * vqgan.config().grid()) as usize;
        let of_sample = views.count * length;
        let path = dir.join(format!("{NAME}-{}.safetensors", fingerprint(recipe, vqgan)));
        let expected = shards.len() * of_sample;
        if path.is_file() {
            let codes = read(&path, vqgan.config().codebook_size)?;
            if codes.len() != expected {
                return Err(Error::file(&path, format!("holds {} codes, expected {expected}", codes.len())));
            }
            return Ok(Self { codes, views: views.count, length });
        }
        views.check(&format!("data.sources.{source}.code_transform"), vqgan)?;
        let mut codes = vec![NO_CODE; expected];
        let mut skipped = Skipped::new(views.skip, SkipCounts::default());
        views.encode(shards, vqgan, device, "encode pictures", (&mut skipped, None), |index, made| {
            if let Some(made) = made {
                codes[index * of_sample..][..of_sample].copy_from_slice(&made);
            }
            Ok(())
        })?;
        let shape = [shards.len() as i64, views.count as i64, length as i64];
        write_tensors(&path, &[(NAME.to_string(), Tensor::from_slice(&codes).view(shape))])?;
        Ok(Self { codes, views: views.count, length })
    }
}

fn read(path: &Path, codebook_size: i64) -> Result<Vec<i16>> {
    let tensors = read_tensors(path)?;
    let [(_, tensor)] = tensors.as_slice() else {
        return Err(Error::file(path, format!("holds {} tensors, expected one", tensors.len())));
    };
    let codes = Vec::<i16>::try_from(tensor.flatten(0, -1))
        .map_err(|error| Error::file(path, first_line(&error.to_string())))?;
    let legal = |code: &&i16| **code == NO_CODE || (0..codebook_size).contains(&i64::from(**code));
    match codes.iter().find(|code| !legal(code)) {
        Some(code) => {
            Err(Error::file(path, format!("holds the code {code}, expected 0 to {}", codebook_size - 1)))
        }
        None => Ok(codes),
    }
}

fn fingerprint(recipe: &TableRecipe, vqgan: &Vqgan) -> String {
    let TableRecipe { shards, views, .. } = recipe;
    let mut hasher = blake3::Hasher::new();
    let transform = String::from(views.transform.clone());
    let numbers = format!("{} {}", views.count, views.seed);
    for part in [vqgan.hash().unwrap_or_default(), &transform, &numbers, &shards.identity()] {
        hasher.update(part.as_bytes());
        hasher.update(b"\0");
    }
    hasher.finalize().to_hex()[..16].to_string()
}
