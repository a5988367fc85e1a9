//! The demo: pretrains a tiny tokenizer and a tiny transformer from scratch, lets a finished model draw and caption,
//! and shows all of it on one page.

mod page;
mod pretrain;
mod showcase;

use std::path::{Path, PathBuf};
use std::time::Instant;

use m6_run::{StopFlag, write_atomic};
use m6_runtime::device::device;

use crate::error::{Error, Result};
use crate::eval::open_shards;
use crate::model::Model;
use page::{Page, Timing};

const PAGE: &str = "index.html";
/// Folder of the pictures beside the page.
const PICTURES: &str = "pictures";
const TRAIN_SHARDS: &str = "train-*.tar";
/// Held-out splits.
const SPLITS: [Split; 2] = [
    Split {
        shards: "val-compose-*.tar",
        stage: "caption new combinations",
        note: "New combinations: each of these emoji was seen in training, but never in this style.",
    },
    Split {
        shards: "val-base-*.tar",
        stage: "caption new emoji",
        note: "New emoji: none of these was seen in training, in any style. Their names are mostly guesswork.",
    },
];

/// A held-out split of the data set.
struct Split {
    shards: &'static str,
    /// Name of its stage in the timings.
    stage: &'static str,
    /// What is new in it.
    note: &'static str,
}

/// Where the demo reads and writes.
#[derive(Debug, Clone)]
pub struct DemoRequest {
    /// Folder of the page.
    pub out: PathBuf,
    /// Folder of a finished model.
    pub model: PathBuf,
    /// Folder of the embedded data set: shards `train-*.tar`, `val-compose-*.tar` and `val-base-*.tar`.
    pub data: PathBuf,
}

/// Runs the demo and returns the page.
///
/// # Errors
/// When the model or the data set cannot be read (before any work is done), a file cannot be written, or a signal asks
/// to stop.
pub fn demo(request: &DemoRequest) -> Result<PathBuf> {
    let model = Model::load(&request.model, device("auto")?)?;
    let shards = |name: &str| vec![request.data.join(name).display().to_string()];
    for name in SPLITS.iter().map(|split| split.shards).chain([TRAIN_SHARDS]) {
        open_shards(&shards(name))?;
    }
    let out = &request.out;
    let pictures = out.join(PICTURES);
    std::fs::create_dir_all(&pictures).map_err(|error| Error::file(&pictures, error))?;
    let stop = StopFlag::install()?;
    let mut clock = Clock { stop, out, timings: Vec::new() };

    let pretraining = pretrain::pretrain(out, &shards(TRAIN_SHARDS), &shards(SPLITS[0].shards), &mut clock)?;
    let drawings = showcase::draw_prompts(&model, out, &mut clock)?;
    let captioned = SPLITS
        .iter()
        .map(|split| showcase::caption_split(&model, split, &shards(split.shards), out, &mut clock))
        .collect::<Result<Vec<_>>>()?;
    let page =
        Page { model: request.model.clone(), pretraining, drawings, captioned, timings: clock.timings };
    let path = out.join(PAGE);
    write_atomic(&path, page.to_html().as_bytes())?;
    Ok(path)
}

/// Times the stages and ends the demo between two of them when asked to.
struct Clock<'a> {
    stop: StopFlag,
    out: &'a Path,
    timings: Vec<Timing>,
}

impl Clock<'_> {
    /// Runs a stage; `amount` says how much it did.
    fn time<T>(
        &mut self,
        what: &str,
        amount: impl FnOnce(&T) -> String,
        stage: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        eprintln!("demo: {what}");
        let start = Instant::now();
        let result = stage()?;
        self.timings.push(Timing {
            what: what.to_owned(),
            amount: amount(&result),
            seconds: start.elapsed().as_secs_f64(),
        });
        if self.stop.requested() {
            return Err(self.stopped());
        }
        Ok(result)
    }

    fn stopped(&self) -> Error {
        Error::file(self.out, "the demo was stopped before its end; the same command starts it anew")
    }
}
