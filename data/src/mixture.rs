//! Mixtures of sources: which source each place of a run takes its example from.
//!
//! As with [`crate::order`], the answer is a function of the seed and the place alone. Places come in blocks; in every
//! block each source has a fixed number of places, shuffled, so that shares hold over every few thousand examples and
//! not only on average.

use std::sync::{Arc, Mutex, PoisonError};

use rand::seq::SliceRandom;

use crate::error::{DataError, Result};
use crate::order::{CACHED_EPOCHS, stream};

/// Places in a block; shares are multiples of one over this.
const BLOCK: u64 = 4096;

/// A source of a mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct SourceShare {
    /// Its name, for errors.
    pub name: String,
    /// Its share of the examples, relative to the others'.
    pub weight: f64,
    /// Its samples.
    pub samples: usize,
    /// Times that each of its samples is visited before the source leaves the mixture; endless where absent.
    pub epochs: Option<u64>,
}

/// Deals the places of a run to sources.
#[derive(Debug)]
pub struct Mixture {
    seed: u64,
    stretches: Vec<Stretch>,
    /// The latest blocks, oldest first.
    blocks: Mutex<Vec<(u64, Arc<[Place]>)>>,
}

/// Blocks that are dealt alike.
#[derive(Debug)]
struct Stretch {
    first_block: u64,
    /// Places of each source before it.
    before: Vec<u64>,
    /// Places of each source in each of its blocks.
    each: Vec<u64>,
}

/// A source and how many earlier places are its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Place in the list of sources.
    pub source: usize,
    /// Earlier places of the source.
    pub visit: u64,
}

impl Mixture {
    /// A mixture of `sources`.
    ///
    /// # Errors
    /// A weight that is not a positive number or so small that its source would get no place, no epoch, no source without an
    /// end (after which the run would have nothing to take).
    pub fn new(sources: &[SourceShare], seed: u64) -> Result<Self> {
        let weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
        let each = deal(&weights, BLOCK);
        for (source, &places) in sources.iter().zip(&each) {
            let problem = if !(source.weight > 0.0 && source.weight.is_finite()) {
                format!("weight = {}: expected a positive number", source.weight)
            } else if places == 0 {
                format!("weight = {}: expected at least 1/{BLOCK} of all weights", source.weight)
            } else if source.epochs == Some(0) {
                "epochs = 0: expected at least 1".to_owned()
            } else {
                continue;
            };
            return Err(DataError::Mixture { source_name: source.name.clone(), problem });
        }
        if let Some(last) = sources.last()
            && sources.iter().all(|source| source.epochs.is_some())
        {
            let problem =
                "epochs is given for every source: expected one source without, for what comes after"
                    .to_owned();
            return Err(DataError::Mixture { source_name: last.name.clone(), problem });
        }
        Ok(Self { seed, stretches: plan(sources), blocks: Mutex::default() })
    }

    /// Where the example at `ordinal` comes from.
    pub fn place(&self, ordinal: u64) -> Place {
        self.block(ordinal / BLOCK)[(ordinal % BLOCK) as usize]
    }

    /// How many places before `ordinal` each source has.
    pub fn visits(&self, ordinal: u64) -> Vec<u64> {
        let mut visits = self.before(ordinal / BLOCK);
        for place in &self.block(ordinal / BLOCK)[..(ordinal % BLOCK) as usize] {
            visits[place.source] += 1;
        }
        visits
    }

    fn stretch(&self, block: u64) -> &Stretch {
        let after = self.stretches.partition_point(|stretch| stretch.first_block <= block);
        &self.stretches[after - 1]
    }

    /// Places of each source before a block.
    fn before(&self, block: u64) -> Vec<u64> {
        let Stretch { first_block, before, each } = self.stretch(block);
        before.iter().zip(each).map(|(before, each)| before + (block - first_block) * each).collect()
    }

    fn block(&self, block: u64) -> Arc<[Place]> {
        let mut blocks = self.blocks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, places)) = blocks.iter().find(|(b, _)| *b == block) {
            return places.clone();
        }
        let each = &self.stretch(block).each;
        let mut dealt: Vec<usize> = each
            .iter()
            .enumerate()
            .flat_map(|(source, &n)| std::iter::repeat_n(source, n as usize))
            .collect();
        dealt.shuffle(&mut stream(self.seed, b"m6source", block));
        let mut visits = self.before(block);
        let places = dealt.into_iter().map(|source| {
            let visit = visits[source];
            visits[source] += 1;
            Place { source, visit }
        });
        let places: Arc<[Place]> = places.collect();
        if blocks.len() == CACHED_EPOCHS {
            blocks.remove(0);
        }
        blocks.push((block, places.clone()));
        places
    }
}

/// The stretches of a run: a new one begins where a source has too few visits left for its share of a block, and another
/// after the block in which it takes its last ones.
fn plan(sources: &[SourceShare]) -> Vec<Stretch> {
    let mut left: Vec<u64> = sources
        .iter()
        .map(|source| source.epochs.map_or(u64::MAX, |epochs| epochs.saturating_mul(source.samples as u64)))
        .collect();
    let mut before = vec![0; sources.len()];
    let (mut first_block, mut stretches) = (0, Vec::new());
    loop {
        let each = deal_within(sources, &left);
        let is_finite = |source: usize| sources[source].epochs.is_some() && each[source] > 0;
        let blocks = (0..sources.len()).filter(|&i| is_finite(i)).map(|i| left[i] / each[i]).min();
        stretches.push(Stretch { first_block, before: before.clone(), each: each.clone() });
        let Some(blocks) = blocks else { return stretches };
        first_block += blocks;
        for (i, each) in each.iter().enumerate() {
            before[i] += blocks * each;
            if sources[i].epochs.is_some() {
                left[i] -= blocks * each;
            }
        }
    }
}

