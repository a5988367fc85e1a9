//! Decoded pictures of shards, made ahead on worker threads; broken ones are named and skipped.

use m6_data::{
    Flaw, Loader, Rgb8, ShardSet, SkipCounts, SkipLimits, SkipLog, Skipped, Transform, sample_rng,
};

use crate::error::Result;

/// The samples of `shards` that have a picture, and what is known to be wrong with the set: its damage, and the samples
/// without one.
///
/// # Errors
/// When there is none, or more lack one than the limits allow.
pub(crate) fn with_picture(shards: &ShardSet, limits: &SkipLimits) -> Result<(Vec<usize>, Vec<Flaw>)> {
    let (found, mut flaws) = shards.serving(|index| shards.has_picture(index), "a picture", limits)?;
    flaws.splice(..0, shards.flaws().iter().cloned());
    Ok((found, flaws))
}

/// Pictures by ordinal.
pub(crate) struct PictureStream {
    loader: Loader<m6_data::Result<Rgb8>>,
    next_ordinal: u64,
    skipped: Skipped,
    log: Option<SkipLog>,
}

impl PictureStream {
    /// From `first_ordinal` on, at most about `ahead` pictures ahead of the consumer. `index` says which sample of
    /// `shards` an ordinal is; `seed` and the ordinal decide what is random in `transform`.
    pub(crate) fn start(
        shards: ShardSet,
        transform: Transform,
        seed: u64,
        index: impl Fn(u64) -> usize + Send + Sync + 'static,
        (first_ordinal, workers, ahead): (u64, usize, usize),
    ) -> Result<Self> {
        let make =
            move |ordinal| transform.load(&shards.sample(index(ordinal))?, &mut sample_rng(seed, ordinal));
        let loader = Loader::start(first_ordinal, workers, ahead, make)?;
        Ok(Self { loader, next_ordinal: first_ordinal, skipped: Skipped::default(), log: None })
    }

    /// Limits and logs the pictures that cannot be read, of which there were `counts` already.
    pub(crate) fn skipping(self, limits: SkipLimits, counts: SkipCounts, log: SkipLog) -> Self {
        Self { skipped: Skipped::new(limits, counts), log: Some(log), ..self }
    }

    /// Pictures that were looked at and could not be used.
    pub(crate) fn counts(&self) -> &SkipCounts {
        self.skipped.counts()
    }

    /// The next `count` pictures that can be read, or fewer where the ordinal `end` comes first. What is wrong with
    /// the others goes to `note`.
    pub(crate) fn batch(&mut self, count: usize, end: u64, note: impl Fn(&str)) -> Result<Vec<Rgb8>> {
        let mut pictures = Vec::with_capacity(count);
        while pictures.len() < count && self.next_ordinal < end {
            let Some(item) = self.loader.next() else { break };
            let (ordinal, picture) = item?;
            self.next_ordinal = ordinal + 1;
            pictures.extend(self.skipped.check(picture, self.log.as_ref(), &note)?);
        }
        Ok(pictures)
    }

    /// Where a stream has to start to go on like this one.
    pub(crate) fn next_ordinal(&self) -> u64 {
        self.next_ordinal
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::cell::RefCell;
    use std::path::Path;

    use m6_data::ShardWriter;
    use m6_runtime::{Group, Init, Params};
    use tch::Device;

    use super::*;
    use crate::pictures::to_pictures;

    /// A shard of `count` random pictures of 16 x 16, and one broken one after each ten.
    pub(crate) fn random_shard(dir: &Path, count: u64) -> String {
        let mut writer = ShardWriter::create(dir, "random", u64::MAX).unwrap();
        for seed in 0..count {
            let params = Params::new(Device::Cpu, seed);
            let coarse = params.add("x", &[1, 3, 4, 4], Init::Uniform(1.0), Group::Buffer);
            let picture = to_pictures(&coarse.upsample_nearest2d([16, 16], None, None)).remove(0);
            writer.write(&format!("{seed:04}"), &[("png", &picture.encode_png().unwrap())]).unwrap();
            if seed % 10 == 9 {
                writer.write(&format!("{seed:04}b"), &[("png", b"not a picture")]).unwrap();
            }
        }
        writer.finish().unwrap()[0].display().to_string()
    }

    fn stream(dir: &Path, first: u64) -> PictureStream {
        let shards = ShardSet::open(&[random_shard(dir, 20)]).unwrap();
        let len = shards.len() as u64;
        PictureStream::start(shards, Transform::default(), 1, move |o| (o % len) as usize, (first, 2, 4))
            .unwrap()
    }

    #[test]
    fn broken_pictures_are_named_and_skipped() {
        let dir = tempfile::tempdir().unwrap();
        let notes = RefCell::new(Vec::new());
        let mut stream = stream(dir.path(), 0);
        let batch = stream.batch(12, u64::MAX, |note| notes.borrow_mut().push(note.to_owned())).unwrap();
        assert_eq!((batch.len(), stream.next_ordinal()), (12, 13));
        let notes = notes.into_inner();
        assert!(
            notes.len() == 1 && notes[0].starts_with("skipped: ") && notes[0].contains("sample 0009b"),
            "{notes:?}"
        );
        assert_eq!(stream.batch(100, 22, |_| {}).unwrap().len(), 8);
    }

    #[test]
    fn too_many_broken_pictures_end_the_run() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("skipped.jsonl");
        let limits = SkipLimits { share: 0.05, ..SkipLimits::default() };
        let mut stream = stream(dir.path(), 0).skipping(limits, SkipCounts::default(), SkipLog::new(&log));
        let message = stream.batch(10_000, u64::MAX, |_| {}).unwrap_err().to_string();
        assert!(message.contains(" samples, more than a share of 0.05, cannot be used"), "{message}");
        assert_eq!(std::fs::read_to_string(log).unwrap().lines().count(), 2);
    }

    #[test]
    fn a_stream_goes_on_where_another_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let mut whole = stream(dir.path(), 0);
        whole.batch(7, u64::MAX, |_| {}).unwrap();
        let rest = whole.batch(9, u64::MAX, |_| {}).unwrap();
        assert_eq!(stream(dir.path(), 7).batch(9, u64::MAX, |_| {}).unwrap(), rest);
    }
}
