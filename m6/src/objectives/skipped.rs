//! Samples that cannot be used.

use m6_data::DataError;

use crate::error::{Error, Result};

/// Samples that may fail one after the other before the data set is taken to be broken.
const MAX_IN_A_ROW: u64 = 100;
/// Samples that are named; later ones are only counted.
const NAMED: u64 = 10;

/// Counts samples that cannot be used and names the first of them on stderr.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Skipped {
    count: u64,
    in_a_row: u64,
}

impl Skipped {
    /// Goes on counting at `count`.
    pub(crate) fn resume(count: u64) -> Self {
        Self { count, in_a_row: 0 }
    }

    /// Samples skipped so far.
    pub(crate) fn count(&self) -> u64 {
        self.count
    }

    /// The value, or `None` for a sample that cannot be used.
    ///
    /// # Errors
    /// When the problem is not one sample's, or too many fail one after the other.
    pub(crate) fn check<T>(&mut self, made: Result<T>) -> Result<Option<T>> {
        match made {
            Ok(value) => {
                self.in_a_row = 0;
                Ok(Some(value))
            }
            Err(error @ Error::Data(DataError::Sample { .. })) => {
                self.count += 1;
                self.in_a_row += 1;
                if self.in_a_row == MAX_IN_A_ROW {
                    let problem =
                        format!("{MAX_IN_A_ROW} samples in a row cannot be used; the last: {error}");
                    return Err(Error::Usage(problem));
                }
                if self.count <= NAMED {
                    eprintln!("skipped: {error}");
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken() -> Result<u8> {
        let reason = "no picture".to_owned();
        Err(DataError::Sample { key: "a".into(), shard: "b.tar".into(), reason }.into())
    }

    #[test]
    fn single_samples_are_counted_and_many_in_a_row_are_an_error() {
        let mut skipped = Skipped::resume(5);
        for _ in 1..MAX_IN_A_ROW {
            assert_eq!(skipped.check(broken()).unwrap(), None);
        }
        assert_eq!(skipped.check(Ok(1)).unwrap(), Some(1));
        assert_eq!(skipped.check(broken()).unwrap(), None);
        assert_eq!(skipped.count(), 5 + MAX_IN_A_ROW);
        let failed = (1..MAX_IN_A_ROW).find_map(|_| skipped.check(broken()).err());
        assert!(failed.unwrap().to_string().contains("sample a of b.tar: no picture"));
    }

    #[test]
    fn other_problems_are_not_skipped() {
        assert!(Skipped::default().check::<u8>(Err(Error::Usage("x".into()))).is_err());
    }
}