/// Places of each source in a block, none beyond what it has left; the others share what it leaves.
fn deal_within(sources: &[SourceShare], left: &[u64]) -> Vec<u64> {
    let mut weights: Vec<f64> = sources.iter().map(|source| source.weight).collect();
    let mut fixed = vec![0; sources.len()];
    loop {
        let dealt = deal(&weights, BLOCK - fixed.iter().sum::<u64>());
        let short: Vec<usize> = (0..sources.len()).filter(|&i| dealt[i] > left[i]).collect();
        if short.is_empty() {
            return dealt.iter().zip(&fixed).map(|(dealt, fixed)| dealt + fixed).collect();
        }
        for i in short {
            (weights[i], fixed[i]) = (0.0, left[i]);
        }
    }
}

/// `places` dealt in proportion to weights, largest remainders first (Hamilton's method).
fn deal(weights: &[f64], places: u64) -> Vec<u64> {
    let total: f64 = weights.iter().sum();
    let quotas: Vec<f64> = weights.iter().map(|weight| weight / total * places as f64).collect();
    let mut dealt: Vec<u64> = quotas.iter().map(|quota| quota.floor() as u64).collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).filter(|&i| weights[i] > 0.0).collect();
    by_remainder.sort_by(|&a, &b| quotas[b].fract().total_cmp(&quotas[a].fract()));
    let missing = places.saturating_sub(dealt.iter().sum());
    for &i in by_remainder.iter().cycle().take(missing as usize) {
        dealt[i] += 1;
    }
    dealt
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn share(weight: f64, samples: usize, epochs: Option<u64>) -> SourceShare {
        SourceShare { name: format!("source of {samples}"), weight, samples, epochs }
    }

    fn refused(sources: &[SourceShare]) -> String {
        Mixture::new(sources, 1).unwrap_err().to_string()
    }

    #[test]
    fn one_source_has_every_place() {
        let mixture = Mixture::new(&[share(0.3, 10, None)], 1).unwrap();
        for ordinal in [0, 1, BLOCK - 1, BLOCK, 1 << 40] {
            assert_eq!(mixture.place(ordinal), Place { source: 0, visit: ordinal });
            assert_eq!(mixture.visits(ordinal), [ordinal]);
        }
    }

    #[test]
    fn shares_hold_in_every_block_and_the_order_is_the_seeds() {
        let sources = [share(3.0, 10, None), share(1.0, 10, None)];
        let mixture = Mixture::new(&sources, 1).unwrap();
        for block in [0, 7] {
            let places = (block * BLOCK..(block + 1) * BLOCK).map(|ordinal| mixture.place(ordinal));
            assert_eq!(places.filter(|place| place.source == 0).count() as u64, BLOCK / 4 * 3);
        }
        let first = |seed| -> Vec<usize> {
            let mixture = Mixture::new(&sources, seed).unwrap();
            (0..50).map(|ordinal| mixture.place(ordinal).source).collect()
        };
        assert_eq!(first(1), first(1));
        assert_ne!(first(1), first(2));
    }

    /// Runs that were started by an earlier build must go on with the same sources.
    #[test]
    fn the_mixture_is_frozen() {
        let mixture = Mixture::new(&[share(2.0, 10, None), share(1.0, 10, None)], 42).unwrap();
        let sources: Vec<_> = (0..16).map(|ordinal| mixture.place(ordinal).source).collect();
        assert_eq!(sources, [1, 0, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0]);
    }

    #[test]
    fn what_cannot_be_dealt_is_named() {
        let endless = share(1.0, 5, None);
        assert!(refused(&[endless.clone(), share(0.0, 7, None)]).contains("source of 7: weight = 0"));
        assert!(refused(&[endless.clone(), share(f64::NAN, 7, None)]).contains("weight = NaN"));
        assert!(refused(&[endless.clone(), share(1e-5, 7, None)]).contains("at least 1/4096"));
        assert!(refused(&[endless, share(1.0, 7, Some(0))]).contains("epochs = 0"));
        assert!(refused(&[share(1.0, 5, Some(1)), share(1.0, 7, Some(2))]).contains("one source without"));
    }

    proptest! {
        /// Every source's visits count up from 0, a finite source has exactly its own, and jumps agree with walking.
        #[test]
        fn every_visit_comes_once_and_in_turn(
            finite in prop::collection::vec((0.05..5.0_f64, 1..4_000_usize, 1..4_u64), 0..4),
            endless in 0.05..5.0_f64,
            seed in any::<u64>(),
        ) {
            let mut sources: Vec<_> = finite.iter().map(|&(w, n, e)| share(w, n, Some(e))).collect();
            sources.push(share(endless, 9, None));
            let mixture = Mixture::new(&sources, seed).unwrap();
            let mut visits = vec![0; sources.len()];
            for ordinal in 0..12 * BLOCK {
                if ordinal % 997 == 0 {
                    prop_assert_eq!(&mixture.visits(ordinal), &visits);
                }
                let Place { source, visit } = mixture.place(ordinal);
                prop_assert_eq!(visit, visits[source]);
                visits[source] += 1;
            }
            for (source, visits) in sources.iter().zip(&visits) {
                let all = source.epochs.map_or(u64::MAX, |epochs| epochs * source.samples as u64);
                prop_assert!(*visits <= all);
            }
            let total: u64 = finite.iter().map(|&(_, n, e)| n as u64 * e).sum();
            let end = mixture.visits(1 << 50);
            prop_assert_eq!(end[..finite.len()].iter().sum::<u64>(), total);
            prop_assert_eq!(end.iter().sum::<u64>(), 1 << 50);
        }
    }
}
