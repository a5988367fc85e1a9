//! The folder of one training run.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, Write};
use std::path::{Path, PathBuf};

use toml::{Table, Value};

use crate::atomic::write_atomic;
use crate::checkpoint;
use crate::config::load;
use crate::error::{IoContext, Result, RunError};

const CONFIG: &str = "config.toml";
const METRICS: &str = "metrics.jsonl";
const EVENTS: &str = "events";
const SAMPLES: &str = "samples";
const SKIPPED: &str = "skipped.jsonl";
const CHECKPOINTS: &str = "checkpoints";
const LOCK: &str = ".lock";

/// The folder of one training run, held by this process until the value is dropped or the process ends.
///
/// ```text
/// config.toml                  the config after all overrides; its presence makes the folder a run
/// metrics.jsonl                one JSON object a report
/// events/                      the same for TensorBoard
/// samples/                     pictures made while training
/// checkpoints/step-00001000/   one folder a checkpoint
/// ```
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// An advisory lock (flock): the system lets go of it however the process ends.
    _lock: File,
}

impl RunDir {
    /// Whether `path` holds a run.
    #[must_use]
    pub fn exists(path: impl AsRef<Path>) -> bool {
        path.as_ref().join(CONFIG).is_file()
    }

    /// Starts a run in `path`, which is made if it is not there, and writes its resolved config.
    ///
    /// # Errors
    /// When the folder holds a run, is in use by another process, or is not writable.
    pub fn create(path: impl AsRef<Path>, config: &Table) -> Result<Self> {
        let path = path.as_ref();
        fs::create_dir_all(path).context("create run folder", path)?;
        let lock = lock(path)?;
        if Self::exists(path) {
            return Err(RunError::RunExists(path.to_owned()));
        }
        for folder in [EVENTS, SAMPLES, CHECKPOINTS] {
            let folder = path.join(folder);
            fs::create_dir_all(&folder).context("create folder", &folder)?;
        }
        let run = Self { path: path.to_owned(), _lock: lock };
        write_atomic(run.config(), config.to_string().as_bytes())?;
        Ok(run)
    }

    /// Takes up the run in `path`.
    ///
    /// # Errors
    /// When the folder holds no run, is in use by another process, or is not writable.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        if !Self::exists(path) {
            return Err(RunError::NoRun(path.to_owned()));
        }
        Ok(Self { path: path.to_owned(), _lock: lock(path)? })
    }

    /// Takes up the run in `path`, or starts one if there is none or it has not come to a checkpoint. A run goes on
    /// with the config that it was started with; only `free_keys` (such as `data.workers`) may differ.
    ///
    /// # Errors
    /// When another key differs, or the folder is in use by another process, or is not writable.
    pub fn open_or_create(path: impl AsRef<Path>, config: &Table, free_keys: &[&str]) -> Result<Self> {
        let path = path.as_ref();
        if !Self::exists(path) {
            return Self::create(path, config);
        }
        let run = Self::open(path)?;
        if !checkpoint::exists(&run.checkpoints())? {
            write_atomic(run.config(), config.to_string().as_bytes())?;
            return Ok(run);
        }
        let stored = load::<Table>(run.config(), &[])?.table;
        match first_difference(&stored, config, "", free_keys) {
            None => Ok(run),
            Some(key) => Err(RunError::OtherConfig { run: path.to_owned(), key }),
        }
    }

    /// The folder itself.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved config.
    #[must_use]
    pub fn config(&self) -> PathBuf {
        self.path.join(CONFIG)
    }

    /// One JSON object a report.
    #[must_use]
    pub fn metrics(&self) -> PathBuf {
        self.path.join(METRICS)
    }

    /// Folder of TensorBoard's event files.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.path.join(EVENTS)
    }

    /// One JSON object for each sample that could not be used.
    #[must_use]
    pub fn skipped(&self) -> PathBuf {
        self.path.join(SKIPPED)
    }

    /// Folder of the pictures made while training.
    #[must_use]
    pub fn samples(&self) -> PathBuf {
        self.path.join(SAMPLES)
    }

    /// Folder of the checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.path.join(CHECKPOINTS)
    }
}

