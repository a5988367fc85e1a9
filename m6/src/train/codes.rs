//! Codes of the training pictures, made once before the first step.
//!
//! Several augmented views of each picture are encoded, so that the image tokenizer is not in the loop and the
//! model still sees more than one rendering of a picture (LlamaGen's ten-crop codes). The table is kept in the run
//! folder under a name that says what it was made from.

use std::path::Path;

use m6_data::order::sample_rng;
use m6_data::picture::Rgb8;
use m6_data::shard::{ShardSet, sample_image};
use m6_data::transform::Transform;
use m6_data::{DataError, Loader};
use m6_run::Task as Job;
use m6_runtime::{read_tensors, write_tensors};
use m6_vqgan::{Vqgan, pictures_to_tensor, to_unit};
use tch::{Device, Kind, Tensor};

use crate::error::{Error, Result};

/// Pictures that are encoded at a time.
const BATCH: usize = 128;
/// Codes are stored in 16 bits.
const MAX_CODEBOOK: i64 = 1 << 15;
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

    /// The codes of one view of a sample, row-major.
    pub fn view(&self, sample: usize, view: usize) -> Vec<u32> {
        let start = (sample * self.views + view) * self.length;
        self.codes[start..start + self.length].iter().map(|&code| code as u32).collect()
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
            let (_, tensor) = read_tensors(&path)?.swap_remove(0);
            let codes =
                Vec::<i16>::try_from(tensor.flatten(0, -1)).map_err(m6_runtime::RuntimeError::from)?;
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

fn fingerprint(recipe: &CodeRecipe, vqgan: &Vqgan) -> String {
    let mut hasher = blake3::Hasher::new();
    let transform = String::from(recipe.transform.clone());
    let sizes = format!("{} {} {} {}", recipe.shards.len(), recipe.shards.bytes(), recipe.views, recipe.seed);
    for part in [vqgan.hash().unwrap_or_default(), &transform, &sizes, &recipe.patterns.join("\n")] {
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
        let problem = format!("data.code_transform: its last crop must give {side} x {side} pixels");
        return Err(Error::Usage(problem));
    }
    let total = recipe.shards.len() * recipe.views;
    let patterns = recipe.patterns.to_vec();
    let (transform, views, seed) = (recipe.transform.clone(), recipe.views as u64, recipe.seed);
    let shards = ShardSet::open(&patterns)?;
    let view = move |ordinal: u64| -> std::result::Result<Rgb8, DataError> {
        // The loader runs ahead of the last picture; what it makes there is not used.
        let sample = shards.sample((ordinal / views) as usize % shards.len())?;
        transform.apply(&sample_image(&sample)?, &mut sample_rng(seed, ordinal))
    };
    let loader = Loader::start(0, recipe.workers, 4 * BATCH, view)?;
    let mut job = Job::new("encode pictures", total as u64, "views");
    let mut codes = Vec::with_capacity(total);
    let mut batch = Vec::with_capacity(BATCH);
    let blank = Rgb8::filled(side, side, [u8::MAX; 3]);
    let mut broken = 0u64;
    for made in loader.take(total) {
        let (ordinal, picture) = made?;
        batch.push(picture.unwrap_or_else(|error| {
            // The sample is skipped in training for the same reason, and counted there.
            if broken == 0 {
                eprintln!("m6: {error}");
            }
            broken += 1;
            blank.clone()
        }));
        if batch.len() == BATCH || ordinal + 1 == total as u64 {
            let _guard = tch::no_grad_guard();
            let pictures = to_unit(&pictures_to_tensor(&batch)?, device)?;
            let encoded = vqgan.encode(&pictures)?.to_kind(Kind::Int16).flatten(0, -1).to_device(Device::Cpu);
            codes.extend(Vec::<i16>::try_from(encoded).map_err(m6_runtime::RuntimeError::from)?);
            job.advance(batch.len() as u64);
            batch.clear();
        }
    }
    job.finish();
    Ok(codes)
}
