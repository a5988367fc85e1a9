//! Codes of the training pictures, made once before the first step.
//!
//! Several augmented views of each picture are encoded, so that the image tokenizer is not in the loop and the
//! model still sees more than one rendering of a picture (LlamaGen's ten-crop codes). The table is kept in the run
//! folder under a name that says what it was made from.

use std::path::Path;

use m6_data::order::sample_rng;
use m6_data::picture::Rgb8;
use m6_data::shard::ShardSet;
use m6_data::transform::Transform;
use m6_data::{DataError, Loader};
use m6_run::Task as Job;
use m6_runtime::{RuntimeError, first_line, read_tensors, write_tensors};
use m6_vqgan::{Vqgan, pictures_to_tensor, to_unit};
use tch::{Device, Kind, Tensor};

use super::skipped::Skipped;
use crate::error::{Error, Result};

/// Pictures that are encoded at a time.
const BATCH: usize = 64;
/// Codes are stored in 16 bits.
const MAX_CODEBOOK: i64 = 1 << 15;
/// Stands for the codes of a view whose picture could not be read.
const NO_CODE: i16 = -1;
const NAME: &str = "codes";

/// `views` code grids for each sample of a shard set.
#[derive(Debug, PartialEq, Eq)]
pub struct CodeTable {
    codes: Vec<i16>,
    views: usize,
    length: usize,
}

/// What a table is made from.
#[derive(Debug)]
pub struct CodeRecipe<'a> {
    /// Name of the source, for errors.
    pub source: &'a str,
    /// The pictures.
    pub shards: &'a ShardSet,
    /// Augmentation of each view.
    pub transform: &'a Transform,
    /// Views of each picture.
    pub views: usize,
    /// Seed of the augmentation.
    pub seed: u64,
    /// Threads that decode.
    pub workers: usize,
    /// Patterns that `shards` was opened with.
    pub patterns: &'a [String],
}

impl CodeTable {
    /// Views of each sample.
    pub fn views(&self) -> usize {
        self.views
    }

    /// The codes of one view of a sample, row-major; `None` where its picture could not be read.
    pub fn view(&self, sample: usize, view: usize) -> Option<Vec<u32>> {
        let start = (sample * self.views + view) * self.length;
        let codes = &self.codes[start..start + self.length];
        (codes[0] != NO_CODE).then(|| codes.iter().map(|&code| code as u32).collect())
    }

    /// Reads the table from `dir` if it was made by this recipe, else makes and keeps it.
    ///
    /// # Errors
    /// When a picture is of the wrong size, too many are broken, or the table cannot be written.
    pub fn open_or_make(dir: &Path, recipe: &CodeRecipe, vqgan: &Vqgan, device: Device) -> Result<Self> {
        let length = (vqgan.config().grid() * vqgan.config().grid()) as usize;
        let path = dir.join(format!("{NAME}-{}.safetensors", fingerprint(recipe, vqgan)));
        let expected = recipe.shards.len() * recipe.views * length;
        if path.is_file() {
            let codes = read(&path, vqgan.config().codebook_size)?;
            if codes.len() != expected {
                return Err(Error::file(&path, format!("holds {} codes, expected {expected}", codes.len())));
            }
            return Ok(Self { codes, views: recipe.views, length });
        }
        let codes = make(recipe, vqgan, device)?;
        let shape = [recipe.shards.len() as i64, recipe.views as i64, length as i64];
        write_tensors(&path, &[(NAME.to_string(), Tensor::from_slice(&codes).view(shape))])?;
        Ok(Self { codes, views: recipe.views, length })
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

fn fingerprint(recipe: &CodeRecipe, vqgan: &Vqgan) -> String {
    let mut hasher = blake3::Hasher::new();
    let transform = String::from(recipe.transform.clone());
    let numbers = format!("{} {}", recipe.views, recipe.seed);
    for part in [vqgan.hash().unwrap_or_default(), &transform, &numbers, &recipe.shards.identity()] {
        hasher.update(part.as_bytes());
        hasher.update(b"\0");
    }
    hasher.finalize().to_hex()[..16].to_string()
}

fn make(recipe: &CodeRecipe, vqgan: &Vqgan, device: Device) -> Result<Vec<i16>> {
    let config = vqgan.config();
    if config.codebook_size > MAX_CODEBOOK {
        let problem =
            format!("the codebook has {} codes; at most {MAX_CODEBOOK} are supported", config.codebook_size);
        return Err(Error::Usage(problem));
    }
    let side = config.resolution as u32;
    if recipe.transform.output_size() != Some((side, side)) {
        let source = recipe.source;
        let problem =
            format!("data.sources.{source}.code_transform: its last crop must give {side} x {side} pixels");
        return Err(Error::Usage(problem));
    }
    let total = recipe.shards.len() * recipe.views;
    let patterns = recipe.patterns.to_vec();
    let (transform, views, seed) = (recipe.transform.clone(), recipe.views as u64, recipe.seed);
    let shards = ShardSet::open(&patterns)?;
    let view = move |ordinal: u64| -> std::result::Result<Rgb8, DataError> {
        // The loader runs ahead of the last picture; what it makes there is not used.
        let sample = shards.sample((ordinal / views) as usize % shards.len())?;
        transform.load(&sample, &mut sample_rng(seed, ordinal))
    };
    let loader = Loader::start(0, recipe.workers, 4 * BATCH, view)?;
    let mut job = Job::new("encode pictures", total as u64, "views");
    let mut codes: Vec<i16> = Vec::with_capacity(total);
    let mut batch: Vec<Option<Rgb8>> = Vec::with_capacity(BATCH);
    let mut skipped = Skipped::default();
    for made in loader.take(total) {
        let (ordinal, picture) = made?;
        batch.push(skipped.check(picture.map_err(Error::from))?);
        if batch.len() == BATCH || ordinal + 1 == total as u64 {
            codes.extend(encode(vqgan, &batch, device)?);
            job.advance(batch.len() as u64);
            batch.clear();
        }
    }
    job.finish();
    Ok(codes)
}

/// The codes of a batch, [`NO_CODE`] for every code of a missing picture.
fn encode(vqgan: &Vqgan, batch: &[Option<Rgb8>], device: Device) -> Result<Vec<i16>> {
    let _guard = tch::no_grad_guard();
    let length = (vqgan.config().grid() * vqgan.config().grid()) as usize;
    let present: Vec<Rgb8> = batch.iter().flatten().cloned().collect();
    let mut encoded = Vec::new();
    if !present.is_empty() {
        let pictures = to_unit(&pictures_to_tensor(&present)?, device)?;
        let codes = vqgan.encode(&pictures)?.to_kind(Kind::Int16).flatten(0, -1).to_device(Device::Cpu);
        encoded = Vec::<i16>::try_from(codes).map_err(RuntimeError::from)?;
    }
    let mut rows = encoded.chunks(length);
    let missing = vec![NO_CODE; length];
    Ok(batch
        .iter()
        .flat_map(|picture| match picture {
            Some(_) => rows.next().unwrap_or(&missing).to_vec(),
            None => missing.clone(),
        })
        .collect())
}
