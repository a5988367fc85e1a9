//! Samples that cannot be used: left out, named, counted and logged, until they are too many.

use std::collections::{BTreeMap, HashSet};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::flaw::{Flaw, FlawClass};

/// Samples that are named to the user; later ones are only counted and logged.
const NAMED: u64 = 10;
/// The share of the skipped is not looked at before so many samples were seen.
const FEW: u64 = 1_000;

/// When samples that cannot be used are too many.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct SkipLimits {
    /// So many one after the other.
    pub in_a_row: u64,
    /// More than this share of the samples seen, once these are a thousand.
    pub share: f64,
}

impl Default for SkipLimits {
    fn default() -> Self {
        Self { in_a_row: 100, share: 0.1 }
    }
}

impl SkipLimits {
    /// What is wrong with these settings, in one line that begins with the key.
    ///
    /// # Errors
    /// When a value is out of its range.
    pub fn validate(&self) -> std::result::Result<(), String> {
        if self.in_a_row == 0 {
            return Err("in_a_row = 0: expected 1 or more".to_owned());
        }
        if !(0.0..=1.0).contains(&self.share) {
            return Err(format!("share = {}: expected 0 to 1", self.share));
        }
        Ok(())
    }

    pub(crate) fn passes_share(&self, skipped: u64, seen: u64) -> bool {
        seen >= FEW && skipped as f64 > self.share * seen as f64
    }

    pub(crate) fn too_many(&self, skipped: u64, seen: u64, last: &Flaw) -> DataError {
        let skipped = match skipped == seen {
            true => format!("all {seen} samples"),
            false => format!("{skipped} of {seen} samples, more than a share of {},", self.share),
        };
        DataError::TooManySkipped { skipped, last: last.to_string() }
    }
}

/// How many samples were seen, and how many of them skipped, by what is wrong with them.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SkipCounts {
    /// All that were looked at.
    pub seen: u64,
    /// Those that were skipped.
    pub skipped: BTreeMap<FlawClass, u64>,
}

impl SkipCounts {
    /// Samples that were skipped.
    pub fn total(&self) -> u64 {
        self.skipped.values().sum()
    }
}

/// Counts samples that cannot be used.
#[derive(Debug, Default)]
pub struct Skipped {
    limits: SkipLimits,
    counts: SkipCounts,
    in_a_row: u64,
}

impl Skipped {
    /// Goes on from these counts.
    pub fn new(limits: SkipLimits, counts: SkipCounts) -> Self {
        Self { limits, counts, in_a_row: 0 }
    }

    /// The counts so far.
    pub fn counts(&self) -> &SkipCounts {
        &self.counts
    }

    /// The value, or `None` for a sample that cannot be used. Of these `log` gets every one, and `note` a line about each
    /// of the first.
    ///
    /// # Errors
    /// When the problem is not one sample's, too many are skipped, or the log cannot be written.
    pub fn check<T>(
        &mut self,
        made: Result<T>,
        log: Option<&SkipLog>,
        note: impl Fn(&str),
    ) -> Result<Option<T>> {
        self.counts.seen += 1;
        let flaw = match made {
            Ok(value) => {
                self.in_a_row = 0;
                return Ok(Some(value));
            }
            Err(DataError::Sample(flaw)) => flaw,
            Err(error) => return Err(error),
        };
        *self.counts.skipped.entry(flaw.class).or_default() += 1;
        self.in_a_row += 1;
        let (count, seen) = (self.counts.total(), self.counts.seen);
        if count <= NAMED {
            note(&format!("skipped: {flaw}"));
        }
        log.map_or(Ok(()), |log| log.add(&flaw))?;
        if self.in_a_row >= self.limits.in_a_row {
            let skipped = format!("{} samples in a row", self.in_a_row);
            return Err(DataError::TooManySkipped { skipped, last: flaw.to_string() });
        }
        match self.limits.passes_share(count, seen) {
            true => Err(self.limits.too_many(count, seen, &flaw)),
            false => Ok(None),
        }
    }
}

/// A file with a line of JSON for each shard and sample that was skipped: what [`Flaw`] has. Made with the first.
#[derive(Debug)]
pub struct SkipLog {
    path: PathBuf,
    open: Mutex<Open>,
}

#[derive(Debug, Default)]
struct Open {
    file: Option<File>,
    /// Samples come again in every epoch, shards whenever the run goes on.
    logged: HashSet<(FlawClass, PathBuf, Option<u64>)>,
}

fn identity(flaw: &Flaw) -> (FlawClass, PathBuf, Option<u64>) {
    (flaw.class, flaw.shard.clone(), flaw.offset)
}

