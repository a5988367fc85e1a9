//! What a run reports: `metrics.jsonl`, TensorBoard events and sample pictures.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::atomic::write_atomic;
use crate::error::{IoContext, Result, RunError};
use crate::run_dir::RunDir;
use crate::tensorboard::{self, EventWriter};

const STEP: &str = "step";

/// Writes a run's metrics and sample pictures.
#[derive(Debug)]
pub struct MetricLog {
    path: PathBuf,
    rows: File,
    events: EventWriter,
    samples: PathBuf,
}

impl MetricLog {
    /// Opens the log of a run that starts anew (`None`: earlier rows and events go) or goes on after
    /// `resume_step` (rows of later steps go, and TensorBoard is told to forget them).
    ///
    /// # Errors
    /// When a file cannot be read or written, or `metrics.jsonl` has a line that is no row.
    pub fn open(run: &RunDir, resume_step: Option<u64>) -> Result<Self> {
        let path = run.metrics();
        let kept = match resume_step {
            Some(step) => rows_up_to(&path, step)?,
            None => {
                tensorboard::clear(&run.events())?;
                String::new()
            }
        };
        write_atomic(&path, kept.as_bytes())?;
        let rows = OpenOptions::new().append(true).open(&path).context("open", &path)?;
        let mut events = EventWriter::create(run.events())?;
        if let Some(step) = resume_step {
            events.restart_at(step + 1)?;
        }
        Ok(Self { path, rows, events, samples: run.samples() })
    }

    /// Writes the values of one step, each under its name (such as `loss/caption`; `step` is taken). A value that
    /// is not finite becomes `null` in the JSON row.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn scalars(&mut self, step: u64, values: &[(&str, f64)]) -> Result<()> {
        self.row(step, values, &[])
    }

    /// As [`MetricLog::scalars`], with tables, of which three decimals are kept and TensorBoard has none.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn row(&mut self, step: u64, values: &[(&str, f64)], tables: &[(&str, &[Vec<f64>])]) -> Result<()> {
        const DECIMALS: f64 = 1e3;
        let rounded =
            |row: &Vec<f64>| Value::from_iter(row.iter().map(|x| (x * DECIMALS).round() / DECIMALS));
        let mut row = Map::from_iter([(STEP.to_owned(), Value::from(step))]);
        row.extend(values.iter().map(|(name, value)| ((*name).to_owned(), Value::from(*value))));
        row.extend(
            tables
                .iter()
                .map(|(name, table)| ((*name).to_owned(), Value::from_iter(table.iter().map(rounded)))),
        );
        // One write a row, so that a crash leaves at most the last row in part.
        let line = format!("{}\n", Value::Object(row));
        self.rows.write_all(line.as_bytes()).context("write", &self.path)?;
        self.events.scalars(step, values)
    }

    /// Writes a PNG of `width` x `height` pixels to TensorBoard and to `samples/`; returns its file.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn picture(&mut self, step: u64, tag: &str, png: &[u8], width: u32, height: u32) -> Result<PathBuf> {
        let name: String =
            tag.chars().map(|c| if c.is_alphanumeric() || c == '_' { c } else { '-' }).collect();
        let path = self.samples.join(format!("step-{step:08}-{name}.png"));
        write_atomic(&path, png)?;
        self.events.picture(step, tag, png, width, height)?;
        Ok(path)
    }
}

/// One row of `metrics.jsonl`.
#[derive(Debug, Clone, PartialEq)]
pub struct MetricRow {
    /// Training step.
    pub step: u64,
    /// Finite values by name.
    pub values: BTreeMap<String, f64>,
}

/// Reads `metrics.jsonl`, also of a run that goes on: a last line without its end is left out.
///
/// # Errors
/// When the file cannot be read or a line is no row; the line is named.
pub fn read_metrics(path: impl AsRef<Path>) -> Result<Vec<MetricRow>> {
    let path = path.as_ref();
    let text = fs::read_to_string(path).context("read", path)?;
    whole_lines(&text).enumerate().map(|(index, line)| parse_row(path, index + 1, line)).collect()
}

fn whole_lines(text: &str) -> impl Iterator<Item = &str> {
    text.split_inclusive('\n').filter(|line| line.ends_with('\n'))
}