/// The first key that has another value in `b` than in `a`, except `free_keys` and what is inside of them.
fn first_difference(a: &Table, b: &Table, prefix: &str, free_keys: &[&str]) -> Option<String> {
    let keys: BTreeSet<&String> = a.keys().chain(b.keys()).collect();
    keys.into_iter().find_map(|name| {
        let key = format!("{prefix}{name}");
        match (a.get(name), b.get(name)) {
            _ if free_keys.contains(&key.as_str()) => None,
            (Some(Value::Table(a)), Some(Value::Table(b))) => {
                first_difference(a, b, &format!("{key}."), free_keys)
            }
            (a, b) => (a != b).then_some(key),
        }
    })
}

/// Locks the folder for this process and leaves its number for the message that another one will show.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .context("write in run folder", folder)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            file.read_to_string(&mut owner).context("read", &path)?;
            return Err(RunError::Locked { path: folder.to_owned(), owner: owner.trim().to_owned() });
        }
        Err(TryLockError::Error(source)) => {
            return Err(RunError::Io { action: "lock run folder", path: folder.to_owned(), source });
        }
    }
    file.set_len(0).context("write", &path)?;
    file.rewind().context("write", &path)?;
    writeln!(file, "process {}", std::process::id()).context("write", &path)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{child, in_child, is_child};

    fn config() -> toml::Table {
        toml::toml! { steps = 3 }
    }

    #[test]
    fn create_makes_the_layout_and_writes_the_config() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("runs/a");
        let run = RunDir::create(&path, &config()).unwrap();
        assert_eq!(fs::read_to_string(run.config()).unwrap(), "steps = 3\n");
        for folder in [run.events(), run.samples(), run.checkpoints()] {
            assert!(folder.is_dir());
        }
    }

    #[test]
    fn a_run_is_created_once_and_opened_often() {
        let dir = tempfile::tempdir().unwrap();
        let error = RunDir::open(dir.path()).unwrap_err().to_string();
        assert!(error.ends_with("holds no run: it has no config.toml"), "{error}");
        drop(RunDir::create(dir.path(), &config()).unwrap());
        let error = RunDir::create(dir.path(), &config()).unwrap_err().to_string();
        assert!(error.contains("already holds a run"), "{error}");
        drop(RunDir::open(dir.path()).unwrap());
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_run_with_a_checkpoint_goes_on_with_its_own_config() {
        let dir = tempfile::tempdir().unwrap();
        let run = |config: Table| RunDir::open_or_create(dir.path(), &config, &["log", "data.workers"]);
        run(toml::toml! { steps = 3 }).unwrap();
        let first = run(toml::toml! { steps = 4 data = { workers = 1, seed = 1 } }).unwrap();
        assert!(fs::read_to_string(first.config()).unwrap().contains("steps = 4"));
        fs::create_dir(first.checkpoints().join("step-00000001")).unwrap();
        drop(first);
        run(toml::toml! { steps = 4 log = 7 data = { workers = 2, seed = 1 } }).unwrap();
        let error = run(toml::toml! { steps = 4 data = { seed = 2 } }).unwrap_err().to_string();
        assert!(error.contains("was started with another `data.seed`; choose"), "{error}");
        let error = run(toml::toml! { steps = 4 }).unwrap_err().to_string();
        assert!(error.contains("was started with another `data`; choose"), "{error}");
    }

    #[test]
    fn a_run_in_use_names_the_other_process() {
        let dir = tempfile::tempdir().unwrap();
        let _held = RunDir::create(dir.path(), &config()).unwrap();
        let error = RunDir::open(dir.path()).unwrap_err().to_string();
        let expected = format!("is in use by another process (process {})", std::process::id());
        assert!(error.ends_with(&expected), "{error}");
    }

    #[test]
    fn the_lock_ends_with_a_process_that_dies() {
        if is_child() {
            return in_child(|dir| {
                std::mem::forget(RunDir::create(dir, &config()).unwrap());
                std::process::abort();
            });
        }
        let dir = tempfile::tempdir().unwrap();
        let name = "run_dir::tests::the_lock_ends_with_a_process_that_dies";
        let output = child(name, dir.path(), "ulimit -c 0").output().unwrap();
        assert!(!output.status.success());
        RunDir::open(dir.path()).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let error = RunDir::create(file.join("run"), &config()).unwrap_err().to_string();
        assert!(error.starts_with("cannot create run folder ") && error.contains("file/run: "), "{error}");
        // procfs refuses new files even to root, whom permission bits do not stop.
        let error = RunDir::create("/proc/self", &config()).unwrap_err().to_string();
        assert!(error.starts_with("cannot write in run folder /proc/self: "), "{error}");
    }
}
