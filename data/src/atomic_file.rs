//! Files that appear whole, by rename.

use std::io::Write;
use std::path::Path;

use crate::error::{DataError, Result};

/// Temporary files are private by default; what we rename into place should look like any other file (the umask applies).
pub(crate) fn world_readable() -> std::fs::Permissions {
    use std::os::unix::fs::PermissionsExt;
    std::fs::Permissions::from_mode(0o666)
}

/// Writes a whole file: temporary file in the same folder, flush to disk, rename.
pub(crate) fn write_atomic(path: &Path, bytes: &[u8]) -> Result<()> {
    let dir = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let write = || {
        let mut file =
            tempfile::Builder::new().prefix(".tmp-").permissions(world_readable()).tempfile_in(dir)?;
        file.write_all(bytes)?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|e| e.error).map(drop)
    };
    write().map_err(DataError::io("write", path))
}