fn parse_row(path: &Path, line: usize, text: &str) -> Result<MetricRow> {
    let bad = |reason: String| RunError::MetricRow { path: path.to_owned(), line, reason };
    let row: Map<String, Value> =
        serde_json::from_str(text).map_err(|error| bad(format!("not a JSON object: {error}")))?;
    let step = row
        .get(STEP)
        .and_then(Value::as_u64)
        .ok_or_else(|| bad(format!("no `{STEP}` that is a whole number")))?;
    let values = row
        .into_iter()
        .filter(|(name, _)| name != STEP)
        .filter_map(|(name, value)| Some((name, value.as_f64()?)))
        .collect();
    Ok(MetricRow { step, values })
}

fn rows_up_to(path: &Path, last_step: u64) -> Result<String> {
    if !path.exists() {
        return Ok(String::new());
    }
    let text = fs::read_to_string(path).context("read", path)?;
    let mut kept = String::with_capacity(text.len());
    for (index, line) in whole_lines(&text).enumerate() {
        if parse_row(path, index + 1, line)?.step <= last_step {
            kept.push_str(line);
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run() -> (tempfile::TempDir, RunDir) {
        let dir = tempfile::tempdir().unwrap();
        let run = RunDir::create(dir.path(), &toml::Table::new()).unwrap();
        (dir, run)
    }

    fn steps(run: &RunDir) -> Vec<u64> {
        read_metrics(run.metrics()).unwrap().iter().map(|row| row.step).collect()
    }

    #[test]
    fn rows_come_back_and_what_is_not_finite_is_left_out() {
        let (_dir, run) = run();
        let mut log = MetricLog::open(&run, None).unwrap();
        log.scalars(1, &[("loss/text", 2.5), ("lr", f64::NAN)]).unwrap();
        let text = fs::read_to_string(run.metrics()).unwrap();
        assert_eq!(
            serde_json::from_str::<Value>(&text).unwrap(),
            serde_json::json!({"step": 1, "loss/text": 2.5, "lr": null})
        );
        let values = BTreeMap::from([("loss/text".to_owned(), 2.5)]);
        assert_eq!(read_metrics(run.metrics()).unwrap(), [MetricRow { step: 1, values }]);
    }

    #[test]
    fn a_table_is_in_its_row_and_no_value() {
        let (_dir, run) = run();
        let mut log = MetricLog::open(&run, None).unwrap();
        log.row(3, &[("loss", 0.5)], &[("load", &[vec![0.123_456, 2.0], vec![1.0, 1.0]])]).unwrap();
        let text = fs::read_to_string(run.metrics()).unwrap();
        assert_eq!(text, "{\"load\":[[0.123,2.0],[1.0,1.0]],\"loss\":0.5,\"step\":3}\n");
        assert_eq!(read_metrics(run.metrics()).unwrap()[0].values.len(), 1);
    }

    #[test]
    fn resuming_cuts_later_rows_and_a_torn_one() {
        let (_dir, run) = run();
        let mut log = MetricLog::open(&run, None).unwrap();
        for step in [10, 20, 30] {
            log.scalars(step, &[("loss", 1.0)]).unwrap();
        }
        log.rows.write_all(b"{\"step\":40,\"lo").unwrap();
        drop(log);
        assert_eq!(steps(&run), [10, 20, 30]);
        let mut log = MetricLog::open(&run, Some(20)).unwrap();
        log.scalars(25, &[("loss", 1.0)]).unwrap();
        assert_eq!(steps(&run), [10, 20, 25]);
        assert_eq!(fs::read_dir(run.events()).unwrap().count(), 2);
        MetricLog::open(&run, None).unwrap();
        assert_eq!(steps(&run), [0_u64; 0]);
        assert_eq!(fs::read_dir(run.events()).unwrap().count(), 1);
    }

    #[test]
    fn a_broken_row_is_named_and_nothing_is_lost() {
        let (_dir, run) = run();
        let text = "{\"step\":1}\n{\"stop\":2}\n";
        fs::write(run.metrics(), text).unwrap();
        let error = MetricLog::open(&run, Some(5)).unwrap_err().to_string();
        assert!(error.ends_with("metrics.jsonl, line 2: no `step` that is a whole number"), "{error}");
        assert_eq!(fs::read_to_string(run.metrics()).unwrap(), text);
    }

    #[test]
    fn a_picture_is_a_file_with_a_plain_name() {
        let (_dir, run) = run();
        let mut log = MetricLog::open(&run, None).unwrap();
        let path = log.picture(7, "text to image/红心", b"png", 1, 1).unwrap();
        assert_eq!(path, run.samples().join("step-00000007-text-to-image-红心.png"));
        assert_eq!(fs::read(path).unwrap(), b"png");
    }
}
