//! Names of shards: files, globs, urls, commands, and brace lists of them.

use std::collections::HashSet;
use std::path::PathBuf;

use crate::error::{DataError, Result};
use crate::source::{Far, Source};

/// A brace list may name at most this many shards.
const MAX_EXPANSION: usize = 1 << 20;

/// The shards that the patterns name, in their order and sorted within each glob.
///
/// # Errors
/// No pattern, one that is malformed, or one that names nothing.
pub(crate) fn resolve(patterns: &[String]) -> Result<Vec<Source>> {
    if patterns.is_empty() {
        let reason = "no files given, expected at least one".to_owned();
        return Err(DataError::Pattern { pattern: String::new(), reason });
    }
    let resolved = patterns.iter().map(|pattern| resolve_one(pattern)).collect::<Result<Vec<_>>>()?;
    Ok(resolved.into_iter().flatten().collect())
}

fn resolve_one(pattern: &str) -> Result<Vec<Source>> {
    let fail = |reason: String| DataError::Pattern { pattern: pattern.to_owned(), reason };
    let mut alternatives = Vec::new();
    expand_braces(pattern, &mut alternatives).map_err(fail)?;

    let mut sources = Vec::new();
    let mut seen = HashSet::new();
    for alternative in alternatives {
        if let Some(far) = Far::parse(&alternative).map_err(fail)? {
            if seen.insert(PathBuf::from(far.name())) {
                sources.push(Source::Far(far));
            }
            continue;
        }
        let matches: Vec<PathBuf> = if alternative.contains(['*', '?', '[']) {
            let found = glob::glob(&alternative).map_err(|e| fail(format!("not a valid glob: {e}")))?;
            found.collect::<std::result::Result<_, _>>().map_err(|e| fail(e.to_string()))?
        } else {
            Some(PathBuf::from(&alternative)).filter(|path| path.exists()).into_iter().collect()
        };
        if matches.is_empty() {
            let named = if alternative == pattern { String::new() } else { format!(" (for {alternative})") };
            return Err(fail(format!(
                "no such file{named}; expected a tar file, a glob, a url, pipe:COMMAND or a list like {{000..017}}"
            )));
        }
        if let Some(folder) = matches.iter().find(|path| path.is_dir()) {
            return Err(fail(format!("{0} is a folder; for its shards write {0}/*.tar", folder.display())));
        }
        sources.extend(matches.into_iter().filter(|path| seen.insert(path.clone())).map(Source::of_file));
    }
    Ok(sources)
}

/// Expands `{a,b}` and `{000..017}` (zero-padded like its bounds), also several in one pattern.
fn expand_braces(pattern: &str, out: &mut Vec<String>) -> std::result::Result<(), String> {
    let too_many = || format!("names more than {MAX_EXPANSION} shards");
    let Some(open) = pattern.find('{') else {
        if out.len() == MAX_EXPANSION {
            return Err(too_many());
        }
        out.push(pattern.to_owned());
        return Ok(());
    };
    let close = open + pattern[open..].find('}').ok_or("a { without its }")?;
    let (head, body, tail) = (&pattern[..open], &pattern[open + 1..close], &pattern[close + 1..]);
    if let Some((first, last)) = body.split_once("..") {
        let bound = |s: &str| s.parse::<u64>().map_err(|_| format!("{{{body}}} is not a range of numbers"));
        let (low, high) = (bound(first)?, bound(last)?);
        if low > high {
            return Err(format!("{{{body}}} counts downwards"));
        }
        for n in low..=high {
            expand_braces(&format!("{head}{n:0width$}{tail}", width = first.len()), out)?;
        }
    } else if body.contains(',') {
        for choice in body.split(',') {
            expand_braces(&format!("{head}{choice}{tail}"), out)?;
        }
    } else {
        // As in shells, braces around one thing are no list: a command may have its own.
        let mut tails = Vec::new();
        expand_braces(tail, &mut tails)?;
        if out.len() + tails.len() > MAX_EXPANSION {
            return Err(too_many());
        }
        out.extend(tails.iter().map(|tail| format!("{head}{{{body}}}{tail}")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn patterns_name_files_globs_and_lists() {
        let dir = tempfile::tempdir().unwrap();
        for n in 8..=11 {
            std::fs::write(dir.path().join(format!("train-{n:03}.tar")), "").unwrap();
        }
        let names = |pattern: &str| {
            let sources = resolve(&[dir.path().join(pattern).display().to_string()])?;
            let name = |source: Source| source.name().file_stem().unwrap().to_str().unwrap()[6..].to_owned();
            Ok::<_, DataError>(sources.into_iter().map(name).collect::<Vec<_>>().join(" "))
        };
        assert_eq!(names("train-{008..011}.tar").unwrap(), "008 009 010 011");
        assert_eq!(names("train-0{10,08}.tar").unwrap(), "010 008");
        assert_eq!(names("train-*.tar").unwrap(), "008 009 010 011");
        assert_eq!(names("{train-009,train-*}.tar").unwrap(), "009 008 010 011");
        let error = |pattern| names(pattern).unwrap_err().to_string();
        assert!(error("train-{008..012}.tar").contains("train-012.tar"));
        assert!(error("valid-*.tar").contains("no such file"));
        assert!(error("train-{a..b}.tar").contains("not a range"));
        assert!(error("train-{008.tar").contains("without its }"));
        assert!(error("").contains("is a folder"));
        let mut commands = Vec::new();
        expand_braces("pipe:awk '{print}' {1,2}.tar", &mut commands).unwrap();
        assert_eq!(commands, ["pipe:awk '{print}' 1.tar", "pipe:awk '{print}' 2.tar"]);
        assert!(resolve(&[]).unwrap_err().to_string().contains("expected at least one"));
    }

    proptest! {
        #[test]
        fn any_pattern_is_survived(pattern in "[a-c{}.,0-9]{0,12}") {
            let mut out = Vec::new();
            // Wide ranges are cut off by the limit, which the parser checks while it expands.
            let _ = expand_braces(&pattern, &mut out);
            prop_assert!(out.len() <= MAX_EXPANSION);
        }
    }
}
