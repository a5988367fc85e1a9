//! What the program says of wrong input: one line and an exit code.

use std::fs;
use std::path::Path;

use crate::scene::{Finished, Scene};

/// Exit code of what went wrong.
pub const FAILURE: i32 = 1;
/// Exit code of wrong use.
pub const WRONG_USE: i32 = 2;

/// What is wrong unless the program ended with `code` and one line that has all `words`.
fn check(what: &str, finished: &Finished, code: i32, words: &[&str]) -> Option<String> {
    let Finished { code: found, stderr, .. } = finished;
    let complaints: Vec<&str> =
        stderr.lines().filter(|line| line.starts_with("m6: ") || line.starts_with("error: ")).collect();
    let is_one_line = complaints.len() == 1 && words.iter().all(|word| complaints[0].contains(word));
    let is_handled =
        !["panicked", "internal error", "libtorch:", "backtrace"].iter().any(|bad| stderr.contains(bad));
    if *found == Some(code) && is_one_line && is_handled {
        return None;
    }
    Some(format!(
        "{what}: expected exit code {code} and one line with {words:?}, got {found:?} and\n{stderr}"
    ))
}

/// Fails unless the program ended with `code` and one line that has all `words`.
#[track_caller]
pub fn assert_refused(what: &str, finished: &Finished, code: i32, words: &[&str]) {
    if let Some(problem) = check(what, finished, code, words) {
        panic!("{problem}");
    }
}

/// A command, its exit code, and words of the line that it prints.
pub type Case<'a> = (&'a str, i32, &'a [&'a str]);

/// Runs every case, whose arguments are separated by spaces.
#[track_caller]
pub fn assert_all_refused(scene: &Scene, cases: &[Case]) {
    let problem = |(line, code, words): &Case| {
        let args: Vec<&str> = line.split(' ').collect();
        check(line, &scene.run(&args), *code, words)
    };
    let problems: Vec<String> = cases.iter().filter_map(problem).collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

/// Copies a folder with all that is in it.
pub fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let target = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy(&entry.path(), &target),
            false => drop(fs::copy(entry.path(), target).unwrap()),
        }
    }
}
