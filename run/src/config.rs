//! Configs: a TOML file, `--set a.b=c` overrides, and errors that name the key.

use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;
use toml::{Table, Value};

use crate::error::{IoContext, Result, RunError};

/// How many single-letter edits away an unknown key may be from a known one that is offered as a hint.
const MAX_HINT_DISTANCE: usize = 3;

/// The key by which a table takes over what a file has.
const FROM: &str = "from";

/// A config as the program uses it and as the run folder keeps it.
#[derive(Debug, Clone)]
pub struct Loaded<T> {
    /// The typed config.
    pub config: T,
    /// The file's keys after all overrides.
    pub table: Table,
}

/// Reads the TOML file at `path`, applies `overrides` of the form `a.b=c`, and deserialises the result.
///
/// The value of an override is read as TOML, and as a plain string where that fails, so that `--set data.dir=x`
/// needs no quotes. A number as part of the key picks an element of an array. Relative paths inside a config are
/// relative to the working directory. Where a top-level table has a key `from`, it takes from the file named there what the
/// table of the same name holds and it does not. Types should be `#[serde(deny_unknown_fields)]`, so that a mistyped key is
/// an error.
///
/// # Errors
/// When the file cannot be read or is not TOML, an override does not parse or does not lead anywhere, or a key is
/// unknown, missing or has a value that does not fit; the same of a file that a table is taken from. The message names the file or override and the full key.
pub fn load<T: DeserializeOwned>(path: impl AsRef<Path>, overrides: &[String]) -> Result<Loaded<T>> {
    let path = path.as_ref();
    let mut table = read(path)?;
    for text in overrides {
        apply_override(&mut table, text)?;
    }
    take_over(&mut table)?;
    let config = serde_path_to_error::deserialize(table.clone()).map_err(|error| {
        let key = error.path().to_string();
        key_error(path, overrides, &key, error.inner().message())
    })?;
    Ok(Loaded { config, table })
}

fn read(path: &Path) -> Result<Table> {
    let text = fs::read_to_string(path).context("read config", path)?;
    text.parse().map_err(|error| syntax_error(path, &text, &error))
}

/// Fills every top-level table that has a key [`FROM`].
fn take_over(table: &mut Table) -> Result<()> {
    for (name, value) in table.iter_mut() {
        let Some(own) = value.as_table_mut() else { continue };
        let Some(source) = own.get(FROM).and_then(Value::as_str).map(str::to_owned) else { continue };
        own.remove(FROM);
        let error = || RunError::ConfigKey {
            origin: source.clone(),
            key: name.clone(),
            message: format!("expected a table, for `{name}.{FROM}`"),
        };
        let Some(Value::Table(theirs)) = read(Path::new(&source))?.remove(name) else { return Err(error()) };
        for (key, value) in theirs {
            own.entry(key).or_insert(value);
        }
    }
    Ok(())
}

fn syntax_error(path: &Path, text: &str, error: &toml::de::Error) -> RunError {
    let offset = error.span().map_or(0, |span| span.start);
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    RunError::ConfigSyntax {
        path: path.to_owned(),
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
        message: one_line(error.message()),
    }
}

fn key_error(path: &Path, overrides: &[String], key: &str, message: &str) -> RunError {
    // Serde's path for "no key in particular".
    let key = if key == "." { "" } else { key };
    let message = one_line(message);
    let hint = hint(&message).map_or_else(String::new, |known| format!("; did you mean `{known}`?"));
    // A missing key is reported at its table, which an override of another key in it did not write.
    let may_be_override = !message.starts_with("missing ");
    let origin = overrides
        .iter()
        .rev()
        .find(|text| may_be_override && text.split_once('=').is_some_and(|(given, _)| writes(given, key)))
        .map_or_else(|| path.display().to_string(), |text| format!("--set {text}"));
    RunError::ConfigKey { origin, key: key.to_owned(), message: message + &hint }
}

