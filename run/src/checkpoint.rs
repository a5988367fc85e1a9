//! Checkpoints: folders that appear whole, are checked when read, and replace the oldest.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::atomic::{sync, write_atomic};
use crate::error::{IoContext, Result, RunError};

/// Version of `meta.json` that this program writes and reads.
const FORMAT: u32 = 1;
const META: &str = "meta.json";
const PREFIX: &str = "step-";
/// A checkpoint that is being written.
const TMP_PREFIX: &str = ".tmp-step-";
/// A checkpoint that is being replaced by one of the same step.
const OLD_PREFIX: &str = ".old-step-";

/// What `meta.json` says about a checkpoint: enough to tell a damaged file by name.
#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    format: u32,
    step: u64,
    files: Vec<FileEntry>,
}

#[derive(Debug, Serialize, Deserialize)]
struct FileEntry {
    /// Path inside the checkpoint.
    name: PathBuf,
    /// Bytes.
    size: u64,
    /// Hash of the content, hexadecimal.
    blake3: String,
}

/// The checkpoints of a run that this process trains. For reading another's use [`latest`], [`at`] and [`verify`].
#[derive(Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Takes charge of the checkpoints in `dir`, which is made if it is not there, and clears away what a crash
    /// left half written. `keep` is how many stay on disk, at least 1.
    ///
    /// The caller holds the run folder's lock ([`RunDir`](crate::RunDir)).
    ///
    /// # Errors
    /// When the folder cannot be made, read or changed.
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Result<Self> {
        let dir = dir.into();
        fs::create_dir_all(&dir).context("create folder", &dir)?;
        for (step, path) in list(&dir, OLD_PREFIX)? {
            let replaced_by = dir.join(folder_name(PREFIX, step));
            if !replaced_by.exists() {
                fs::rename(&path, &replaced_by).context("rename", &path)?;
            }
        }
        for prefix in [OLD_PREFIX, TMP_PREFIX] {
            for (_, path) in list(&dir, prefix)? {
                remove(&path)?;
            }
        }
        Ok(Self { dir, keep: keep.max(1) })
    }

    /// Saves the checkpoint of `step`: `write` fills an empty folder, which gets its name only when all of it is
    /// on disk. Then the oldest checkpoints beyond the number to keep are removed. Returns the new one's folder.
    ///
    /// # Errors
    /// When `write` fails or the disk is full; the half-written folder is removed and older checkpoints stay.
    pub fn save<E: std::fmt::Display>(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> std::result::Result<(), E>,
    ) -> Result<PathBuf> {
        let tmp = self.dir.join(folder_name(TMP_PREFIX, step));
        let path = self.dir.join(folder_name(PREFIX, step));
        let failed = |reason: String| RunError::Save { step, reason };
        let written = fs::create_dir(&tmp)
            .context("create folder", &tmp)
            .map_err(|error| error.to_string())
            .and_then(|()| write(&tmp).map_err(|error| format!("{error:#}")))
            .and_then(|()| seal(&tmp, step).map_err(|error| error.to_string()));
        if let Err(reason) = written {
            // The first failure is the one to report; what stays behind is removed at the next start.
            let _ = fs::remove_dir_all(&tmp);
            return Err(failed(reason));
        }
        self.put_in_place(step, &tmp, &path).map_err(|error| failed(error.to_string()))?;
        self.prune(step)?;
        Ok(path)
    }

    fn put_in_place(&self, step: u64, tmp: &Path, path: &Path) -> Result<()> {
        let old = self.dir.join(folder_name(OLD_PREFIX, step));
        let replaces = path.exists();
        if replaces {
            fs::rename(path, &old).context("rename", path)?;
        }
        fs::rename(tmp, path).context("rename", tmp)?;
        sync(&self.dir)?;
        if replaces {
            remove(&old)?;
        }
        Ok(())
    }

    fn prune(&self, newest: u64) -> Result<()> {
        let mut older = list(&self.dir, PREFIX)?;
        older.retain(|(step, _)| *step < newest);
        let excess = older.len().saturating_sub(self.keep - 1);
        older[..excess].iter().try_for_each(|(_, path)| remove(path))
    }

    /// Step and folder of the newest checkpoint; see [`latest`].
    ///
    /// # Errors
    /// As for [`latest`].
    pub fn latest(&self) -> Result<Option<(u64, PathBuf)>> {
        latest(&self.dir)
    }

    /// Removes the checkpoints after `step`, for a run that goes on from an older one.
    ///
    /// # Errors
    /// When a folder cannot be removed.
    pub fn rewind(&self, step: u64) -> Result<()> {
        let newer = list(&self.dir, PREFIX)?.into_iter().filter(|(s, _)| *s > step);
        newer.map(|(_, path)| path).try_for_each(|path| remove(&path))
    }
}

/// Whether `dir` holds a checkpoint, whole or not.
pub(crate) fn exists(dir: &Path) -> Result<bool> {
    Ok(!list(dir, PREFIX)?.is_empty() || !list(dir, OLD_PREFIX)?.is_empty())
}

