//! Pictures of shards to codes, several views each.

use std::sync::Arc;

use m6_data::order::sample_rng;
use m6_data::picture::Rgb8;
use m6_data::{DataError, Loader, ShardSet, SkipLimits, SkipLog, Skipped, Transform};
use m6_run::Task as Job;
use m6_runtime::RuntimeError;
use m6_vqgan::{Vqgan, pictures_to_tensor, to_unit};
use tch::{Device, Kind};

use crate::error::{Error, Result};

/// Pictures that are encoded at a time.
const BATCH: usize = 64;
/// Codes are stored in 16 bits, of which one is the sign.
pub(super) const MAX_CODEBOOK: i64 = 1 << 15;

/// Which pictures are encoded, and how.
#[derive(Debug, Clone)]
pub struct Views {
    /// Augmentation of each view.
    pub transform: Transform,
    /// Views of each picture.
    pub count: usize,
    /// Seed of the augmentation.
    pub seed: u64,
    /// Threads that decode.
    pub workers: usize,
    /// When pictures that cannot be read are too many.
    pub skip: SkipLimits,
}

impl Views {
    /// Checks that `vqgan` can encode them; `key` names the transform in the error.
    ///
    /// # Errors
    /// When its codebook is too large, or the transform does not make pictures of its size.
    pub(super) fn check(&self, key: &str, vqgan: &Vqgan) -> Result<()> {
        let config = vqgan.config();
        if config.codebook_size > MAX_CODEBOOK {
            let size = config.codebook_size;
            let problem = format!("the codebook has {size} codes; at most {MAX_CODEBOOK} are supported");
            return Err(Error::Usage(problem));
        }
        let side = config.resolution as u32;
        if self.transform.output_size() != Some((side, side)) {
            return Err(Error::Usage(format!("{key}: its last crop must give {side} x {side} pixels")));
        }
        Ok(())
    }

    /// Encodes the views of every sample of `shards` that has a picture, in order. `take` gets the number of the sample
    /// and `[count, grid, grid]` codes end to end, or none where a view could not be made; `title` names the work. Pictures
    /// without codes are counted once each in `skipped` and go to `log`.
    ///
    /// # Errors
    /// Those of `take`, or too many pictures are broken.
    pub(super) fn encode(
        &self,
        shards: &Arc<ShardSet>,
        vqgan: &Vqgan,
        device: Device,
        title: &str,
        (skipped, log): (&mut Skipped, Option<&SkipLog>),
        mut take: impl FnMut(usize, Option<Vec<i16>>) -> Result<()>,
    ) -> Result<()> {
        let with_picture: Arc<[usize]> = shards.with_picture().into();
        let total = with_picture.len() * self.count;
        let view = {
            let (shards, with_picture) = (shards.clone(), with_picture.clone());
            let (transform, count, seed) = (self.transform.clone(), self.count, self.seed);
            move |place: u64| -> std::result::Result<Rgb8, DataError> {
                // The loader runs ahead of the last picture; what it makes there is not used.
                let index = with_picture[place as usize / count % with_picture.len()];
                let ordinal = index * count + place as usize % count;
                transform.load(&shards.sample(index)?, &mut sample_rng(seed, ordinal as u64))
            }
        };
        if total == 0 {
            return Ok(());
        }
        let loader = Loader::start(0, self.workers, 4 * BATCH, view)?;
        let mut job = Job::new(title, total as u64, "views");
        let mut batch = Vec::with_capacity(BATCH);
        let mut waiting = Vec::with_capacity(self.count);
        let mut samples = with_picture.iter();
        let mut whole = Ok(());
        for made in loader.take(total) {
            let (place, picture) = made?;
            batch.push(picture.map_err(|error| whole = Err(error)).ok());
            if (place as usize + 1).is_multiple_of(self.count) {
                let sample = std::mem::replace(&mut whole, Ok(()));
                skipped.check(sample, log, |note| eprintln!("{note}"))?;
            }
            if batch.len() < BATCH && place + 1 < total as u64 {
                continue;
            }
            for codes in encode(vqgan, &batch, device)? {
                waiting.push(codes);
                if waiting.len() == self.count
                    && let Some(&index) = samples.next()
                {
                    let views: Option<Vec<Vec<i16>>> = waiting.drain(..).collect();
                    take(index, views.map(|views| views.concat()))?;
                }
            }
            job.advance(batch.len() as u64);
            batch.clear();
        }
        job.finish();
        Ok(())
    }
}

/// The codes of a batch, none for a missing picture.
fn encode(vqgan: &Vqgan, batch: &[Option<Rgb8>], device: Device) -> Result<Vec<Option<Vec<i16>>>> {
    let _guard = tch::no_grad_guard();
    let present: Vec<Rgb8> = batch.iter().flatten().cloned().collect();
    let mut rows = Vec::new();
    if !present.is_empty() {
        let pictures = to_unit(&pictures_to_tensor(&present)?, device)?;
        let codes = vqgan.encode(&pictures)?.to_kind(Kind::Int16).flatten(1, -1).to_device(Device::Cpu);
        rows = Vec::<Vec<i16>>::try_from(codes).map_err(RuntimeError::from)?;
    }
    let mut rows = rows.into_iter();
    Ok(batch.iter().map(|picture| picture.as_ref().and_then(|_| rows.next())).collect())
}
