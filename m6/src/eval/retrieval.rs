//! Is the true picture the nearest of many to the drawn one, and is the drawn one a copy of a training picture?

use m6_data::sample_rng;
use rand::seq::index;
use serde::Serialize;

/// What counts as a copy: nearer to a training picture than all but this share of held-out pictures are.
const COPY_QUANTILE: f64 = 0.01;

/// Pictures to draw candidates from: the held-out split, and training pictures for when it is too small.
#[derive(Debug)]
pub(super) struct Pool {
    /// Style of each picture; those of the split come first.
    pub styles: Vec<Option<String>>,
    /// Pictures in the split.
    pub split: usize,
}

impl Pool {
    /// `count` other pictures to stand beside sample `sample` of the split, the same for every prompt and model. With
    /// `same_style` only those of the sample's style. They come from the split alone where it has enough of them, else
    /// from split and training pictures together; `None` where these are too few as well.
    pub fn others(&self, sample: usize, count: usize, same_style: bool, seed: u64) -> Option<Vec<usize>> {
        let style = &self.styles[sample];
        if same_style && style.is_none() {
            return None;
        }
        let fits = |&i: &usize| i != sample && (!same_style || self.styles[i] == *style);
        let mut eligible: Vec<usize> = (0..self.split).filter(fits).collect();
        if eligible.len() < count {
            eligible.extend((self.split..self.styles.len()).filter(fits));
        }
        if eligible.len() < count {
            return None;
        }
        let mut rng = sample_rng(seed, sample as u64);
        Some(index::sample(&mut rng, eligible.len(), count).into_iter().map(|i| eligible[i]).collect())
    }
}

/// Place of `truth` among itself and `others` by distance, from 1. Others at the same distance come first, so that a
/// picture that looks like all of them wins nothing.
pub(super) fn rank(distances: &[f32], truth: usize, others: &[usize]) -> usize {
    1 + others.iter().filter(|&&other| distances[other] <= distances[truth]).count()
}

/// How well true pictures are found by the drawn ones.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Ranks {
    /// Share of drawn pictures to which the true one is the nearest candidate.
    pub top1: f64,
    /// Median place of the true picture among the candidates; 1 is the best.
    pub median: f64,
}

impl Ranks {
    /// Over these places; `None` when there is none.
    pub fn of(ranks: &[usize]) -> Option<Self> {
        let first = ranks.iter().filter(|&&rank| rank == 1).count();
        let places: Vec<f64> = ranks.iter().map(|&rank| rank as f64).collect();
        Some(Self { median: quantile(&places, 0.5)?, top1: first as f64 / ranks.len() as f64 })
    }
}

/// Distances to the nearest training picture.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Memorisation {
    /// Median over drawn pictures.
    pub drawn_median: f64,
    /// Median over true held-out pictures: what is usual for pictures that are not copies.
    pub held_out_median: f64,
    /// Share of drawn pictures that are nearer than the first percentile of held-out ones; about 0.01 for a model
    /// that does not copy.
    pub copies: f64,
}

impl Memorisation {
    /// Compares the distances of drawn pictures with those of held-out ones; `None` when either is empty.
    pub fn of(drawn: &[f64], held_out: &[f64]) -> Option<Self> {
        let limit = quantile(held_out, COPY_QUANTILE)?;
        let copies = drawn.iter().filter(|&&distance| distance < limit).count();
        Some(Self {
            drawn_median: quantile(drawn, 0.5)?,
            held_out_median: quantile(held_out, 0.5)?,
            copies: copies as f64 / drawn.len() as f64,
        })
    }
}

/// The `q`-quantile, linear between neighbours (the default of NumPy and R).
fn quantile(values: &[f64], q: f64) -> Option<f64> {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let place = q * sorted.len().checked_sub(1)? as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    Some(low + (high - low) * place.fract())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pool(styles: &[&str], split: usize) -> Pool {
        Pool { styles: styles.iter().map(|style| Some((*style).to_owned())).collect(), split }
    }

    #[test]
    fn candidates_are_distinct_repeatable_and_never_the_truth() {
        let pool = pool(&["a"; 20], 20);
        let others = pool.others(3, 10, false, 1).unwrap();
        let mut distinct = others.clone();
        distinct.sort_unstable();
        distinct.dedup();
        assert_eq!(distinct.len(), 10);
        assert!(!others.contains(&3));
        assert_eq!(pool.others(3, 10, false, 1).unwrap(), others);
        assert_ne!(pool.others(3, 10, false, 2).unwrap(), others);
        assert_ne!(pool.others(4, 10, false, 1).unwrap(), others);
    }

    #[test]
    fn training_pictures_step_in_only_where_the_split_is_too_small() {
        let pool = pool(&["a", "b", "a", "b", "a", "a", "b"], 4);
        assert!(pool.others(0, 3, false, 1).unwrap().iter().all(|&i| i < 4));
        let mut all = pool.others(0, 6, false, 1).unwrap();
        all.sort_unstable();
        assert_eq!(all, [1, 2, 3, 4, 5, 6]);
        let mut same = pool.others(0, 3, true, 1).unwrap();
        same.sort_unstable();
        assert_eq!(same, [2, 4, 5]);
        assert_eq!(pool.others(0, 4, true, 1), None);
        assert_eq!(pool.others(0, 7, false, 1), None);
    }

    #[test]
    fn samples_without_a_style_have_no_style_mates() {
        let pool = Pool { styles: vec![None; 9], split: 9 };
        assert_eq!(pool.others(0, 3, true, 1), None);
        assert!(pool.others(0, 3, false, 1).is_some());
    }

    #[test]
    fn ranks_count_ties_against_the_truth() {
        assert_eq!(rank(&[0.1, 0.5, 0.3], 0, &[1, 2]), 1);
        assert_eq!(rank(&[0.4, 0.5, 0.3], 0, &[1, 2]), 2);
        assert_eq!(rank(&[0.5, 0.5, 0.5], 0, &[1, 2]), 3);
        assert_eq!(Ranks::of(&[1, 1, 3, 7]), Some(Ranks { top1: 0.5, median: 2.0 }));
        assert_eq!(Ranks::of(&[]), None);
    }

    #[test]
    fn quantiles_are_those_of_numpy() {
        // numpy.quantile([4, 1, 3, 2], [0.01, 0.5, 1])
        let values = [4.0, 1.0, 3.0, 2.0];
        assert!((quantile(&values, 0.01).unwrap() - 1.03).abs() < 1e-12);
        assert_eq!((quantile(&values, 0.5), quantile(&values, 1.0)), (Some(2.5), Some(4.0)));
    }

    #[test]
    fn copies_are_nearer_than_held_out_pictures_are() {
        let held_out: Vec<f64> = (1..=101).map(f64::from).collect();
        let found = Memorisation::of(&[0.0, 1.9, 2.5, 60.0], &held_out).unwrap();
        assert_eq!(found, Memorisation { drawn_median: 2.2, held_out_median: 51.0, copies: 0.5 });
        assert_eq!(Memorisation::of(&[1.0], &[]), None);
    }
}
