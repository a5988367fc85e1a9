//! The commands that documents and configs show are commands that the program takes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Where a shell command ends and the program's arguments with it.
const ENDS: [&str; 6] = [" | ", " > ", " && ", " ; ", " # ", " & "];

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Files below `folder` with this extension.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(repository().join(folder)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() && folder != "." {
            let inner = Path::new(folder).join(path.file_name().unwrap());
            found.extend(files(inner.to_str().unwrap(), extension));
        } else if path.extension().is_some_and(|e| e == extension) {
            found.push(path);
        }
    }
    found
}

/// Lines of a document's code blocks.
fn code(markdown: &str) -> String {
    let blocks = markdown.split("```").skip(1).step_by(2);
    blocks.collect::<Vec<_>>().join("\n")
}

/// What a config's comments say at the end of a line, such as `Run it alone: m6 train ...`.
fn comments(toml: &str) -> String {
    let lines = toml.lines().filter_map(|line| line.strip_prefix('#')?.rsplit(": ").next());
    lines.collect::<Vec<_>>().join("\n")
}

/// The lines of `text` that start the program or make, with continued lines joined and without what follows a command.
fn commands(text: &str) -> Vec<String> {
    let joined = text.replace("\\\n", " ");
    let lines = joined.lines().map(|line| line.trim().trim_start_matches("$ "));
    let commands = lines.filter_map(|line| {
        let line = line.strip_prefix("target/release/").unwrap_or(line);
        let end = ENDS.iter().filter_map(|end| line.find(end)).min().unwrap_or(line.len());
        (line.starts_with("m6 ") || line.starts_with("make ")).then(|| line[..end].to_owned())
    });
    commands.collect()
}

/// What is wrong with a command, if anything: its flags are parsed up to `--help`, which then runs nothing.
fn problem(command: &str) -> Option<String> {
    if let Some(targets) = command.strip_prefix("make ") {
        let makefile = fs::read_to_string(repository().join("Makefile")).unwrap();
        let is_missing =
            |target: &&str| !makefile.lines().any(|line| line.starts_with(&format!("{target}:")));
        let missing = targets.split_whitespace().filter(|word| !word.contains('=')).find(is_missing);
        return missing.map(|target| format!("no target {target}"));
    }
    let words = command.split_whitespace();
    let missing =
        words.filter(|word| word.starts_with("configs/")).find(|word| !repository().join(word).is_file());
    if let Some(config) = missing {
        return Some(format!("no file {config}"));
    }
    let arguments = command.strip_prefix("m6 ")?;
    let output = Command::new("sh")
        .args(["-c", &format!("exec \"$0\" {arguments} --help"), env!("CARGO_BIN_EXE_m6")])
        .current_dir(repository())
        .output()
        .unwrap();
    (!output.status.success()).then(|| String::from_utf8_lossy(&output.stderr).into_owned())
}

#[test]
fn shown_commands_are_understood() {
    let documents =
        [files(".", "md"), files("docs", "md"), files("models", "md"), files("datasets", "md")].concat();
    let configs = files("configs", "toml");
    let read = |path: &PathBuf| fs::read_to_string(path).unwrap();
    let texts = documents.iter().map(|path| (path, code(&read(path))));
    let texts = texts.chain(configs.iter().map(|path| (path, comments(&read(path)))));
    let found: Vec<(&PathBuf, String)> = texts
        .flat_map(|(path, text)| commands(&text).into_iter().map(move |command| (path, command)))
        .collect();
    assert!(found.iter().any(|(_, command)| command.starts_with("m6 ")), "no command found");
    let problems: Vec<String> = found
        .iter()
        .filter_map(|(path, command)| Some(format!("{}: {command}\n{}", path.display(), problem(command)?)))
        .collect();
    assert!(problems.is_empty(), "{}", problems.join("\n"));
}

#[test]
fn a_renamed_flag_is_noticed() {
    assert_eq!(
        commands("$ m6 caption --model a \\\n  b.png | head\nls\nmake demo"),
        ["m6 caption --model a    b.png", "make demo"]
    );
    assert_eq!(problem("m6 caption --model a b.png"), None);
    assert!(problem("m6 caption --modle a b.png").is_some_and(|line| line.contains("--modle")));
    assert!(problem("m6 train configs/none.toml").is_some());
    assert!(problem("make demo CUDA=0").is_none() && problem("make tea").is_some());
}
