//! A folder of shards that were fetched from elsewhere, so that samples can be read at random places.
//!
//! A shard's file is named by the BLAKE3 of its url or command, or of a compressed file's path, size and time, and appears by rename once it is whole. It is taken to stay
//! what it is: what is there is not asked for again. Where the folder would outgrow its limit, the files that no process
//! uses go, the least recently used first. Processes that use the folder hold a shared lock, and one that has to remove
//! files does so only while it is alone.

use std::collections::HashSet;
use std::env;
use std::ffi::OsString;
use std::fs::{self, File, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use crate::atomic_file::world_readable;
use crate::error::{DataError, Result};
use crate::source::Far;

/// Names the folder.
const FOLDER_VARIABLE: &str = "M6_CACHE";
/// Bytes that the folder may hold, with K, M, G or T for powers of 1,024.
const LIMIT_VARIABLE: &str = "M6_CACHE_LIMIT";
const DEFAULT_LIMIT: u64 = 100 << 30;
/// Below the user's own cache folder.
const DEFAULT_FOLDER: &str = "m6/shards";
/// Units of a limit; each is 1,024 times the one before.
const UNITS: &str = "KMGT";

/// Held shared by every process that uses the folder, and alone by one that removes files.
const USERS: &str = ".users";
/// Held by the process that tries to be alone.
const TURN: &str = ".turn";
/// Beginning of the names of files that are not whole yet.
const PART: &str = ".part-";
/// Characters of the end of a url that are part of its file's name.
const MAX_TAIL: usize = 64;

static OF_PROCESS: LazyLock<std::result::Result<Cache, String>> = LazyLock::new(|| {
    let (dir, limit) = from_variables(|name| env::var_os(name).filter(|value| !value.is_empty()))?;
    Cache::open(&dir, limit)
});

/// The folder; what was taken from it stays until the process ends.
#[derive(Debug)]
pub(crate) struct Cache {
    dir: PathBuf,
    limit: u64,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    users: File,
    /// Files that this process uses.
    used: HashSet<PathBuf>,
    /// Bytes of whole files, as far as this process knows.
    whole: u64,
    /// Bytes of files that this process is fetching.
    partial: u64,
}

impl Cache {
    /// The one that the environment names, opened when it is first asked for.
    pub(crate) fn of_process() -> Result<&'static Self> {
        OF_PROCESS.as_ref().map_err(|reason| DataError::Cache(reason.clone()))
    }

    /// Opens a folder, made if absent, and removes what processes that were killed left half fetched.
    pub(crate) fn open(dir: &Path, limit: u64) -> std::result::Result<Self, String> {
        let open = || {
            fs::create_dir_all(dir)?;
            let users = File::create(dir.join(USERS))?;
            while_alone(dir, &users, || remove_parts(dir))?;
            let whole = whole_files(dir)?.iter().map(|file| file.bytes).sum();
            Ok(State { users, used: HashSet::new(), whole, partial: 0 })
        };
        let state = open().map_err(|error: io::Error| {
            format!("cannot use {}: {error}; {FOLDER_VARIABLE} names another folder", dir.display())
        })?;
        Ok(Self { dir: dir.to_owned(), limit, state: Mutex::new(state) })
    }

    /// Marks the file of `shard` as used, and says whether it is there yet.
    pub(crate) fn keep(&self, shard: &Far) -> bool {
        let path = self.path_of(shard);
        let is_there = path.exists();
        self.state().used.insert(path);
        is_there
    }

    /// The file with the bytes of `shard`, fetched unless it is there; `progress` is called with the number of bytes
    /// whenever some have come.
    ///
    /// # Errors
    /// The shard does not come whole, or the folder cannot take them.
    pub(crate) fn fetch(&self, shard: &Far, progress: impl Fn(usize)) -> Result<PathBuf> {
        let path = self.path_of(shard);
        self.keep(shard);
        match File::open(&path) {
            Ok(file) => {
                // How recently it was used is no more than a hint, and another user's file cannot be given it.
                let _ = file.set_modified(SystemTime::now());
                return Ok(path);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(self.failed(error)),
        }
        let mut part = tempfile::Builder::new()
            .prefix(PART)
            .permissions(world_readable())
            .tempfile_in(&self.dir)
            .map_err(|error| self.failed(error))?;
        let mut claim = Claim { cache: self, bytes: 0 };
        shard.stream(&mut |bytes| {
            claim.grow(bytes.len() as u64, shard)?;
            part.write_all(bytes).map_err(|error| self.failed(error))?;
            progress(bytes.len());
            Ok(())
        })?;
        if claim.bytes == 0 {
            return Err(DataError::fetch(shard.name(), "it gave no bytes"));
        }
        part.as_file().sync_all().map_err(|error| self.failed(error))?;
        part.persist(&path).map_err(|error| self.failed(error.error))?;
        self.state().whole += claim.bytes;
        Ok(path)
    }

    fn path_of(&self, shard: &Far) -> PathBuf {
        self.dir.join(file_name(shard.name(), &shard.identity()))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn failed(&self, error: io::Error) -> DataError {
        DataError::Cache(format!("cannot write in {}: {error}", self.dir.display()))
    }

    /// Removes files that nobody uses, the least recently used first, until the others leave room for `needed` bytes.
    /// False where another process may use any of them.
    fn make_room(&self, state: &mut State, needed: u64) -> io::Result<bool> {
        let remove = || {
            let mut files = whole_files(&self.dir)?;
            files.sort_by_key(|file| file.used);
            let mut whole: u64 = files.iter().map(|file| file.bytes).sum();
            for file in files.iter().filter(|file| !state.used.contains(&file.path)) {
                if whole + needed <= self.limit {
                    break;
                }
                fs::remove_file(&file.path)?;
                whole -= file.bytes;
            }
            Ok(whole)
        };
        let left = while_alone(&self.dir, &state.users, remove)?;
        state.whole = left.unwrap_or(state.whole);
        Ok(left.is_some())
    }
}

/// The bytes of a file that is being fetched, counted until it is whole or given up.
struct Claim<'a> {
    cache: &'a Cache,
    bytes: u64,
}

impl Claim<'_> {
    fn grow(&mut self, bytes: u64, shard: &Far) -> Result<()> {
        let cache = self.cache;
        let mut state = cache.state();
        let needed = state.partial + bytes;
        if state.whole + needed > cache.limit {
            let alone = cache.make_room(&mut state, needed).map_err(|error| cache.failed(error))?;
            if state.whole + needed > cache.limit {
                let why = if alone { "the rest is in use" } else { "another process uses it" };
                return Err(DataError::Cache(format!(
                    "{} would pass its limit of {} bytes with {}, and {why}; {LIMIT_VARIABLE} sets the limit",
                    cache.dir.display(),
                    cache.limit,
                    shard.name(),
                )));
            }
        }
        state.partial = needed;
        self.bytes += bytes;
        Ok(())
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.cache.state().partial -= self.bytes;
    }
}

