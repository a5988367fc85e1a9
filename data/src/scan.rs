//! Finds out what shards hold, after fetching those that are no files.

use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::SystemTime;

use crate::cache::Cache;
use crate::error::{DataError, Result};
use crate::index_file;
use crate::lines;
use crate::source::{Far, Source};
use crate::tar_index::TarIndex;

/// Threads that fetch shards and read their headers.
const SCANNERS: usize = 16;

/// Is called with the number of shards that were fetched, the number of those that have to be, and the bytes that came so
/// far; not at all where none has to be fetched.
pub(crate) type Progress<'a> = &'a mut (dyn FnMut(usize, usize, u64) + Send);

/// What a shard holds, before it is part of a set.
pub(crate) struct Scanned {
    /// Where its bytes are: itself, or its file in the cache.
    pub file: PathBuf,
    /// As it was when its headers were read.
    pub stamp: Stamp,
    /// Its members.
    pub index: TarIndex,
    /// Why the index beside it was not used, where there is one.
    pub unused_index: Option<String>,
}

/// What a file has to be for its samples to be where they were found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Stamp {
    /// Size of the file.
    pub bytes: u64,
    /// `None` for one in the cache, whose time is that of its last use.
    modified: Option<SystemTime>,
}

impl Stamp {
    fn of(file: &File, has_own_time: bool) -> io::Result<Self> {
        let metadata = file.metadata()?;
        let modified = has_own_time.then(|| metadata.modified()).transpose()?;
        Ok(Self { bytes: metadata.len(), modified })
    }

    /// Whether `file` is still as it was.
    pub(crate) fn fits(&self, file: &File) -> io::Result<bool> {
        Ok(Self::of(file, self.modified.is_some())? == *self)
    }
}

/// How much is read of shards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Care {
    /// Indexes are used, and after so many shards in a row that cannot be used no more are tried.
    Usual { give_up_after: u64 },
    /// Every shard is tried and all of its headers are read.
    Thorough,
}

/// Counts what several threads fetch.
struct Meter<'a> {
    all: usize,
    counts: Mutex<Counts<'a>>,
}

struct Counts<'a> {
    /// Shards that are still to come.
    missing: HashSet<&'a Far>,
    bytes: u64,
    progress: Progress<'a>,
}

impl<'a> Meter<'a> {
    fn start(missing: HashSet<&'a Far>, progress: Progress<'a>) -> Self {
        let all = missing.len();
        if all > 0 {
            progress(0, all, 0);
        }
        Self { all, counts: Mutex::new(Counts { missing, bytes: 0, progress }) }
    }

    fn add_bytes(&self, bytes: usize) {
        self.change(|counts| {
            counts.bytes += bytes as u64;
            true
        });
    }

    /// Counts a shard, unless it was there from the beginning.
    fn add_shard(&self, shard: &Far) {
        self.change(|counts| counts.missing.remove(shard));
    }

    fn change(&self, change: impl FnOnce(&mut Counts) -> bool) {
        let mut counts = self.counts.lock().unwrap_or_else(PoisonError::into_inner);
        if change(&mut counts) {
            let (done, bytes) = (self.all - counts.missing.len(), counts.bytes);
            (counts.progress)(done, self.all, bytes);
        }
    }
}

/// Scans shards on several threads, since each waits for the disk or the network. Names and results in the order of the
/// shards; where it was given up, the rest is absent.
///
/// # Errors
/// Those of `cache`.
pub(crate) fn scan_all<'a>(
    sources: &[Source],
    cache: &(impl Fn() -> Result<&'a Cache> + Sync),
    care: Care,
    progress: Progress,
) -> Result<Vec<(PathBuf, Result<Scanned>)>> {
    let mut missing = HashSet::new();
    // Before any is fetched, or one that is there could have to make room for another.
    for source in sources {
        if let Source::Far(far) = source
            && !cache()?.keep(far)
        {
            missing.insert(far);
        }
    }
    let meter = Meter::start(missing, progress);
    let next = AtomicUsize::new(0);
    let failed_in_a_row = AtomicU64::new(0);
    let scan_some = || {
        let mut scanned = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(source) = sources.get(index) else { return scanned };
            let result = scan(source, cache, care, &meter);
            match (&result, care) {
                (Ok(_), _) => failed_in_a_row.store(0, Ordering::Relaxed),
                (Err(_), Care::Usual { give_up_after }) => {
                    if failed_in_a_row.fetch_add(1, Ordering::Relaxed) + 1 >= give_up_after {
                        next.store(sources.len(), Ordering::Relaxed);
                    }
                }
                (Err(_), Care::Thorough) => {}
            }
            scanned.push((index, source.name(), result));
        }
    };
    let mut scanned = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..SCANNERS.min(sources.len())).map(|_| scope.spawn(scan_some)).collect();
        let joined = threads.into_iter().map(|thread| thread.join());
        joined
            .flat_map(|some| some.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect::<Vec<_>>()
    });
    scanned.sort_by_key(|&(index, ..)| index);
    Ok(scanned.into_iter().map(|(_, name, result)| (name, result)).collect())
}

fn scan<'a>(
    source: &Source,
    cache: impl Fn() -> Result<&'a Cache>,
    care: Care,
    meter: &Meter,
) -> Result<Scanned> {
    let (path, may_have_index) = match source {
        Source::File(path) => (path.clone(), care != Care::Thorough),
        Source::Far(far) => {
            let path = cache()?.fetch(far, |bytes| meter.add_bytes(bytes))?;
            meter.add_shard(far);
            (path, false)
        }
    };
    let name = source.name();
    let file = File::open(&path).map_err(DataError::io("open", &name))?;
    let stamp = Stamp::of(&file, matches!(source, Source::File(_))).map_err(DataError::io("read", &name))?;
    let unreadable = || DataError::io("read", &name);
    if let Some(text) = source.lines() {
        let members = text.members(&file, 0).map_err(unreadable())?;
        let index = TarIndex { members, defects: Vec::new() };
        return Ok(Scanned { file: path, stamp, index, unused_index: None });
    }
    let indexed = if may_have_index { index_file::read(&path, &file) } else { Ok(None) };
    let (members, unused_index) = match indexed {
        Ok(members) => (members, None),
        Err(reason) => (None, Some(reason)),
    };
    let mut index = match members {
        Some(members) => TarIndex { members, defects: Vec::new() },
        None => TarIndex::read(&file).map_err(unreadable())?,
    };
    index.members = lines::expand(index.members, &file).map_err(unreadable())?;
    Ok(Scanned { file: path, stamp, index, unused_index })
}
