//! The training loop: next batch, forward, backward, clip, step, log, validate, draw, save, stop.

mod checkpoint;
mod config;
mod feed;
mod loss;
mod sources;
mod texts;
mod validation;
mod window;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use m6_data::tokenizer::{Tokenizer, train_bpe};
use m6_data::{FlawClass, Rgb8, SkipLog};
use m6_run::{Checkpoints, MetricLog, Progress, RunDir, Schedule, StopFlag};
use m6_runtime::Params;
use m6_runtime::device::{device, memory, set_tf32};
use m6_runtime::optim::{Ema, Optimizer};
use m6_vqgan::Vqgan;
use tch::{Device, Tensor};

pub use config::{
    RunMergingConfig, SamplesConfig, ScheduleConfig, TokenizerConfig, TrainConfig, ValidationConfig,
};
use loss::accumulate;
pub use loss::{Losses, losses};
pub use texts::texts;

use crate::error::{Error, Result};
use crate::generate::{draw, rows_grid};
use crate::model::Model;
use crate::objectives::{ExampleSource, ModelView, OpenSource};
use feed::{Feed, Place, Recipe};
use sources::Opening;
use validation::Validation;
use window::Window;

const TOKENIZER: &str = "tokenizer.json";
const MODEL: &str = "model";
/// Keys that may change when a run goes on: they do not touch what it computes, or are checked on their own.
const FREE_KEYS: [&str; 11] = [
    "run",
    "device",
    "recompute",
    "vqgan",
    "log_every",
    "checkpoint_every",
    "keep",
    "data.workers",
    "data.skip",
    "validation",
    "samples",
];

/// What a run came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The run's folder.
    pub run: PathBuf,
    /// The exported model, unless the run was stopped before its end.
    pub model: Option<PathBuf>,
    /// Updates made.
    pub step: u64,
}

/// Trains as the config says; a run folder that holds checkpoints is taken up from the newest.
///
/// # Errors
/// When a setting is wrong, data or tokenizers cannot be read, a file cannot be written, or the loss is no number.
pub fn run(config_path: &Path, overrides: &[String]) -> Result<Outcome> {
    let loaded = m6_run::config::load::<TrainConfig>(config_path, overrides)?;
    loaded.config.validate()?;
    let run = RunDir::open_or_create(&loaded.config.run, &loaded.table, &FREE_KEYS)?;
    Trainer::start(loaded.config, run)?.train()
}

struct Trainer {
    config: TrainConfig,
    device: Device,
    run: RunDir,
    model: Model,
    optimizer: Optimizer,
    ema: Ema,
    source: Arc<ExampleSource>,
    /// Which samples the sources have.
    data: BTreeMap<String, String>,
    skip_log: Arc<SkipLog>,
    /// Flaws of the sources that were found when they were opened.
    known_flaws: BTreeMap<FlawClass, u64>,
    validation: Option<Validation>,
    checkpoints: Checkpoints,
    log: MetricLog,
    progress: Progress,
    window: Window,
    step: u64,
    place: Place,
}

