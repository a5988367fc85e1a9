//! Finds out what shards hold, after fetching those that are no files.

use std::fs::File;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::cache::Cache;
use crate::error::{DataError, Result};
use crate::index_file;
use crate::source::Source;
use crate::tar_index::TarIndex;

/// Threads that fetch shards and read their headers.
const SCANNERS: usize = 16;

/// What a shard holds, before it is part of a set.
pub(crate) struct Scanned {
    /// Where its bytes are: itself, or its file in the cache.
    pub file: PathBuf,
    /// Size of the file.
    pub bytes: u64,
    /// Its members.
    pub index: TarIndex,
    /// Why the index beside it was not used, where there is one.
    pub unused_index: Option<String>,
}

/// How much is read of shards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Care {
    /// Indexes are used, and the first shard that cannot be used is the last that is tried.
    Usual,
    /// Every shard is tried and all of its headers are read.
    Thorough,
}

/// Scans shards on several threads, since each waits for the disk or the network. Names and results in the order of the
/// shards; with [`Care::Usual`] some behind a failure may be absent.
///
/// # Errors
/// Those of `cache`.
pub(crate) fn scan_all<'a>(
    sources: &[Source],
    cache: &(impl Fn() -> Result<&'a Cache> + Sync),
    care: Care,
) -> Result<Vec<(PathBuf, Result<Scanned>)>> {
    // Before any is fetched, or one that is there could have to make room for another.
    for source in sources {
        if let Source::Far(far) = source {
            cache()?.keep(far);
        }
    }
    let next = AtomicUsize::new(0);
    let scan_some = || {
        let mut scanned = Vec::new();
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            let Some(source) = sources.get(index) else { return scanned };
            let result = scan(source, cache, care);
            if result.is_err() && care == Care::Usual {
                next.store(sources.len(), Ordering::Relaxed);
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

fn scan<'a>(source: &Source, cache: impl Fn() -> Result<&'a Cache>, care: Care) -> Result<Scanned> {
    let (path, may_have_index) = match source {
        Source::File(path) => (path.clone(), care == Care::Usual),
        Source::Far(far) => (cache()?.fetch(far)?, false),
    };
    let name = source.name();
    let file = File::open(&path).map_err(DataError::io("open", &name))?;
    let bytes = file.metadata().map_err(DataError::io("read", &name))?.len();
    let indexed = if may_have_index { index_file::read(&path, &file) } else { Ok(None) };
    let (members, unused_index) = match indexed {
        Ok(members) => (members, None),
        Err(reason) => (None, Some(reason)),
    };
    let index = match members {
        Some(members) => TarIndex { members, defects: Vec::new() },
        None => TarIndex::read(file).map_err(DataError::io("read", &name))?,
    };
    Ok(Scanned { file: path, bytes, index, unused_index })
}