/// Step and folder of the newest checkpoint in `dir` after [`verify`], or `None` if there is none yet.
///
/// # Errors
/// When the newest is damaged: the message names it and lists the older ones, which are not used unasked.
pub fn latest(dir: impl AsRef<Path>) -> Result<Option<(u64, PathBuf)>> {
    let mut found = list(dir.as_ref(), PREFIX)?;
    let Some((step, path)) = found.pop() else { return Ok(None) };
    match verify(&path) {
        Ok(()) => Ok(Some((step, path))),
        Err(damage) => Err(RunError::DamagedNewest {
            damage: Box::new(damage),
            older: found.into_iter().rev().map(|(_, path)| path).collect(),
        }),
    }
}

/// Folder of the checkpoint of `step` in `dir`, after [`verify`].
///
/// # Errors
/// When there is none, or it is damaged.
pub fn at(dir: impl AsRef<Path>, step: u64) -> Result<PathBuf> {
    let dir = dir.as_ref();
    let path = dir.join(folder_name(PREFIX, step));
    if !path.is_dir() {
        return Err(RunError::NoCheckpoint { path: dir.to_owned(), step });
    }
    verify(&path)?;
    Ok(path)
}

/// Checks that the checkpoint in `path` has every file it was saved with, by size and hash.
///
/// # Errors
/// When `meta.json` is missing, broken or of another format, or a file is missing or differs; the file is named.
pub fn verify(path: impl AsRef<Path>) -> Result<()> {
    let path = path.as_ref();
    let damaged = |reason: String| RunError::DamagedCheckpoint { path: path.to_owned(), reason };
    let text = fs::read(path.join(META)).map_err(|error| damaged(format!("{META}: {error}")))?;
    let meta: Meta = serde_json::from_slice(&text).map_err(|error| damaged(format!("{META}: {error}")))?;
    if meta.format != FORMAT {
        let reason = format!("{META}: format is {}, this program reads {FORMAT}", meta.format);
        return Err(damaged(reason));
    }
    for saved in &meta.files {
        let name = saved.name.display();
        let file = path.join(&saved.name);
        let size = fs::metadata(&file).map_err(|error| damaged(format!("{name}: {error}")))?.len();
        if size != saved.size {
            return Err(damaged(format!("{name} has {size} bytes, expected {}", saved.size)));
        }
        let hash = hash(&file).map_err(|error| damaged(error.to_string()))?;
        if hash != saved.blake3 {
            return Err(damaged(format!("the content of {name} has changed since it was saved")));
        }
    }
    Ok(())
}

fn folder_name(prefix: &str, step: u64) -> String {
    format!("{prefix}{step:08}")
}

/// Steps and folders in `dir` whose names are `prefix` and a number, oldest first.
fn list(dir: &Path, prefix: &str) -> Result<Vec<(u64, PathBuf)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).context("read folder", dir)? {
        let entry = entry.context("read folder", dir)?;
        let name = entry.file_name();
        let step =
            name.to_str().and_then(|name| name.strip_prefix(prefix)).and_then(|step| step.parse().ok());
        found.extend(step.map(|step| (step, entry.path())));
    }
    found.sort_unstable();
    Ok(found)
}

/// Brings all files of a new checkpoint to disk and adds the list of them.
fn seal(folder: &Path, step: u64) -> Result<()> {
    let mut files = Vec::new();
    seal_folder(folder, Path::new(""), &mut files)?;
    files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
    let meta = serde_json::to_vec_pretty(&Meta { format: FORMAT, step, files })
        .map_err(std::io::Error::from)
        .context("write", &folder.join(META))?;
    write_atomic(folder.join(META), &meta)
}

fn seal_folder(root: &Path, inside: &Path, files: &mut Vec<FileEntry>) -> Result<()> {
    let folder = root.join(inside);
    for entry in fs::read_dir(&folder).context("read folder", &folder)? {
        let entry = entry.context("read folder", &folder)?;
        let (name, path) = (inside.join(entry.file_name()), entry.path());
        let metadata = entry.metadata().context("read", &path)?;
        if metadata.is_dir() {
            seal_folder(root, &name, files)?;
        } else {
            sync(&path)?;
            files.push(FileEntry { name, size: metadata.len(), blake3: hash(&path)? });
        }
    }
    sync(&folder)
}

fn hash(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    File::open(path).and_then(|file| hasher.update_reader(file).map(|_| ())).context("read", path)?;
    Ok(hasher.finalize().to_hex().to_string())
}

