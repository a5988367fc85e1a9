//! Files that are either whole or not there.

use std::fs::{File, Permissions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use crate::error::{IoContext, Result, RunError};

/// What a new file may be used for before the user's umask takes its part, as for `File::create`.
const DEFAULT_FILE_MODE: u32 = 0o666;

/// Writes `bytes` to `path` so that a reader, or the next start after a crash, sees the old content or the new,
/// never a part: a temporary file in the same folder is written, synced to disk and renamed.
///
/// # Errors
/// When the folder is not writable or the disk is full; `path` then still has its old content.
pub fn write_atomic(path: impl AsRef<Path>, bytes: &[u8]) -> Result<()> {
    let path = path.as_ref();
    let folder = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::Builder::new()
        .prefix(".tmp-")
        .permissions(Permissions::from_mode(DEFAULT_FILE_MODE))
        .tempfile_in(folder)
        .context("write", path)?;
    file.write_all(bytes).context("write", path)?;
    file.as_file().sync_all().context("write", path)?;
    file.persist(path).map_err(|e| RunError::Io {
        action: "write",
        path: path.to_owned(),
        source: e.error,
    })?;
    sync(folder)
}

/// Waits until a file's content, or a folder's list of names, is on disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| file.sync_all()).context("sync to disk", path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{in_child, is_child, run_in_child_with_file_limit};

    #[test]
    fn replaces_the_old_content_and_leaves_no_other_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.json");
        write_atomic(&path, b"old").unwrap();
        write_atomic(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_new_file_has_the_usual_permissions() {
        let dir = tempfile::tempdir().unwrap();
        File::create(dir.path().join("plain")).unwrap();
        write_atomic(dir.path().join("atomic"), b"").unwrap();
        let mode = |name| std::fs::metadata(dir.path().join(name)).unwrap().permissions().mode();
        assert_eq!(mode("plain"), mode("atomic"));
    }

    #[test]
    fn a_missing_folder_is_named() {
        let error = write_atomic("/nonexistent/a.json", b"").unwrap_err().to_string();
        assert!(error.starts_with("cannot write /nonexistent/a.json: No such file"), "{error}");
    }

    #[test]
    fn a_full_disk_keeps_the_old_content() {
        if is_child() {
            return in_child(|dir| {
                let path = dir.join("a.bin");
                write_atomic(&path, b"old").unwrap();
                let error = write_atomic(&path, &[0; 1 << 20]).unwrap_err().to_string();
                assert!(error.contains("a.bin: File too large"), "{error}");
                assert_eq!(std::fs::read(&path).unwrap(), b"old");
                assert_eq!(std::fs::read_dir(dir).unwrap().count(), 1);
            });
        }
        run_in_child_with_file_limit("atomic::tests::a_full_disk_keeps_the_old_content");
    }
}