impl SkipLog {
    /// A log that is written to the end of `path`.
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), open: Mutex::default() }
    }

    /// Logs what was wrong before any sample was read, and gives `note` a line about each of the first.
    ///
    /// # Errors
    /// When the log cannot be written.
    pub fn add_known<'a>(
        &self,
        flaws: impl IntoIterator<Item = &'a Flaw>,
        note: impl Fn(&str),
    ) -> Result<BTreeMap<FlawClass, u64>> {
        let mut counts = BTreeMap::new();
        for (number, flaw) in (0..).zip(flaws) {
            if number < NAMED {
                note(&flaw.to_string());
            }
            self.add(flaw)?;
            *counts.entry(flaw.class).or_default() += 1;
        }
        let unnamed = counts.values().sum::<u64>().saturating_sub(NAMED);
        if unnamed > 0 {
            note(&format!("{unnamed} more flaws of shards and samples are in {}", self.path.display()));
        }
        Ok(counts)
    }

    fn add(&self, flaw: &Flaw) -> Result<()> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let Open { file, logged } = &mut *open;
        let mut write = || {
            let file = match file {
                Some(file) => file,
                None => {
                    let mut opened =
                        OpenOptions::new().create(true).append(true).read(true).open(&self.path)?;
                    let mut lines = String::new();
                    opened.read_to_string(&mut lines)?;
                    // A line that a crash has cut is no flaw.
                    logged.extend(
                        lines
                            .lines()
                            .filter_map(|line| serde_json::from_str(line).ok())
                            .map(|flaw| identity(&flaw)),
                    );
                    file.insert(opened)
                }
            };
            if !logged.insert(identity(flaw)) {
                return Ok(());
            }
            // One write a line, so that a crash leaves at most the last line in part.
            file.write_all(format!("{}\n", serde_json::to_string(flaw)?).as_bytes())
        };
        write().map_err(DataError::io("write", &self.path))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;

    fn broken(class: FlawClass, offset: u64) -> Result<u8> {
        let (shard, key, reason) = ("b.tar".into(), Some("a".into()), "no picture".into());
        Err(DataError::Sample(Flaw { class, shard, offset: Some(offset), key, reason }))
    }

    fn limits(in_a_row: u64, share: f64) -> Skipped {
        Skipped::new(SkipLimits { in_a_row, share }, SkipCounts::default())
    }

    #[test]
    fn single_samples_are_counted_by_class_and_many_in_a_row_are_an_error() {
        let mut skipped = limits(3, 1.0);
        let check = |skipped: &mut Skipped, made| skipped.check(made, None, |_| {});
        for class in [FlawClass::MissingMember, FlawClass::BrokenPicture] {
            assert_eq!(check(&mut skipped, broken(class, 0)).unwrap(), None);
        }
        assert_eq!(check(&mut skipped, Ok(1)).unwrap(), Some(1));
        for _ in 0..2 {
            assert_eq!(check(&mut skipped, broken(FlawClass::BrokenPicture, 0)).unwrap(), None);
        }
        let expected = [(FlawClass::MissingMember, 1), (FlawClass::BrokenPicture, 3)].into();
        assert_eq!(skipped.counts(), &SkipCounts { seen: 5, skipped: expected });
        let error = check(&mut skipped, broken(FlawClass::Unfit, 512)).unwrap_err().to_string();
        assert_eq!(
            error,
            "3 samples in a row cannot be used; the last: b.tar, byte 512, sample a: no picture"
        );
    }

    #[test]
    fn a_share_that_is_too_large_is_an_error_once_many_were_seen() {
        let mut skipped = limits(100, 0.25);
        let failed = (0..10_000).find_map(|i| {
            let made = if i % 3 == 0 { broken(FlawClass::Unfit, i) } else { Ok(0) };
            skipped.check(made, None, |_| {}).err()
        });
        assert_eq!(skipped.counts().seen, FEW);
        let error = failed.unwrap().to_string();
        assert!(
            error.starts_with("334 of 1000 samples, more than a share of 0.25, cannot be used"),
            "{error}"
        );
    }

    #[test]
    fn other_problems_are_not_skipped() {
        let other = DataError::Order { len: 0 };
        assert!(Skipped::default().check::<u8>(Err(other), None, |_| {}).is_err());
    }

    #[test]
    fn the_first_are_named_and_each_is_logged_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("skipped.jsonl");
        let (log, notes) = (SkipLog::new(&path), RefCell::new(Vec::new()));
        let mut skipped = limits(u64::MAX, 1.0);
        assert!(skipped.check(Ok(1), Some(&log), |_| {}).unwrap().is_some() && !path.exists());
        for offset in (0..20).chain(0..20) {
            let note = |line: &str| notes.borrow_mut().push(line.to_owned());
            skipped.check(broken(FlawClass::BrokenText, offset), Some(&log), note).unwrap();
        }
        let notes = notes.into_inner();
        assert_eq!(
            (notes.len() as u64, notes[3].as_str()),
            (NAMED, "skipped: b.tar, byte 3, sample a: no picture")
        );
        let lines = std::fs::read_to_string(&path).unwrap();
        assert_eq!(lines.lines().count(), 20);
        let known = [SkipLog::new(&path), SkipLog::new(&path)].map(|log| {
            let of = |class, offset| match broken(class, offset) {
                Err(DataError::Sample(flaw)) => flaw,
                _ => unreachable!(),
            };
            let flaws = [of(FlawClass::BrokenText, 0), of(FlawClass::UnusableShard, 0)];
            log.add_known(&flaws, |_| {}).unwrap()
        });
        assert_eq!(known[1], [(FlawClass::UnusableShard, 1), (FlawClass::BrokenText, 1)].into());
        let again = std::fs::read_to_string(dir.path().join("skipped.jsonl")).unwrap();
        assert_eq!(again.lines().count(), 21, "what is there is not logged again");
        let first = r#"{"class":"broken_text","shard":"b.tar","offset":0,"key":"a","reason":"no picture"}"#;
        assert_eq!(lines.lines().next(), Some(first));
    }

    #[test]
    fn limits_out_of_range_are_named() {
        let problem = |in_a_row, share| SkipLimits { in_a_row, share }.validate().unwrap_err();
        assert!(problem(0, 0.5).starts_with("in_a_row = 0"));
        assert!(
            problem(1, 1.5).starts_with("share = 1.5") && problem(1, f64::NAN).starts_with("share = NaN")
        );
        SkipLimits::default().validate().unwrap();
    }
}