/// The file of a url or command: the hash keeps it apart from others and inside the folder, the tail is for people.
fn file_name(name: &str, identity: &str) -> String {
    let end = name.split('?').next().and_then(|name| name.rsplit('/').next()).unwrap_or_default();
    let plain = |c: char| if c.is_ascii_alphanumeric() || ".-_".contains(c) { c } else { '_' };
    let tail: Vec<char> = end.chars().map(plain).collect();
    let tail: String = tail[tail.len().saturating_sub(MAX_TAIL)..].iter().collect();
    format!("{}-{tail}", blake3::hash(identity.as_bytes()))
}

/// Folder and limit by environment variables.
fn from_variables(get: impl Fn(&str) -> Option<OsString>) -> std::result::Result<(PathBuf, u64), String> {
    let below = |name, folder| get(name).map(|home| Path::new(&home).join(folder).join(DEFAULT_FOLDER));
    let dir = get(FOLDER_VARIABLE)
        .map(PathBuf::from)
        .or_else(|| below("XDG_CACHE_HOME", ""))
        .or_else(|| below("HOME", ".cache"))
        .ok_or_else(|| format!("no folder for it; {FOLDER_VARIABLE} names one"))?;
    let limit = match get(LIMIT_VARIABLE) {
        Some(text) => bytes_of(&text.to_string_lossy())
            .ok_or_else(|| format!("{LIMIT_VARIABLE}={}: expected bytes, or such as 20G", text.display()))?,
        None => DEFAULT_LIMIT,
    };
    Ok((dir, limit))
}

/// A number of bytes, plain or with a unit: `20G` is 20 * 2^30.
pub fn bytes_of(text: &str) -> Option<u64> {
    let unit = text.chars().next_back().and_then(|last| UNITS.find(last));
    let (number, power) = unit.map_or((text, 0), |unit| (&text[..text.len() - 1], unit as u32 + 1));
    number.parse::<u64>().ok()?.checked_mul(1 << (10 * power))
}

