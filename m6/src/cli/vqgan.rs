//! `m6 vqgan`.

use std::path::PathBuf;

use m6::Result;
use m6_vqgan::VqganReport;

use super::args::ConfigArgs;
use super::output;

/// Train and score an image tokenizer, which turns pictures into codes and back
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train an image tokenizer; the same command again resumes an unfinished run
    Train(TrainArgs),
    /// Score reconstructions: PSNR, SSIM, codebook usage and perplexity
    Eval(EvalArgs),
    /// Measure how fast pictures become codes and codes pictures
    Bench(BenchArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Train(args) => args.run(),
            Self::Eval(args) => args.run(),
            Self::Bench(args) => args.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 vqgan train configs/vqgan/tiny.toml --set schedule.steps=200")]
pub struct TrainArgs {
    #[command(flatten)]
    config: ConfigArgs,
}

impl TrainArgs {
    fn run(self) -> Result<()> {
        let outcome = m6_vqgan::train::run(&self.config.config, &self.config.overrides)?;
        let Some((model, report)) = &outcome.finished else {
            return output::line(format_args!(
                "{}  stopped after {} steps; the same command resumes it",
                outcome.run.display(),
                outcome.steps
            ));
        };
        output::line(format_args!("{}  model after {} steps", model.display(), outcome.steps))?;
        print_scores(report)
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 vqgan eval models/emoji/vqgan datasets/emoji/val-base-*.tar --grid grid.png"
)]
pub struct EvalArgs {
    /// Folder of the tokenizer
    dir: PathBuf,
    /// Shards: files, globs, urls, commands or lists such as `val-{000..003}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Score only the first pictures
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write originals above reconstructions as a PNG
    #[arg(long, value_name = "FILE")]
    grid: Option<PathBuf>,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print the scores as one line of JSON
    #[arg(long)]
    json: bool,
}

impl EvalArgs {
    fn run(self) -> Result<()> {
        if let Some(grid) = &self.grid {
            output::check_extension("--grid", grid, "png")?;
            output::check_writable(grid)?;
        }
        let limit = self.limit.map(|limit| limit as usize);
        let report = m6_vqgan::eval::run(&self.dir, &self.shards, &self.device, limit, self.grid.as_deref())?;
        if self.json {
            return output::json(&report);
        }
        print_scores(&report)?;
        match &self.grid {
            Some(grid) => output::line(format_args!("{}  originals above reconstructions", grid.display())),
            None => Ok(()),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 vqgan bench models/emoji/vqgan --batch 16\n\n\
    Random pictures of the training size; reading and decoding files is not part of it, nor is writing.")]
pub struct BenchArgs {
    /// Folder of the tokenizer, or a training config (.toml), whose model then has random weights
    model: PathBuf,
    /// Pictures a pass
    #[arg(long, value_name = "N", default_value_t = 16, value_parser = clap::value_parser!(i64).range(1..=65_536))]
    batch: i64,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print the figures as one line of JSON
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    fn run(self) -> Result<()> {
        let report = m6_vqgan::bench::run(&self.model, &self.device, self.batch)?;
        if self.json {
            return output::json(&report);
        }
        output::line(format_args!(
            "{} x {} pixels, {} a pass: encode {:.1} images/s, decode {:.1} images/s, {:.2} GB at most",
            report.resolution,
            report.resolution,
            report.batch,
            report.encode_images_per_s,
            report.decode_images_per_s,
            report.memory_peak_bytes as f64 / 1e9
        ))
    }
}

fn print_scores(report: &VqganReport) -> Result<()> {
    output::line(format_args!(
        "{} pictures: PSNR {:.2} dB, SSIM {:.4}, codebook usage {:.1} %, perplexity {:.0}",
        report.samples,
        report.psnr,
        report.ssim,
        100.0 * report.codebook_usage,
        report.perplexity
    ))
}