impl Trainer {
    fn start(config: TrainConfig, run: RunDir) -> Result<Self> {
        let device = device(&config.device)?;
        tch::manual_seed(config.seed as i64);
        let checkpoints = Checkpoints::new(run.checkpoints(), config.keep)?;
        let resumed = checkpoints.latest()?;
        let vqgan = Vqgan::load(&config.vqgan, device)?;
        let opening = Opening {
            run: run.path(),
            seed: config.seed,
            workers: config.data.workers,
            skip: config.data.skip,
            device,
        };
        let sources = config
            .data
            .sources
            .iter()
            .map(|(name, source)| opening.open(name, source.clone(), config.tasks_of(source).clone(), &vqgan))
            .collect::<Result<Vec<_>>>()?;
        let tokenizer = open_tokenizer(&config, &run, &sources, resumed.is_some())?;
        let params = Params::new(device, config.seed).with_matrices(config.weights);
        let model = Model::new(&config.model, tokenizer, vqgan, params)?;
        let source = ExampleSource::new(
            sources,
            config.seed,
            &config.data.skip,
            model.tokenizer.clone(),
            ModelView::of(&model),
        )?;
        let validation =
            config.validation.as_ref().map(|v| Validation::open(&config, v, &opening, &model)).transpose()?;

        // Only now, since codes of the pictures were chosen in float32 as it is.
        set_tf32(true)?;
        let base = match &config.merging {
            Some(merging) if resumed.is_none() => Some(model.other_weights(&merging.base)?),
            _ => None,
        };
        match (&resumed, &config.init, &config.extractor) {
            (None, Some(dir), _) => model.load_weights(dir)?,
            (None, None, Some(file)) => model.load_extractor(file)?,
            _ => {}
        }
        if let Some(samples) = &config.samples {
            // A prompt that the model cannot take is found now and not at the first drawing.
            samples.request(config.seed).prefixes(&model)?;
        }
        let data = source.identities();
        let mut optimizer = Optimizer::new(&model.params, config.optimizer);
        if let Some(merging) = &config.merging {
            optimizer = optimizer.merging(&model.params, merging.settings(), base.as_ref())?;
        }
        let mut ema = Ema::new(&model.params, config.ema);
        let mut window = Window::new(device);
        let (step, place) = match &resumed {
            Some((step, dir)) => {
                (*step, checkpoint::read(dir, &model, &data, &mut optimizer, &mut ema, &mut window)?)
            }
            None => (0, Place::start(0..config.schedule.accumulation as usize)),
        };
        let log = MetricLog::open(&run, (step > 0).then_some(step))?;
        let progress = Progress::new(config.schedule.steps, step);
        progress.note(&format!(
            "{:.2} M parameters on {device:?}, {} samples, from step {step} of {}",
            model.params.count() as f64 / 1e6,
            source.samples(),
            config.schedule.steps
        ));
        let skip_log = SkipLog::new(&run.skipped());
        let note = |line: &str| progress.note(line);
        let known_flaws = skip_log.add_known(source.flaws(), note)?;
        skip_log.add_known(validation.iter().flat_map(Validation::flaws), note)?;
        Ok(Self {
            config,
            device,
            run,
            skip_log: Arc::new(skip_log),
            known_flaws,
            data,
            model,
            optimizer,
            ema,
            source: Arc::new(source),
            validation,
            checkpoints,
            log,
            progress,
            window,
            step,
            place,
        })
    }

    fn train(mut self) -> Result<Outcome> {
        let stop = StopFlag::install()?;
        let plan = self.config.schedule.clone();
        let schedule = Schedule {
            lr: plan.lr,
            warmup_steps: plan.warmup,
            total_steps: plan.steps,
            min_ratio: plan.min_ratio,
        };
        let recipe = Recipe {
            streams: plan.accumulation as usize,
            workers: self.config.data.workers,
            skip: self.config.data.skip,
            tokens: plan.tokens,
            vocab: self.model.transformer.vocab(),
            positions: self.model.transformer.positions(),
            device: self.device,
        };
        let mut feed = Feed::start(&self.source, self.place.clone(), recipe, self.skip_log.clone())?;
        while self.step < plan.steps && !stop.requested() {
            self.optimizer.zero_grad()?;
            for _ in 0..plan.accumulation {
                let batch = feed.next_batch(self.device)?;
                let transformer = &self.model.transformer;
                let losses = accumulate(transformer, &batch, plan.accumulation, self.config.recompute)?;
                self.window.add(&losses, batch.real);
            }
            let lr = schedule.at(self.step);
            self.optimizer.set_lr(lr);
            let grad_norm = self.optimizer.step(plan.clip)?;
            self.window.add_update(&grad_norm);
            self.ema.update(self.step)?;
            self.step += 1;
            self.place.clone_from(feed.place());
            if self.due(self.config.log_every) {
                self.report(&mut feed, lr, &grad_norm)?;
            }
            self.look_at_the_model()?;
            if self.due(self.config.checkpoint_every) || self.step == plan.steps {
                self.save()?;
            }
        }
        if self.step < plan.steps {
            self.save()?;
            self.progress
                .note(&format!("stopped at step {}; the same command goes on from there", self.step));
            return Ok(Outcome { run: self.run.path().to_path_buf(), model: None, step: self.step });
        }
        let target = self.run.path().join(MODEL);
        self.ema.swap();
        self.model.save(&target, &self.config.vqgan)?;
        Ok(Outcome { run: self.run.path().to_path_buf(), model: Some(target), step: self.step })
    }

    fn due(&self, every: u64) -> bool {
        every > 0 && self.step.is_multiple_of(every)
    }

