//! The training loop of the image tokenizer.

mod adversarial;
mod codebook;
mod config;
mod critic;
mod range;
mod regularise;
mod state;
mod step;

use std::path::{Path, PathBuf};

use m6_data::{SampleOrder, ShardSet, SkipCounts, SkipLog};
use m6_run::config::Loaded;
use m6_run::{Checkpoints, MetricLog, Progress, RunDir, StopFlag, fetching};
use m6_runtime::device::{device, memory};
use m6_runtime::named_seed;
use tch::{Device, Kind, Tensor};

pub use crate::augment::AugmentConfig;
pub use crate::discriminator::{AdversarialLoss, DiscriminatorNorm};
pub use adversarial::DiscriminatorConfig;
pub use config::{DataConfig, ScheduleConfig, TrainConfig, ValidationConfig};

use crate::bottleneck::Bottleneck;
use crate::error::{Result, VqganError};
use crate::eval::{VqganReport, evaluate, reconstruction_grid};
use crate::loss::ReconstructionLoss;
use crate::model::{Dtype, Vqgan};
use crate::pictures::{pictures_to_tensor, to_unit};
use crate::stream::{PictureStream, with_picture};
use state::{Position, State};
use step::{Plan, Stepper, Updated};

/// Folder of the finished model inside of the run.
const MODEL_DIR: &str = "model";
/// Held-out pictures that are shown at each validation.
const SHOWN: i64 = 8;
/// Batches that the data threads may be ahead.
const BATCHES_AHEAD: usize = 4;
/// Keys that may change when a run goes on: they do not touch what it computes.
const FREE_KEYS: [&str; 8] =
    ["device", "log_every", "checkpoint_every", "keep", "data.workers", "data.skip", "validation", "run"];

/// What a training run made.
#[derive(Debug)]
pub struct TrainOutcome {
    /// The run folder.
    pub run: PathBuf,
    /// Updates done.
    pub steps: u64,
    /// The finished model and its scores on the held-out pictures; `None` when the run was stopped before its end and
    /// can be gone on with.
    pub finished: Option<(PathBuf, VqganReport)>,
}

/// Trains the run that the config at `config_path` describes, with `overrides` such as `schedule.steps=100`. A run
/// folder that holds checkpoints is gone on with from its newest. SIGINT and SIGTERM save a checkpoint and stop.
///
/// # Errors
/// When config, data, run folder or device are not as expected, or the loss leaves the numbers.
pub fn run(config_path: &Path, overrides: &[String]) -> Result<TrainOutcome> {
    let loaded = m6_run::config::load(config_path, overrides)?;
    let stop = StopFlag::install()?;
    train(config_path, &loaded, |_| stop.requested())
}