fn remove(path: &Path) -> Result<()> {
    fs::remove_dir_all(path).context("remove", path)
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;
    use crate::testing::{in_child, is_child, run_in_child_with_file_limit};

    fn write_step(step: u64) -> impl FnOnce(&Path) -> io::Result<()> {
        move |folder| {
            fs::create_dir(folder.join("rng"))?;
            fs::write(folder.join("rng/cpu.bin"), [7; 16])?;
            fs::write(folder.join("model.bin"), step.to_string())
        }
    }

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    #[test]
    fn keeps_the_newest_and_finds_the_latest() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path().join("new"), 2).unwrap();
        assert_eq!(checkpoints.latest().unwrap(), None);
        for step in [100, 200, 300] {
            checkpoints.save(step, write_step(step)).unwrap();
        }
        assert_eq!(names(&checkpoints.dir), ["step-00000200", "step-00000300"]);
        let (step, path) = checkpoints.latest().unwrap().unwrap();
        assert_eq!(step, 300);
        assert_eq!(fs::read_to_string(path.join("model.bin")).unwrap(), "300");
        assert_eq!(at(&checkpoints.dir, 200).unwrap(), checkpoints.dir.join("step-00000200"));
        let error = at(&checkpoints.dir, 100).unwrap_err().to_string();
        assert!(error.ends_with("new holds no checkpoint of step 100"), "{error}");
    }

    #[test]
    fn saves_a_step_again() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 1).unwrap();
        checkpoints.save(1, write_step(1)).unwrap();
        let path = checkpoints.save(1, write_step(2)).unwrap();
        assert_eq!(fs::read_to_string(path.join("model.bin")).unwrap(), "2");
        assert_eq!(names(dir.path()), ["step-00000001"]);
    }

    #[test]
    fn a_failed_save_leaves_the_one_before() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 1).unwrap();
        checkpoints.save(1, write_step(1)).unwrap();
        let error = checkpoints
            .save(2, |folder| {
                write_step(2)(folder)?;
                Err(io::Error::from(io::ErrorKind::StorageFull))
            })
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "checkpoint of step 2 was not saved: no storage space; older checkpoints are intact"
        );
        assert_eq!(names(dir.path()), ["step-00000001"]);
        assert_eq!(checkpoints.latest().unwrap().unwrap().0, 1);
    }

    #[test]
    fn a_full_disk_leaves_the_one_before() {
        if is_child() {
            return in_child(|dir| {
                let checkpoints = Checkpoints::new(dir, 1).unwrap();
                checkpoints.save(1, write_step(1)).unwrap();
                let error = checkpoints
                    .save(2, |folder| write_atomic(folder.join("model.bin"), &[0; 1 << 20]))
                    .unwrap_err();
                let error = error.to_string();
                assert!(error.starts_with("checkpoint of step 2 was not saved: cannot write "), "{error}");
                assert!(error.contains("model.bin: File too large"), "{error}");
                assert_eq!(names(dir), ["step-00000001"]);
                assert_eq!(checkpoints.latest().unwrap().unwrap().0, 1);
            });
        }
        run_in_child_with_file_limit("checkpoint::tests::a_full_disk_leaves_the_one_before");
    }

    #[test]
    fn what_a_crash_left_is_cleared_at_the_next_start() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 3).unwrap();
        checkpoints.save(1, write_step(1)).unwrap();
        checkpoints.save(2, write_step(2)).unwrap();
        fs::create_dir(dir.path().join(".tmp-step-00000003")).unwrap();
        // A crash between the two renames of a replacement, and one after them.
        fs::rename(dir.path().join("step-00000001"), dir.path().join(".old-step-00000001")).unwrap();
        fs::create_dir(dir.path().join(".old-step-00000002")).unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 3).unwrap();
        assert_eq!(names(dir.path()), ["step-00000001", "step-00000002"]);
        assert_eq!(checkpoints.latest().unwrap().unwrap().0, 2);
        verify(dir.path().join("step-00000001")).unwrap();
    }

    #[test]
    fn a_damaged_newest_is_named_and_the_older_are_listed() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 3).unwrap();
        for step in [1, 2, 3] {
            checkpoints.save(step, write_step(step)).unwrap();
        }
        let newest = dir.path().join("step-00000003");
        let message = || checkpoints.latest().unwrap_err().to_string();

        fs::write(newest.join("model.bin"), "9").unwrap();
        let error = message();
        assert!(error.contains("step-00000003 is damaged: the content of model.bin has changed"), "{error}");
        let (first, second) = (dir.path().join("step-00000001"), dir.path().join("step-00000002"));
        let older = format!("; older checkpoints: {}, {}", second.display(), first.display());
        assert!(error.ends_with(&older), "{error}");

        fs::write(newest.join("model.bin"), "").unwrap();
        assert!(message().contains("model.bin has 0 bytes, expected 1"));
        fs::remove_file(newest.join("rng/cpu.bin")).unwrap();
        fs::write(newest.join("model.bin"), "3").unwrap();
        assert!(message().contains("rng/cpu.bin: No such file"));
        fs::write(newest.join(META), r#"{"format":2,"step":3,"files":[]}"#).unwrap();
        assert!(message().contains("meta.json: format is 2, this program reads 1"));
        fs::write(newest.join(META), "{").unwrap();
        assert!(message().contains("meta.json: EOF"));
        fs::remove_file(newest.join(META)).unwrap();
        assert!(message().contains("meta.json: No such file"));
    }

    #[test]
    fn going_on_from_an_older_one_drops_the_newer() {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 2).unwrap();
        checkpoints.save(10, write_step(10)).unwrap();
        checkpoints.save(20, write_step(20)).unwrap();
        checkpoints.rewind(10).unwrap();
        checkpoints.save(15, write_step(15)).unwrap();
        assert_eq!(names(dir.path()), ["step-00000010", "step-00000015"]);
    }
}