/// Does `work` if no other process uses the folder, `None` otherwise; the lock is shared again afterwards.
fn while_alone<T>(dir: &Path, users: &File, work: impl FnOnce() -> io::Result<T>) -> io::Result<Option<T>> {
    // Without it, another process could be alone between the two locks of this one.
    let turn = File::create(dir.join(TURN))?;
    turn.lock()?;
    users.unlock()?;
    let done = match users.try_lock() {
        Ok(()) => work().map(Some),
        Err(TryLockError::WouldBlock) => Ok(None),
        Err(TryLockError::Error(error)) => Err(error),
    };
    users.lock_shared()?;
    done
}

struct WholeFile {
    path: PathBuf,
    bytes: u64,
    used: SystemTime,
}

/// The files that a cache made, and no others that may be in its folder.
fn whole_files(dir: &Path) -> io::Result<Vec<WholeFile>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let name = entry.file_name();
        let hash = name.to_str().and_then(|name| name.split_once('-')).map(|(hash, _)| hash);
        if hash.is_some_and(|hash| blake3::Hash::from_hex(hash).is_ok()) {
            let metadata = entry.metadata()?;
            files.push(WholeFile { path: entry.path(), bytes: metadata.len(), used: metadata.modified()? });
        }
    }
    Ok(files)
}

