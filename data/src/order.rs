//! The order in which samples are visited: a function of the seed and the position alone, so that a run can stop and
//! resume anywhere.

use std::sync::{Arc, Mutex, PoisonError};

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use crate::error::{DataError, Result};

/// How many permutations are kept: while one worker begins an epoch, another may still end the one before.
pub(crate) const CACHED_EPOCHS: usize = 2;

/// Visits `len` samples epoch after epoch, each epoch in its own random order.
#[derive(Debug)]
pub struct SampleOrder {
    len: usize,
    seed: u64,
    /// The latest epochs' permutations, oldest first.
    epochs: Mutex<Vec<(u64, Arc<[u32]>)>>,
}

impl SampleOrder {
    /// An order over `len` samples (1 to 2^32 - 1).
    pub fn new(len: usize, seed: u64) -> Result<Self> {
        if len == 0 || u32::try_from(len).is_err() {
            return Err(DataError::Order { len });
        }
        Ok(Self { len, seed, epochs: Mutex::default() })
    }

    /// Which sample is visited at position `ordinal` of the run: ordinals `k * len .. (k + 1) * len` are epoch `k`.
    pub fn index(&self, ordinal: u64) -> usize {
        let len = self.len as u64;
        self.permutation(ordinal / len)[(ordinal % len) as usize] as usize
    }

    /// Samples in an epoch.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Always false: an order is never over nothing.
    pub fn is_empty(&self) -> bool {
        false
    }

    fn permutation(&self, epoch: u64) -> Arc<[u32]> {
        let mut epochs = self.epochs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, permutation)) = epochs.iter().find(|(e, _)| *e == epoch) {
            return permutation.clone();
        }
        let mut permutation: Vec<u32> = (0..self.len as u32).collect();
        permutation.shuffle(&mut stream(self.seed, b"m6 order", epoch));
        let permutation: Arc<[u32]> = permutation.into();
        if epochs.len() == CACHED_EPOCHS {
            epochs.remove(0);
        }
        epochs.push((epoch, permutation.clone()));
        permutation
    }
}

/// The random numbers of the sample at position `ordinal`: augmentation, choice of caption, and so on.
pub fn sample_rng(seed: u64, ordinal: u64) -> ChaCha8Rng {
    stream(seed, b"m6sample", ordinal)
}

/// An independent random stream for each (seed, purpose, number).
pub(crate) fn stream(seed: u64, purpose: &[u8; 8], number: u64) -> ChaCha8Rng {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(purpose);
    let mut rng = ChaCha8Rng::from_seed(key);
    rng.set_stream(number);
    rng
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::Rng;

    #[test]
    fn each_epoch_is_a_permutation_of_its_own() {
        let order = SampleOrder::new(50, 7).unwrap();
        let epoch = |k: u64| (50 * k..50 * (k + 1)).map(|o| order.index(o)).collect::<Vec<_>>();
        let (first, second) = (epoch(0), epoch(1));
        assert_ne!(first, second);
        for mut visited in [first, second] {
            visited.sort_unstable();
            assert_eq!(visited, (0..50).collect::<Vec<_>>());
        }
    }

    #[test]
    fn the_order_depends_on_seed_and_position_only() {
        let (a, b, other) =
            (SampleOrder::new(100, 1).unwrap(), SampleOrder::new(100, 1).unwrap(), SampleOrder::new(100, 2));
        let forwards: Vec<_> = (0..400).map(|o| a.index(o)).collect();
        let mut backwards: Vec<_> = (0..400).rev().map(|o| b.index(o)).collect();
        backwards.reverse();
        assert_eq!(forwards, backwards);
        let other = other.unwrap();
        assert_ne!(forwards, (0..400).map(|o| other.index(o)).collect::<Vec<_>>());
    }

    /// Runs that were started by an earlier build must go on in the same order.
    #[test]
    fn the_order_is_frozen() {
        let order = SampleOrder::new(10, 42).unwrap();
        let visited: Vec<_> = (0..10).map(|o| order.index(o)).collect();
        assert_eq!(visited, [9, 2, 7, 8, 6, 4, 1, 5, 0, 3]);
    }

    #[test]
    fn every_ordinal_has_its_own_random_numbers() {
        let draw = |seed, ordinal| sample_rng(seed, ordinal).random::<u64>();
        assert_eq!(draw(1, 5), draw(1, 5));
        assert_ne!(draw(1, 5), draw(1, 6));
        assert_ne!(draw(1, 5), draw(2, 5));
    }

    #[test]
    fn an_empty_order_is_an_error() {
        assert!(SampleOrder::new(0, 1).unwrap_err().to_string().contains("0 samples"));
    }
}
