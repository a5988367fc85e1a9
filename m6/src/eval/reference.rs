//! Held-out and training pictures in the feature spaces, and where drawn ones lie among them.

use m6_data::{Rgb8, ShardSet};
use m6_run::Task;
use serde::Serialize;
use tch::Tensor;

use super::features::{FeatureSpace, distances};
use super::retrieval::{Memorisation, Pool, Ranks, rank};
use super::samples::EvalSample;
use crate::error::{Error, Result};
use crate::model::Model;

/// Pictures that are encoded at once.
const BATCH: usize = 32;

/// Scores in one feature space.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct SpaceReport {
    /// Among candidates of every style.
    pub any_style: Option<Ranks>,
    /// Among candidates of the true picture's own style, which is harder; over the samples that have enough of them.
    pub same_style: Option<Ranks>,
    /// Nearness to training pictures, where those were given.
    pub memorisation: Option<Memorisation>,
}

/// Where one drawn picture lies in one space.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub(super) struct Placed {
    /// Place of the true picture among the candidates.
    rank: Option<usize>,
    /// Its place among those of its own style.
    same_style_rank: Option<usize>,
    /// Key and distance.
    nearest_training: Option<(String, f64)>,
}

/// All pictures that drawn ones are compared with: those of the held-out split, then those of training.
pub(super) struct Reference {
    keys: Vec<String>,
    pool: Pool,
    candidates: usize,
    seed: u64,
    /// `[n, dimensions]` in each space of [`FeatureSpace::ALL`].
    features: [Tensor; FeatureSpace::ALL.len()],
}

impl Reference {
    /// Reads and encodes all pictures.
    ///
    /// # Errors
    /// When they are fewer than the candidates, or one is broken.
    pub fn read(
        model: &Model,
        held_out: &ShardSet,
        training: Option<&ShardSet>,
        candidates: usize,
        seed: u64,
    ) -> Result<Self> {
        let total = held_out.len() + training.map_or(0, ShardSet::len);
        if candidates < 2 || candidates > total {
            return Err(Error::Usage(format!(
                "--candidates {candidates}: expected 2 to {total}, the pictures of the given shards (--train adds more)"
            )));
        }
        let sets = [Some(held_out), training].into_iter().flatten();
        let places: Vec<_> = sets.flat_map(|set| (0..set.len()).map(move |index| (set, index))).collect();
        let (mut styles, mut keys) = (Vec::with_capacity(total), Vec::with_capacity(total));
        let mut parts = FeatureSpace::ALL.map(|_| Vec::new());
        let mut task = Task::new("encode pictures", total as u64, "pictures");
        for batch in places.chunks(BATCH) {
            let mut pictures = Vec::with_capacity(batch.len());
            for (set, index) in batch {
                let sample = EvalSample::read(&set.sample(*index)?)?;
                styles.push(sample.style);
                keys.push(sample.key);
                pictures.push(sample.picture);
            }
            for (space, parts) in FeatureSpace::ALL.into_iter().zip(&mut parts) {
                parts.push(space.features(&model.vqgan, &pictures)?);
            }
            task.advance(batch.len() as u64);
        }
        task.finish();
        let pool = Pool { styles, split: held_out.len() };
        Ok(Self { keys, pool, candidates, seed, features: parts.map(|parts| Tensor::cat(&parts, 0)) })
    }

    /// Scores drawings of the first samples of the split, in their order.
    ///
    /// # Errors
    /// When there is no drawing.
    pub fn score(
        &self,
        space: FeatureSpace,
        model: &Model,
        drawn: &[Rgb8],
    ) -> Result<(SpaceReport, Vec<Placed>)> {
        let (n, split) = (drawn.len() as i64, self.pool.split as i64);
        let all = &self.features[space as usize];
        let parts = drawn.chunks(BATCH).map(|batch| space.features(&model.vqgan, batch));
        let drawn = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 0);
        let placed: Vec<Placed> =
            rows(&distances(&drawn, all))?.iter().enumerate().map(|(i, row)| self.place(i, row)).collect();

        let training = all.narrow(0, split, all.size()[0] - split);
        let from_held_out = rows(&distances(&all.narrow(0, 0, n), &training))?;
        let nearest = |row: &Vec<f32>| row.iter().copied().min_by(f32::total_cmp).map(f64::from);
        let from_held_out: Vec<f64> = from_held_out.iter().filter_map(nearest).collect();
        let from_drawn: Vec<f64> = placed
            .iter()
            .filter_map(|one| one.nearest_training.as_ref())
            .map(|(_, distance)| *distance)
            .collect();
        let ranks = |place: fn(&Placed) -> Option<usize>| {
            Ranks::of(&placed.iter().filter_map(place).collect::<Vec<_>>())
        };
        let report = SpaceReport {
            any_style: ranks(|one| one.rank),
            same_style: ranks(|one| one.same_style_rank),
            memorisation: Memorisation::of(&from_drawn, &from_held_out),
        };
        Ok((report, placed))
    }

    /// Where the drawing of sample `sample` lies, by its distances to all pictures.
    fn place(&self, sample: usize, distances: &[f32]) -> Placed {
        let rank = |same_style| {
            let others = self.pool.others(sample, self.candidates - 1, same_style, self.seed)?;
            Some(rank(distances, sample, &others))
        };
        let training = distances.iter().enumerate().skip(self.pool.split);
        let nearest = training.min_by(|a, b| a.1.total_cmp(b.1));
        Placed {
            rank: rank(false),
            same_style_rank: rank(true),
            nearest_training: nearest.map(|(at, &distance)| (self.keys[at].clone(), f64::from(distance))),
        }
    }
}

/// A matrix as rows on the host.
fn rows(matrix: &Tensor) -> Result<Vec<Vec<f32>>> {
    let [n, width] = [0, 1].map(|axis| matrix.size()[axis] as usize);
    let flat = Vec::<f32>::try_from(matrix.flatten(0, 1)).map_err(m6_runtime::RuntimeError::from)?;
    Ok((0..n).map(|row| flat[row * width..(row + 1) * width].to_vec()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::samples::{open_shards, read_all, tests::shard};
    use crate::generate::testing::tiny_model;

    #[test]
    fn a_perfect_drawing_is_found_and_a_copy_is_caught() {
        let dir = tempfile::tempdir().unwrap();
        let names = [("a", "", "flat"), ("b", "", "flat"), ("c", "", "flat")];
        let held_out = open_shards(&shard(dir.path(), "val", &names)).unwrap();
        // The training pictures begin with the held-out ones, so every true picture is a copy of one.
        let training =
            open_shards(&shard(dir.path(), "train", &[names.as_slice(), &names].concat())).unwrap();
        let model = tiny_model();
        let reference = Reference::read(&model, &held_out, Some(&training), 3, 1).unwrap();
        let truth: Vec<Rgb8> = read_all(&held_out, None).unwrap().into_iter().map(|s| s.picture).collect();
        for space in FeatureSpace::ALL {
            let (report, placed) = reference.score(space, &model, &truth).unwrap();
            assert_eq!(report.any_style, Some(Ranks { top1: 1.0, median: 1.0 }), "{}", space.name());
            assert_eq!(report.same_style, report.any_style);
            assert_eq!(report.memorisation.map(|m| m.drawn_median), Some(0.0));
            assert_eq!(placed[1].nearest_training.as_ref().map(|(key, _)| key.as_str()), Some("train-1"));
            let swapped = [&truth[1..], &truth[..1]].concat();
            let (report, _) = reference.score(space, &model, &swapped).unwrap();
            assert_eq!(report.any_style.map(|ranks| ranks.top1), Some(0.0));
        }
    }
}