/// [`run`] without the signals; `stop` is asked after each step with the number of steps done.
fn train(
    config_path: &Path,
    loaded: &Loaded<TrainConfig>,
    stop: impl Fn(u64) -> bool,
) -> Result<TrainOutcome> {
    let config = &loaded.config;
    config.validate(config_path)?;
    let device = device(&config.device)?;
    if device.is_cuda() {
        tch::Cuda::cudnn_set_benchmark(true);
    }
    let shards = ShardSet::open_with(&config.data.shards, config.data.skip, fetching())?;
    let validation = validation_pictures(config)?;
    let run = RunDir::open_or_create(&config.run, &loaded.table, &FREE_KEYS)?;
    let checkpoints = Checkpoints::new(run.checkpoints(), config.keep)?;
    let mut state = State::new(config, device)?;
    let resumed = checkpoints.latest()?;
    let data = shards.identity();
    let (mut step, position) = match &resumed {
        Some((step, dir)) => (*step, state.load(dir, &data)?),
        None => (0, Position { next_ordinal: 0, samples: SkipCounts::default(), data: data.clone() }),
    };
    let mut metrics = MetricLog::open(&run, resumed.as_ref().map(|(step, _)| *step))?;
    let mut progress = Progress::new(config.schedule.steps, step);
    let log = SkipLog::new(&run.skipped());
    let (usable, flaws) = with_picture(&shards, &config.data.skip)?;
    let known_flaws = log.add_known(&flaws, |line| progress.note(line))?;
    progress.note(&format!(
        "{:.2} M parameters on {device:?}, {} samples, from step {step} of {}",
        state.parameters() as f64 / 1e6,
        usable.len(),
        config.schedule.steps
    ));
    let pictures = training_stream(config, shards, usable, position.next_ordinal)?;
    let mut pictures = pictures.skipping(config.data.skip, position.samples, log);
    let reconstruction =
        ReconstructionLoss::new(config.model.resolution, config.loss, config.lpips.as_ref(), device)?;
    let schedule = config.schedule();
    let ScheduleConfig { steps, batch, accumulation, clip, .. } = config.schedule;
    let mut stepper = Stepper::new(reconstruction, clip, device);
    let mut images = 0;
    let mut stopped = false;
    let dir = run.path().join(MODEL_DIR);
    let mut scores = None;

    while step < steps && !stopped {
        let mut micro_batches = Vec::new();
        for _ in 0..accumulation {
            let batch = pictures.batch(batch, u64::MAX, |note| progress.note(note))?;
            images += batch.len() as u64;
            micro_batches.push(to_unit(&pictures_to_tensor(&batch)?, device)?);
        }
        tch::manual_seed(named_seed(config.seed, &format!("step {step}")) as i64);
        if let Some(x) = micro_batches.first().filter(|_| state.codebook.starts_at(step)) {
            state.codebook.start(&encoder_rows(&state.model, x));
        }
        let plan = Plan {
            bottleneck: state.codebook.bottleneck(step),
            critic: state.critic.as_ref().and_then(|critic| critic.plan(step)),
        };
        let lr = schedule.at(step);
        state.optimizer.set_lr(lr);
        let updated = stepper.update(&mut state, plan, micro_batches)?;
        state.ema.update(step)?;
        state.codebook.revive(step, &updated.rows_nd);

        step += 1;
        if step % config.log_every == 0 || step == steps {
            let values = read_terms(&state, &updated);
            if values[..updated.terms.len()].iter().any(|(_, value)| !value.is_finite()) {
                return Err(VqganError::Diverged { step });
            }
            let rate = progress.report(step, &[("l1", values[0].1)], std::mem::take(&mut images), "images");
            let mut row: Vec<(&str, f64)> =
                values.iter().map(|(name, value)| (name.as_str(), *value)).collect();
            let memory_peak = memory(device)?.peak as f64;
            row.extend([("lr", lr), ("images_per_second", rate), ("memory_peak_bytes", memory_peak)]);
            let skipped = pictures.counts();
            row.push(("skipped_samples", skipped.total() as f64));
            let flaws = [("skipped_samples", &skipped.skipped), ("known_flaws", &known_flaws)];
            let by_class: Vec<(String, f64)> = flaws
                .into_iter()
                .flat_map(|(what, counts)| {
                    counts
                        .iter()
                        .map(move |(class, count)| (format!("{what}/{}", class.name()), *count as f64))
                })
                .collect();
            row.extend(by_class.iter().map(|(name, count)| (name.as_str(), *count)));
            metrics.scalars(step, &row)?;
        }
        if step % config.validation.every == 0 && step < steps {
            let report = state.with_averages(|model| validate(model, &validation, step, &mut metrics))?;
            progress.note(&summary(step, &report));
        }
        if step == steps {
            // The scores are those of the file, whose weights are rounded.
            scores = Some(validate(&export(&mut state, &dir)?, &validation, step, &mut metrics)?);
        }
        stopped = stop(step);
        if step % config.checkpoint_every == 0 || step == steps || stopped {
            let position = Position {
                next_ordinal: pictures.next_ordinal(),
                samples: pictures.counts().clone(),
                data: data.clone(),
            };
            checkpoints.save(step, |dir| state.save(dir, &position))?;
        }
    }

    if step < steps {
        progress.note(&format!("stopped and saved at step {step}; the same command goes on from there"));
        return Ok(TrainOutcome { run: run.path().to_owned(), steps: step, finished: None });
    }
    let report = match scores {
        Some(report) => report,
        // The run had come to its end before, and the scores are in its metrics.
        None => evaluate(&export(&mut state, &dir)?, &validation)?,
    };
    progress.note(&summary(step, &report));
    progress.note(&format!("model: {}", dir.display()));
    Ok(TrainOutcome { run: run.path().to_owned(), steps: step, finished: Some((dir, report)) })
}