/// Whether an override of the key `given` writes the key that serde calls `a.b[0].c`, or something inside it.
fn writes(given: &str, serde_path: &str) -> bool {
    let key = serde_path.replace('[', ".").replace(']', "");
    given.trim().strip_prefix(&key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}

fn one_line(message: &str) -> String {
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The known name that is nearest to the unknown one in serde's "unknown field `x`, expected one of `y`, `z`".
fn hint(message: &str) -> Option<&str> {
    if !message.starts_with("unknown ") {
        return None;
    }
    let mut names = message.split('`').skip(1).step_by(2);
    let unknown = names.next()?;
    let (distance, nearest) =
        names.map(|name| (strsim::damerau_levenshtein(unknown, name), name)).min_by_key(|(d, _)| *d)?;
    (distance <= MAX_HINT_DISTANCE && distance < unknown.chars().count()).then_some(nearest)
}

fn apply_override(table: &mut Table, text: &str) -> Result<()> {
    let error = |message: String| RunError::Override { text: text.to_owned(), message };
    let (key, value) = text
        .split_once('=')
        .ok_or_else(|| error("expected KEY=VALUE, such as train.steps=100".to_owned()))?;
    let parts: Vec<&str> = key.trim().split('.').collect();
    let well_formed = parts.iter().all(|part| !part.is_empty() && part.trim() == *part);
    let Some((last, tables)) = parts.split_last().filter(|_| well_formed) else {
        return Err(error(format!("`{key}` is not a key; expected names joined by dots")));
    };

    // The root is a table too; a Value makes it one case with the others.
    let mut root = Value::Table(std::mem::take(table));
    let mut target = Ok(&mut root);
    for (depth, part) in tables.iter().enumerate() {
        target = target.and_then(|value| child(value, part, &parts[..depth], || Value::Table(Table::new())));
    }
    let value = parse_value(value.trim());
    let result = target
        .and_then(|parent| child(parent, last, tables, || Value::Boolean(false)))
        .map(|slot| *slot = value)
        .map_err(error);
    if let Value::Table(changed) = root {
        *table = changed;
    }
    result
}

/// The element `part` of `value`, which `path` leads to; in a table it is made by `new` if it is not there.
fn child<'a>(
    value: &'a mut Value,
    part: &str,
    path: &[&str],
    new: impl FnOnce() -> Value,
) -> std::result::Result<&'a mut Value, String> {
    match value {
        Value::Table(table) => Ok(table.entry(part).or_insert_with(new)),
        Value::Array(array) => {
            let length = array.len();
            let index = part.parse::<usize>().ok().filter(|index| *index < length);
            let element = index.and_then(|index| array.get_mut(index));
            element.ok_or_else(|| {
                format!("`{part}` is no element of `{}`; expected a number below {length}", path.join("."))
            })
        }
        other => Err(format!("`{}` is {} `{other}`, not a table", path.join("."), other.type_str())),
    }
}

