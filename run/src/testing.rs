//! Tests that need a process of their own run themselves again in a child.

use std::path::Path;
use std::process::{Command, Stdio};

const CHILD: &str = "M6_RUN_TEST_CHILD";

/// Whether this process was started by one of the functions below.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs `body` in the folder that the parent made for it.
pub fn in_child(body: impl FnOnce(&Path)) {
    body(Path::new(&std::env::var_os(CHILD).expect("set by the parent")));
}

/// A command that runs the test `name` of this binary as a child, through a shell that first runs `setup`.
pub fn child(name: &str, dir: &Path, setup: &str) -> Command {
    let mut command = Command::new("sh");
    command
        .args(["-c", &format!("{setup}; exec \"$0\" \"$@\"")])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(CHILD, dir)
        .stdin(Stdio::null());
    command
}

/// Runs the test `name` in a child that cannot write files larger than a few KiB, which is how a full disk looks.
pub fn run_in_child_with_file_limit(name: &str) {
    let dir = tempfile::tempdir().unwrap();
    let output = child(name, dir.path(), "trap '' XFSZ; ulimit -f 16").output().unwrap();
    let text =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success() && text.contains("1 passed"), "{text}");
}