/// Writes the averaged model to `dir` in bf16 and reads it back.
fn export(state: &mut State, dir: &Path) -> Result<Vqgan> {
    state.with_averages(|model| model.save(dir, Dtype::Bfloat16))?;
    Vqgan::load(dir, state.model.device())
}

fn training_stream(
    config: &TrainConfig,
    shards: ShardSet,
    pictures: Vec<usize>,
    first_ordinal: u64,
) -> Result<PictureStream> {
    let order = SampleOrder::new(pictures.len(), config.seed)?;
    let DataConfig { transform, workers, .. } = &config.data;
    let ahead = BATCHES_AHEAD * config.schedule.batch;
    let index = move |ordinal| pictures[order.index(ordinal)];
    PictureStream::start(shards, transform.clone(), config.seed, index, (first_ordinal, *workers, ahead))
}

/// The held-out pictures, bytes `[n, 3, h, w]`.
fn validation_pictures(config: &TrainConfig) -> Result<Tensor> {
    let shards = ShardSet::open_with(&config.validation.shards, config.data.skip, fetching())?;
    let (pictures, _) = with_picture(&shards, &config.data.skip)?;
    for flaw in shards.flaws() {
        eprintln!("{flaw}");
    }
    let count = config.validation.samples.min(pictures.len());
    let ahead = (0, config.data.workers, count);
    let transform = config.validation.transform.clone();
    let mut stream =
        PictureStream::start(shards, transform, config.seed, move |o| pictures[o as usize % count], ahead)?;
    pictures_to_tensor(&stream.batch(count, count as u64, |note| eprintln!("{note}"))?)
}

/// Encoder outputs for the pictures `x`, without gradient.
fn encoder_rows(model: &Vqgan, x: &Tensor) -> Tensor {
    let _guard = tch::no_grad_guard();
    model.forward(x, Bottleneck::Continuous).rows_nd
}

/// The values of the terms of an update and the state of the codebook, by their names in the metrics. Waits for the
/// device, once.
fn read_terms(state: &State, updated: &Updated) -> Vec<(String, f64)> {
    let Updated { terms, grad_norm, .. } = updated;
    let mut names: Vec<String> = terms.iter().map(|term| format!("loss/{}", term.name)).collect();
    let mut values: Vec<Tensor> = terms.iter().map(|term| term.value.to_kind(Kind::Float)).collect();
    for (name, value) in [("grad_norm", grad_norm.shallow_clone())].into_iter().chain(state.codebook.usage())
    {
        names.push(name.to_owned());
        values.push(value);
    }
    let values = Tensor::stack(&values, 0).to_kind(Kind::Double).to_device(Device::Cpu);
    names.into_iter().zip((0..values.numel() as i64).map(|index| values.double_value(&[index]))).collect()
}

/// Scores `model` on the held-out pictures and shows some of them above their reconstructions.
fn validate(model: &Vqgan, pictures: &Tensor, step: u64, metrics: &mut MetricLog) -> Result<VqganReport> {
    let report = evaluate(model, pictures)?;
    let row = [
        ("validation/psnr", report.psnr),
        ("validation/ssim", report.ssim),
        ("validation/codebook_usage", report.codebook_usage),
        ("validation/perplexity", report.perplexity),
    ];
    metrics.scalars(step, &row)?;
    let shown = pictures.narrow(0, 0, SHOWN.min(pictures.size()[0]));
    let grid = reconstruction_grid(model, &shown)?;
    metrics.picture(step, "reconstructions", &grid.encode_png()?, grid.width, grid.height)?;
    Ok(report)
}