    fn report(&mut self, feed: &mut Feed, lr: f64, grad_norm: &Tensor) -> Result<()> {
        let report = self.window.read(grad_norm)?;
        if !report.loss.is_finite() {
            let problem = format!("the loss is {} at step {} (lr {lr:.2e})", report.loss, self.step);
            return Err(Error::file(self.run.path(), problem));
        }
        let mut shown = vec![("loss", report.loss)];
        shown.extend(report.tasks.iter().map(|(task, loss)| (task.name(), *loss)));
        let rate = self.progress.report(self.step, &shown, report.tokens, "tokens");
        let skipped = self.place.skipped();
        let mut row: Vec<(String, f64)> = vec![
            ("loss".into(), report.loss),
            ("lr".into(), lr),
            ("grad_norm".into(), report.grad_norm),
            ("skipped_updates".into(), report.skipped_updates),
            ("tokens_per_s".into(), rate),
            ("fill".into(), report.tokens_per_batch / self.config.schedule.tokens as f64),
            ("data_wait".into(), feed.take_waited().as_secs_f64() / report.seconds),
            ("skipped_samples".into(), skipped.values().sum::<u64>() as f64),
            ("cut_texts".into(), self.place.cut_texts() as f64),
            ("memory_peak_bytes".into(), memory(self.device)?.peak as f64),
        ];
        row.extend(report.tasks.iter().map(|(task, loss)| (format!("loss/{}", task.name()), *loss)));
        row.extend(
            skipped.iter().map(|(class, count)| (format!("skipped_samples/{}", class.name()), *count as f64)),
        );
        row.extend(
            self.known_flaws
                .iter()
                .map(|(class, count)| (format!("known_flaws/{}", class.name()), *count as f64)),
        );
        row.extend(
            self.source
                .epochs(self.place.examples())
                .map(|(name, epochs)| (format!("epochs/{name}"), epochs)),
        );
        row.extend(report.expert_spread.map(|spread| ("expert_load_cv".to_string(), spread)));
        row.extend(report.expert_dropped.map(|share| ("expert_dropped".to_string(), share)));
        let loads = [("expert_load", report.expert_load.as_slice())];
        let tables = if report.expert_load.is_empty() { &[][..] } else { &loads };
        self.row(&row, tables)
    }

    fn row(&mut self, row: &[(String, f64)], tables: &[(&str, &[Vec<f64>])]) -> Result<()> {
        let row: Vec<(&str, f64)> = row.iter().map(|(name, value)| (name.as_str(), *value)).collect();
        Ok(self.log.row(self.step, &row, tables)?)
    }

    /// Validation and drawings, with the averaged weights.
    fn look_at_the_model(&mut self) -> Result<()> {
        let end = self.step == self.config.schedule.steps;
        let validates = self.config.validation.as_ref().is_some_and(|v| end || self.due(v.every));
        let draws = self.config.samples.as_ref().is_some_and(|s| end || self.due(s.every));
        if !(validates || draws) {
            return Ok(());
        }
        self.ema.swap();
        if validates && let Some(validation) = &self.validation {
            let losses = validation.losses(&self.model, self.device)?;
            let row: Vec<(String, f64)> =
                losses.iter().map(|(task, loss)| (format!("validation/{}", task.name()), *loss)).collect();
            let text: Vec<String> = row.iter().map(|(name, loss)| format!("{name} {loss:.4}")).collect();
            self.progress.note(&format!("step {}: {}", self.step, text.join("  ")));
            self.row(&row, &[])?;
        }
        if draws && let Some(samples) = self.config.samples.clone() {
            let grid = self.draw(&samples)?;
            let png = grid.encode_png()?;
            self.log.picture(self.step, "samples", &png, grid.width, grid.height)?;
        }
        self.ema.swap();
        Ok(())
    }

    fn draw(&self, samples: &SamplesConfig) -> Result<Rgb8> {
        let drawings = draw(&self.model, &samples.request(self.config.seed), |_| {})?;
        Ok(rows_grid(&drawings, samples.count))
    }

    fn save(&mut self) -> Result<()> {
        let Self { model, data, optimizer, ema, window, place, .. } = &*self;
        self.checkpoints
            .save(self.step, |dir| checkpoint::write(dir, model, data, optimizer, ema, window, place))?;
        Ok(())
    }
}

/// The run's text tokenizer: the one it started with where it is resumed, else the one of the config.
fn open_tokenizer(
    config: &TrainConfig,
    run: &RunDir,
    sources: &[OpenSource],
    is_resumed: bool,
) -> Result<Tokenizer> {
    let kept = run.path().join(TOKENIZER);
    if is_resumed {
        return Ok(Tokenizer::load(&kept)?);
    }
    let tokenizer = match (&config.tokenizer.file, config.tokenizer.train) {
        (Some(file), _) => Tokenizer::load(file)?,
        (None, size) => {
            let mut found = Vec::new();
            for OpenSource { config, shards, .. } in sources {
                let fields: Vec<_> = [&config.captions].into_iter().chain(&config.prompts).collect();
                found.extend(texts(shards, &fields, || ())?);
            }
            train_bpe(found.into_iter(), size.unwrap_or_default())?
        }
    };
    tokenizer.save(&kept)?;
    Ok(tokenizer)
}