fn remove_parts(dir: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(PART) {
            fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Component;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::testing::cat;

    const SIZE: usize = 1000;

    /// Files of [`SIZE`] bytes, and the commands that write them.
    fn shards<const N: usize>(dir: &Path) -> [(PathBuf, Far); N] {
        std::array::from_fn(|n| {
            let file = dir.join(format!("{n}.tar"));
            fs::write(&file, vec![n as u8; SIZE]).unwrap();
            let shard = Far::Pipe(cat(&file));
            (file, shard)
        })
    }

    /// As the next process finds it that uses the folder.
    fn cache(dir: &Path, shards: usize) -> Cache {
        Cache::open(&dir.join("cache"), (shards * SIZE) as u64).unwrap()
    }

    fn names(cache: &Cache) -> Vec<String> {
        let name = |entry: fs::DirEntry| entry.file_name().into_string().unwrap();
        let mut names: Vec<_> = fs::read_dir(&cache.dir).unwrap().map(|entry| name(entry.unwrap())).collect();
        names.sort();
        names
    }

    #[test]
    fn what_is_there_is_not_fetched_again() {
        let dir = tempfile::tempdir().unwrap();
        let [(file, shard)] = shards(dir.path());
        let path = cache(dir.path(), 1).fetch(&shard, |_| ()).unwrap();
        fs::remove_file(&file).unwrap();
        let cache = cache(dir.path(), 1);
        assert_eq!(cache.fetch(&shard, |_| ()).unwrap(), path);
        assert_eq!(fs::read(&path).unwrap(), [0; SIZE]);
        let name = path.file_name().unwrap().to_str().unwrap();
        assert!(name.ends_with("-0.tar_"), "{name}");
        assert_eq!(names(&cache), [TURN, USERS, name]);
    }

    #[test]
    fn the_least_recently_used_goes_and_what_is_used_stays() {
        let dir = tempfile::tempdir().unwrap();
        let [(_, a), (_, b), (_, c)] = shards(dir.path());
        let (first, others) = (cache(dir.path(), 2), ["notes.txt", ".part-1"]);
        let [of_a, of_b] = [&a, &b].map(|shard| first.fetch(shard, |_| ()).unwrap());
        let error = first.fetch(&c, |_| ()).unwrap_err().to_string();
        let expected = format!(
            "would pass its limit of 2000 bytes with {}, and the rest is in use; M6_CACHE_LIMIT sets",
            c.name()
        );
        assert!(error.contains(&expected), "{error}");
        assert_eq!((names(&first).len(), first.state().partial), (4, 0), "nothing is left of it");

        for other in others {
            fs::write(first.dir.join(other), [0; SIZE]).unwrap();
        }
        let old = SystemTime::now() - Duration::from_secs(60);
        for (path, age) in [(&of_a, 2), (&of_b, 1)] {
            File::open(path).unwrap().set_modified(old - Duration::from_secs(age)).unwrap();
        }
        let second = cache(dir.path(), 2);
        second.fetch(&a, |_| ()).unwrap();
        let error = second.fetch(&c, |_| ()).unwrap_err().to_string();
        assert!(error.contains(", and another process uses it; "), "{error}");
        drop((first, second));

        let third = cache(dir.path(), 2);
        let of_c = third.fetch(&c, |_| ()).unwrap();
        assert!(of_a.exists() && !of_b.exists() && of_c.exists(), "b is the least recently used");
        let there = others.map(|other| third.dir.join(other).exists());
        assert_eq!(there, [true, false], "of the others only what was left half fetched goes");
    }

    #[test]
    fn what_a_set_will_need_does_not_make_room() {
        let dir = tempfile::tempdir().unwrap();
        let [(_, a), (_, b)] = shards(dir.path());
        let of_b = cache(dir.path(), 1).fetch(&b, |_| ()).unwrap();
        let cache = cache(dir.path(), 1);
        cache.keep(&b);
        assert!(cache.fetch(&a, |_| ()).unwrap_err().to_string().contains("the rest is in use"));
        assert!(of_b.exists());
    }

    #[test]
    fn two_that_fetch_the_same_leave_one_whole_file() {
        let dir = tempfile::tempdir().unwrap();
        let [(_, shard)] = shards(dir.path());
        let caches = [cache(dir.path(), 2), cache(dir.path(), 2)];
        let paths = std::thread::scope(|scope| {
            caches
                .each_ref()
                .map(|cache| scope.spawn(|| cache.fetch(&shard, |_| ()).unwrap()))
                .map(|t| t.join().unwrap())
        });
        assert_eq!(paths[0], paths[1]);
        assert_eq!((fs::read(&paths[0]).unwrap(), names(&caches[0]).len()), (vec![0; SIZE], 3));
    }

    #[test]
    fn nothing_and_half_a_shard_are_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let [(file, _)] = shards(dir.path());
        let cache = cache(dir.path(), 2);
        let error = |command: String| cache.fetch(&Far::Pipe(command), |_| ()).unwrap_err().to_string();
        assert_eq!(error("pipe:true".to_owned()), "cannot fetch pipe:true: it gave no bytes");
        let half = format!("pipe:head -c 500 '{}'; exit 3", file.display());
        assert!(error(half).ends_with("ended with exit status: 3; it said nothing"));
        assert!(error("pipe:yes".to_owned()).contains("limit of 2000 bytes with pipe:yes"));
        let State { whole, partial, .. } = *cache.state();
        assert_eq!((names(&cache).len(), whole, partial), (2, 0, 0));
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("file"), "").unwrap();
        let error = Cache::open(&dir.path().join("file/cache"), 1).unwrap_err();
        let expected = format!("cannot use {}/file/cache: Not a directory", dir.path().display());
        assert!(
            error.starts_with(&expected) && error.ends_with("; M6_CACHE names another folder"),
            "{error}"
        );

        let [(_, shard)] = shards(dir.path());
        let cache = cache(dir.path(), 1);
        fs::remove_dir_all(&cache.dir).unwrap();
        let error = cache.fetch(&shard, |_| ()).unwrap_err().to_string();
        let expected = format!("cache of shards: cannot write in {}: No such file", cache.dir.display());
        assert!(error.starts_with(&expected), "{error}");
    }

    #[test]
    fn the_environment_names_folder_and_limit() {
        let from = |variables: &[(&str, &str)]| {
            from_variables(|name| variables.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
        };
        let home = ("HOME", "/home/me");
        assert_eq!(from(&[home]), Ok(("/home/me/.cache/m6/shards".into(), DEFAULT_LIMIT)));
        assert_eq!(from(&[home, ("XDG_CACHE_HOME", "/c")]).unwrap().0, Path::new("/c/m6/shards"));
        let limited = |limit| from(&[home, ("M6_CACHE", "/big"), ("M6_CACHE_LIMIT", limit)]);
        assert_eq!(limited("20G"), Ok(("/big".into(), 20 << 30)));
        assert_eq!(limited("1000").unwrap().1, 1000);
        for wrong in ["", "G", "20 G", "-1", "1.5T", "20GB", "99999999999T", "图"] {
            let error = limited(wrong).unwrap_err();
            assert_eq!(error, format!("M6_CACHE_LIMIT={wrong}: expected bytes, or such as 20G"));
        }
        assert!(from(&[]).unwrap_err().contains("M6_CACHE names one"));
    }

    proptest! {
        #[test]
        fn no_name_climbs_out_of_the_folder(name in "(pipe:|s3://b/)?(\\.\\./|/|\\.|[a-z?%图 ]|\\PC){0,80}") {
            let name = file_name(&name, &name);
            let mut parts = Path::new(&name).components();
            prop_assert!(matches!((parts.next(), parts.next()), (Some(Component::Normal(_)), None)));
            prop_assert!(name.len() <= 64 + 1 + MAX_TAIL && name.is_ascii());
        }
    }
}