fn summary(step: u64, report: &VqganReport) -> String {
    format!(
        "step {step}: held-out PSNR {:.2} dB, SSIM {:.4}, codebook usage {:.1} %, perplexity {:.0} ({} pictures)",
        report.psnr,
        report.ssim,
        report.codebook_usage * 100.0,
        report.perplexity,
        report.samples
    )
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    use super::*;
    use crate::stream::tests::random_shard;

    /// Steps seed the process's random generator, which tests on other threads would draw from too.
    static GENERATOR: Mutex<()> = Mutex::new(());

    /// Holds other training tests off, and takes one thread: where several tests share few cores, libtorch's threads
    /// wait for each other by spinning, and seconds become minutes.
    pub(super) fn alone() -> MutexGuard<'static, ()> {
        tch::set_num_threads(1);
        GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Two steps of autoencoding, then codes; the discriminator is on from step 3 and heard from step 4.
    const CONFIG: &str = r#"
        seed = 5
        device = "cpu"
        ema = 0.9
        log_every = 2
        checkpoint_every = 3
        keep = 2
        data = { shards = ["SHARD"], transform = "random_crop:16", workers = 2 }
        validation = { shards = ["SHARD"], transform = "center_crop:16", every = 3, samples = 6 }
        model = { resolution = 16, ch = 32, ch_mult = [1, 1], num_res_blocks = 1, z_channels = 8, codebook_size = 16, code_dim = 4 }
        loss = { l1 = 1.0, gradient = 0.5, ssim = 0.2, codebook = 1.0, commitment = 0.25 }
        codebook = { warmup = 2, decay = 0.5, threshold = 0.5, until = 0.9 }
        discriminator = { layers = 1, lr = 1e-4, start = 0.5, alone = 1, ramp = 2, weight = 0.1, feature_matching = 1.0 }
        optimizer = { beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0.0 }
        schedule = { steps = 7, batch = 3, accumulation = 2, lr = 1e-3, warmup = 1, min_ratio = 0.1, clip = 1.0 }
    "#;

    pub(super) fn write_config(dir: &Path) -> PathBuf {
        let shard = random_shard(dir, 20);
        let path = dir.join("run.toml");
        fs::write(&path, format!("run = \"{}/run\"\n{}", dir.display(), CONFIG.replace("SHARD", &shard)))
            .unwrap();
        path
    }

    fn train_until(path: &Path, overrides: &[&str], last: u64) -> Result<TrainOutcome> {
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        train(path, &m6_run::config::load(path, &overrides)?, |step| step >= last)
    }

    /// What a run leaves: the bytes of its model and its last checkpoint, its losses, its scores.
    struct Left {
        files: Vec<(String, Vec<u8>)>,
        losses: Vec<String>,
        report: VqganReport,
    }

    /// A run of `CONFIG` with `overrides`, stopped and started again at each of `stops`.
    fn finish(overrides: &[&str], stops: &[u64]) -> Left {
        let dir = tempfile::tempdir().unwrap();
        let path = write_config(dir.path());
        for &stop in stops {
            let overrides = [overrides, &["data.workers=1"]].concat();
            let outcome = train_until(&path, &overrides, stop).unwrap();
            assert!(outcome.finished.is_none() && outcome.steps == stop);
        }
        let outcome = train_until(&path, overrides, u64::MAX).unwrap();
        let (model, report) = outcome.finished.unwrap();
        assert_eq!((outcome.steps, report.samples), (7, 6));
        let newest = dir.path().join("run/checkpoints/step-00000007");
        let mut files: Vec<(String, Vec<u8>)> = [model, newest]
            .iter()
            .flat_map(|dir| fs::read_dir(dir).unwrap())
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap()))
            .collect();
        files.sort();
        let losses: Vec<String> = m6_run::read_metrics(dir.path().join("run/metrics.jsonl"))
            .unwrap()
            .into_iter()
            .filter_map(|row| Some(format!("{} {}", row.step, row.values.get("loss/l1")?)))
            .collect();
        Left { files, losses, report }
    }

    /// A discriminator with all that can be added to it, every quantiser, every way for a codebook to start and to
    /// learn.
    const VARIANTS: [&[&str]; 6] = [
        &[],
        &[
            "discriminator.adaptive_max=10.0",
            "discriminator.lecam=0.1",
            "discriminator.r1=1.0",
            "discriminator.r1_every=2",
            "discriminator.norm=spectral",
        ],
        &["model.quantizer=nearest", "codebook.start=kmeans", "codebook.gradient=rotation"],
        &["codebook.ema=0.9", "loss.codebook=0", "loss.entropy={ weight = 0.1, temperature = 0.5 }"],
        &["model.quantizer=simvq", "codebook.until=0"],
        &[
            "model.quantizer=gumbel",
            "codebook.until=0",
            "codebook.gradient={ gumbel = { hard = true, from = 1.0, to = 0.1, over = 0.5, kl = 0.01 } }",
            "loss.codebook=0",
            "loss.commitment=0",
        ],
    ];

    #[test]
    fn a_resumed_run_equals_one_that_never_stopped_bit_for_bit() {
        let _alone = alone();
        for overrides in VARIANTS {
            let whole = finish(overrides, &[]);
            assert_eq!(whole.files.len(), 2 + 8);
            assert!(whole.losses.len() == 4 && whole.report.psnr.is_finite());
            assert!(whole.report.perplexity > 1.0, "{overrides:?}: {:?}", whole.report);
            let interrupted = finish(overrides, &[1, 5]);
            assert_eq!(whole.losses, interrupted.losses, "{overrides:?}");
            assert!(whole.files == interrupted.files, "{overrides:?}: a file differs");
            assert_eq!(whole.report, interrupted.report);
        }
    }

    #[test]
    fn a_finished_run_gives_its_model_again_and_can_start_another() {
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let path = write_config(dir.path());
        let small = ["schedule.steps=2", "schedule.accumulation=1", "codebook.warmup=0"];
        let (model, report) = train_until(&path, &small, u64::MAX).unwrap().finished.unwrap();
        let again = train_until(&path, &small, u64::MAX).unwrap().finished.unwrap();
        assert_eq!((&model, report), (&again.0, again.1));
        assert!(fs::read_dir(dir.path().join("run/samples")).unwrap().count() > 0);

        let (init, run) =
            (format!("init={}", model.display()), format!("run={}/tuned", dir.path().display()));
        let tuned = [small.as_slice(), &["schedule.lr=0.0", "schedule.min_ratio=0.0", &init, &run]].concat();
        let (_, tuned) = train_until(&path, &tuned, u64::MAX).unwrap().finished.unwrap();
        assert!((tuned.psnr - report.psnr).abs() < 0.5, "{tuned:?} against {report:?}");
    }

    #[test]
    fn the_adversarial_loss_can_be_chosen() {
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let path = write_config(dir.path());
        let overrides = ["discriminator.loss=non_saturating"];
        let (_, report) = train_until(&path, &overrides, u64::MAX).unwrap().finished.unwrap();
        assert!(report.psnr.is_finite(), "{report:?}");
        let terms = m6_run::read_metrics(dir.path().join("run/metrics.jsonl")).unwrap();
        let last = terms.iter().rev().find_map(|row| row.values.get("loss/adversarial")).unwrap();
        // The negative logarithm of a probability, which hinge's term, a mean of small scores, is far from.
        assert!((last - 2f64.ln()).abs() < 0.5, "{last}");
    }

    #[test]
    fn another_config_is_refused_in_the_same_folder() {
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let path = write_config(dir.path());
        train_until(&path, &[], 1).unwrap();
        let message = train_until(&path, &["optimizer.beta2=0.99"], 2).unwrap_err().to_string();
        assert!(message.contains("run was started with another `optimizer.beta2`"), "{message}");
        train_until(&path, &["log_every=1", "validation.samples=2"], 2).unwrap();
    }

    #[test]
    fn a_loss_that_leaves_the_numbers_ends_the_run() {
        let _alone = alone();
        let dir = tempfile::tempdir().unwrap();
        let path = write_config(dir.path());
        let overrides = ["schedule.lr=1e30", "schedule.clip=1e30", "log_every=1"];
        let error = train_until(&path, &overrides, u64::MAX).unwrap_err();
        assert!(matches!(error, VqganError::Diverged { .. }), "{error}");
    }
}
