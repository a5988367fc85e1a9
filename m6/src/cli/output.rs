//! What commands print, and where they may write.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use m6::{Error, Result};
use serde::Serialize;

/// Skipped or broken samples that are named for a person; `--json` has more.
pub const NAMED: usize = 10;

/// Prints a line of the result. Where nobody reads any more (`m6 ... | head`) the program ends, quietly.
pub fn line(text: impl Display) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => std::process::exit(0),
        Err(error) => Err(file_error(Path::new("standard output"), error)),
    }
}

/// Prints a value as one line of JSON.
pub fn json(value: &impl Serialize) -> Result<()> {
    line(to_json(value, serde_json::to_string)?)
}

/// A value as JSON, by one of `serde_json`'s functions.
pub fn to_json<T>(value: &T, write: impl FnOnce(&T) -> serde_json::Result<String>) -> Result<String> {
    write(value).map_err(|error| file_error(Path::new("JSON"), error))
}

/// Checks, before any work is done for it, that `path` can be written, and makes its folder where there is none.
pub fn check_writable(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Err(Error::Usage(format!("{}: is a folder; expected a file name", path.display())));
    }
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    fs::create_dir_all(folder).map_err(|error| file_error(folder, error))?;
    let probe = folder.join(format!(".m6-{}", std::process::id()));
    File::create(&probe).map_err(|error| file_error(folder, error))?;
    fs::remove_file(&probe).map_err(|error| file_error(&probe, error))
}

/// Checks that an output is named `*.EXTENSION`, so that a mistyped flag does not overwrite another kind of file.
pub fn check_extension(flag: &str, path: &Path, extension: &str) -> Result<()> {
    let found = path.extension().unwrap_or_default();
    if found.eq_ignore_ascii_case(extension) {
        return Ok(());
    }
    Err(Error::Usage(format!("{flag} {}: expected a file name that ends in .{extension}", path.display())))
}

/// The path beside `path` whose name is its own without the extension, then `suffix`.
pub fn beside(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.file_stem().unwrap_or_default().to_owned();
    name.push(suffix);
    path.with_file_name(name)
}

/// An error that names a file.
pub fn file_error(path: &Path, problem: impl Display) -> Error {
    Error::File { path: path.to_owned(), problem: problem.to_string() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_made_and_nothing_is_left_in_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new/folder/out.png");
        check_writable(&path).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
    }

    #[test]
    fn what_cannot_be_written_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "").unwrap();
        let message = check_writable(&file.join("out.png")).unwrap_err().to_string();
        assert!(message.starts_with(&file.display().to_string()), "{message}");
        assert!(check_writable(dir.path()).unwrap_err().to_string().ends_with("expected a file name"));
    }

    #[test]
    fn names_beside_the_output() {
        assert_eq!(beside(Path::new("a/out.v1.png"), "-007.png"), Path::new("a/out.v1-007.png"));
        assert_eq!(beside(Path::new("out.png"), ".json"), Path::new("out.json"));
    }

    #[test]
    fn extensions_are_checked() {
        assert!(check_extension("-o", Path::new("a.PNG"), "png").is_ok());
        let error = check_extension("-o", Path::new("a.jpg"), "png").unwrap_err();
        assert_eq!(error.to_string(), "-o a.jpg: expected a file name that ends in .png");
    }
}