/// Reads a value as TOML, and as a string where that fails.
fn parse_value(text: &str) -> Value {
    let as_toml = format!("value = {text}").parse::<Table>().ok();
    as_toml
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"))
        .unwrap_or_else(|| Value::String(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde::Deserialize;

    use super::*;

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Config {
        name: Option<String>,
        train: Train,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Train {
        steps: u64,
        lr: f64,
        #[serde(default)]
        tasks: Vec<Task>,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(deny_unknown_fields)]
    struct Task {
        kind: Kind,
        weight: f64,
    }

    #[derive(Debug, Deserialize, PartialEq)]
    #[serde(rename_all = "kebab-case")]
    enum Kind {
        Caption,
        TextToImage,
    }

    const GOOD: &str = "[train]\nsteps = 10\nlr = 1\ntasks = [{ kind = 'caption', weight = 0.5 }]\n";

    fn load_text(text: &str, overrides: &[&str]) -> Result<Loaded<Config>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        fs::write(&path, text).unwrap();
        load(&path, &overrides.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[track_caller]
    fn assert_error(text: &str, overrides: &[&str], expected: &str) {
        let error = load_text(text, overrides).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}\ndoes not contain\n{expected}");
        assert!(!error.contains('\n'), "{error}");
    }

    #[test]
    fn overrides_reach_tables_arrays_and_keys_that_the_file_lacks() {
        let loaded = load_text(
            GOOD,
            &[
                "train.lr=1e-3",
                "name=red heart",
                "train.tasks.0.kind=text-to-image",
                "train.tasks.0.weight = 2",
            ],
        )
        .unwrap();
        assert_eq!(loaded.config.train.lr, 1e-3);
        assert_eq!(loaded.config.name.as_deref(), Some("red heart"));
        assert_eq!(loaded.config.train.tasks, [Task { kind: Kind::TextToImage, weight: 2.0 }]);
        assert_eq!(loaded.table["train"]["lr"].as_float(), Some(1e-3));
        let loaded = load_text(GOOD, &["train.tasks=[]", "name=a=b"]).unwrap();
        assert_eq!(loaded.config.train.tasks, []);
        assert_eq!(loaded.config.name.as_deref(), Some("a=b"));
    }

    #[test]
    fn a_table_may_come_from_another_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = dir.path().join("other.toml");
        fs::write(&other, format!("{GOOD}[more]\n")).unwrap();
        let from = |table: &str| format!("{table}.from={}", other.display());
        let loaded = load_text("[train]\nlr = 3\n", &[&from("train"), "train.steps=7"]).unwrap();
        let train = loaded.config.train;
        assert_eq!((train.lr, train.steps, train.tasks.len()), (3.0, 7, 1), "its own keys count");
        assert!(loaded.table["train"].get(FROM).is_none());
        assert_error(GOOD, &[&from("tarin")], "other.toml: key `tarin`: expected a table, for `tarin.from`");
        assert_error(GOOD, &["train.from=none.toml"], "cannot read config none.toml");
        assert_error(GOOD, &["train.from=3"], "key `train.from`: unknown field `from`");
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = load::<Config>("/nonexistent/run.toml", &[]).unwrap_err().to_string();
        assert!(error.starts_with("cannot read config /nonexistent/run.toml: No such file"), "{error}");
    }

    #[test]
    fn a_file_that_is_not_text_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("run.toml");
        fs::write(&path, [0xff, 0xfe]).unwrap();
        let error = load::<Config>(&path, &[]).unwrap_err().to_string();
        assert!(error.contains("run.toml: stream did not contain valid UTF-8"), "{error}");
    }

    #[test]
    fn bad_syntax_names_file_line_and_column() {
        assert_error("[train]\nsteps = = 3\n", &[], "run.toml, line 2, column 9: ");
        assert_error("[train]\n名 = 3\n", &[], "run.toml, line 2, column 1: ");
        assert_error("[train]\nsteps = 3\nsteps = 4\n", &[], "run.toml, line 3, column 1: duplicate key");
    }

    #[test]
    fn an_unknown_key_names_file_key_and_the_nearest_known_one() {
        assert_error(
            &GOOD.replace("lr", "rl"),
            &[],
            "run.toml: key `train.rl`: unknown field `rl`, expected ",
        );
        assert_error(&GOOD.replace("steps", "stesp"), &[], "; did you mean `steps`?");
        assert_error(GOOD, &["train.tasks.0.wieght=1"], "--set train.tasks.0.wieght=1: key ");
        assert_error(GOOD, &["trian.steps=1"], "--set trian.steps=1: key `trian`: unknown field");
    }

    #[test]
    fn a_wrong_type_names_key_value_and_expectation() {
        let text = GOOD.replace("10", "'ten'");
        assert_error(&text, &[], "run.toml: key `train.steps`: invalid type: string \"ten\", expected u64");
        assert_error(
            GOOD,
            &["train.steps=-1"],
            "--set train.steps=-1: key `train.steps`: invalid value: integer `-1`, expected u64",
        );
        assert_error(
            &GOOD.replace("0.5", "true"),
            &[],
            "key `train.tasks[0].weight`: invalid type: boolean `true`, expected f64",
        );
    }

    #[test]
    fn an_unknown_choice_lists_the_known_ones() {
        assert_error(
            &GOOD.replace("'caption'", "'captoin'"),
            &[],
            "key `train.tasks[0].kind`: unknown variant `captoin`, expected `caption` or `text-to-image`; \
             did you mean `caption`?",
        );
    }

    #[test]
    fn a_missing_key_is_named_with_its_table() {
        assert_error(&GOOD.replace("lr = 1\n", ""), &[], "run.toml: key `train`: missing field `lr`");
        assert_error("", &[], "run.toml: missing field `train`");
        assert_error("", &["train.steps=1"], "run.toml: key `train`: missing field `lr`");
    }

    #[test]
    fn an_override_that_leads_nowhere_says_why() {
        assert_error(GOOD, &["train.lr"], "--set train.lr: expected KEY=VALUE");
        assert_error(GOOD, &["train..lr=1"], "--set train..lr=1: `train..lr` is not a key");
        assert_error(GOOD, &["=1"], "--set =1: `` is not a key");
        assert_error(GOOD, &["train.lr.x=1"], "--set train.lr.x=1: `train.lr` is integer `1`, not a table");
        assert_error(
            GOOD,
            &["train.tasks.1.weight=1"],
            "`1` is no element of `train.tasks`; expected a number below 1",
        );
        assert_error(GOOD, &["train.tasks.x.weight=1"], "`x` is no element of `train.tasks`");
    }

    proptest! {
        #[test]
        fn any_override_gives_a_value_or_one_line(text in "\\PC*") {
            let mut table: Table = GOOD.parse().unwrap();
            if let Err(error) = apply_override(&mut table, &text) {
                prop_assert_eq!(error.to_string().lines().count(), 1);
                prop_assert_eq!(table, GOOD.parse::<Table>().unwrap());
            }
        }

        #[test]
        fn a_string_survives_as_a_value(text in "[a-z][a-z /_-]{0,20}[a-z]") {
            prop_assume!(!["true", "false", "inf", "nan"].contains(&text.as_str()));
            prop_assert_eq!(parse_value(&text), Value::String(text));
        }
    }
}
