//! `m6 data`.

use std::num::NonZero;
use std::path::{Path, PathBuf};

use m6::{Error, Result};
use m6_data::{
    BenchReport, Broken, DatasetInfo, LintReport, SampleOrder, ShardSet, ShardWriter, Transform, bench,
    contact_sheet, lint, pack, sample_image,
};
use m6_run::Task;

use super::args::FieldArgs;
use super::output;

const MIB: u64 = 1 << 20;
/// Skipped or broken samples that are named for a person; `--json` has more.
const NAMED: usize = 10;
/// Shards of this size are large enough for sequential reading and small enough to be dealt out.
const SHARD_MIB: u64 = 256;
const SHEET_COLUMNS: u32 = 6;
const SHEET_TILE: u32 = 128;

/// Make, summarise and look at shards of pictures and texts
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Pack a folder of pictures, or a jsonl that names them, into shards
    Pack(PackArgs),
    /// Count samples, pictures, captions and what is broken
    Info(InfoArgs),
    /// Draw a sheet of pictures with their captions
    Show(ShowArgs),
    /// Find what is broken, and write shards without it
    Lint(LintArgs),
    /// Measure how fast shards become pictures
    Bench(BenchArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Pack(args) => args.run(),
            Self::Info(args) => args.run(),
            Self::Show(args) => args.run(),
            Self::Lint(args) => args.run(),
            Self::Bench(args) => args.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data pack pictures/ shards/ --prefix train\n\n\
    In a folder, `cat.txt` and `cat.json` belong to `cat.png`. A line of a jsonl is {\"image\": PATH, ...}; its other \
    keys become the sample's JSON.")]
pub struct PackArgs {
    /// A folder of pictures, sub-folders included, or a jsonl file
    source: PathBuf,
    /// Folder for the shards
    out: PathBuf,
    /// Beginning of the shards' names
    #[arg(long, default_value = "data")]
    prefix: String,
    /// Size of a shard in MiB
    #[arg(long, value_name = "MIB", default_value_t = SHARD_MIB, value_parser = clap::value_parser!(u64).range(1..1 << 20))]
    shard_size: u64,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl PackArgs {
    fn run(self) -> Result<()> {
        output::check_writable(&self.out.join(&self.prefix))?;
        let writer = ShardWriter::create(&self.out, &self.prefix, self.shard_size * MIB)?;
        let mut task = None;
        let report = pack(&self.source, writer, |_, all| {
            task.get_or_insert_with(|| Task::new("pack", all as u64, "pictures")).advance(1);
        })?;
        task.map(Task::finish);
        for skipped in report.skipped.iter().take(NAMED) {
            eprintln!("skipped {skipped}");
        }
        if report.skipped.len() > NAMED {
            eprintln!("skipped {} more", report.skipped.len() - NAMED);
        }
        if self.json {
            return output::json(&report);
        }
        for shard in &report.shards {
            output::line(shard.display())?;
        }
        output::line(format_args!(
            "{} samples in {} shards, {} of them without a text, {} pictures skipped",
            report.samples,
            report.shards.len(),
            report.without_text,
            report.skipped.len()
        ))
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data info 'shards/train-*.tar'")]
pub struct InfoArgs {
    /// Shards: files, globs or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Print the summary as one line of JSON
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    fn run(self) -> Result<()> {
        let shards = ShardSet::open(&self.shards)?;
        let mut task = Task::new("read", shards.len() as u64, "samples");
        let info = DatasetInfo::scan(&shards, |_, _| task.advance(1));
        task.finish();
        if self.json {
            return output::json(&info);
        }
        let mib = info.bytes as f64 / MIB as f64;
        output::line(format_args!("{} samples in {} shards, {mib:.1} MiB", info.samples, info.shards))?;
        for (extension, count) in &info.extensions {
            output::line(format_args!("  .{extension}: {count} samples"))?;
        }
        for size in info.sizes.iter().take(NAMED) {
            output::line(format_args!("  {} x {}: {} pictures", size.width, size.height, size.count))?;
        }
        for (field, caption) in &info.captions {
            output::line(format_args!(
                "  caption {field}: {} samples, such as {:?}",
                caption.count, caption.examples
            ))?;
        }
        print_problems(&info.broken, &info.warnings)
    }
}

fn print_problems(broken: &Broken, warnings: &[String]) -> Result<()> {
    if broken.count > 0 {
        output::line(format_args!("  broken: {} samples", broken.count))?;
    }
    for problem in warnings.iter().chain(&broken.named) {
        output::line(format_args!("  {problem}"))?;
    }
    Ok(())
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 data show 'shards/train-*.tar' --field json:en --field json:zh -o sheet.png"
)]
pub struct ShowArgs {
    /// Shards: files, globs or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    #[command(flatten)]
    fields: FieldArgs,
    /// Pictures, drawn at random
    #[arg(short = 'n', long, default_value_t = 36, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    count: u64,
    /// Seed of the choice
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// The PNG to write
    #[arg(short, long, value_name = "FILE", default_value = "sheet.png")]
    out: PathBuf,
}

impl ShowArgs {
    fn run(self) -> Result<()> {
        output::check_extension("--out", &self.out, "png")?;
        let fields = self.fields.caption_fields()?;
        output::check_writable(&self.out)?;
        let shards = ShardSet::open(&self.shards)?;
        for flaw in shards.flaws() {
            eprintln!("{flaw}");
        }
        let order = SampleOrder::new(shards.len(), self.seed)?;
        let count = self.count.min(shards.len() as u64);
        let items = (0..count).map(|ordinal| {
            let sample = shards.sample(order.index(ordinal))?;
            let mut labels: Vec<String> =
                fields.all(&sample)?.into_iter().map(|caption| caption.text).collect();
            if labels.is_empty() {
                labels.push(sample.key.to_owned());
            }
            Ok::<_, Error>((sample_image(&sample)?, labels))
        });
        let items = items.collect::<Result<Vec<_>>>()?;
        contact_sheet(&items, SHEET_COLUMNS, SHEET_TILE)?.save_png(&self.out)?;
        output::line(format_args!("{}  {count} of {} samples", self.out.display(), shards.len()))
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data lint 'shards/train-*.tar' --repair clean\n\n\
    Every picture is decoded. A member that more than half of the samples have is missing where one lacks it. Exit code \
    1 where something was found.")]
pub struct LintArgs {
    /// Shards: files, globs or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Write the samples that are whole into this folder, as shards `clean-000000.tar` and so on
    #[arg(long, value_name = "DIR")]
    repair: Option<PathBuf>,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl LintArgs {
    fn run(self) -> Result<()> {
        const PREFIX: &str = "clean";
        let writer = match &self.repair {
            Some(dir) => {
                let first = format!("{PREFIX}-000000.tar");
                if dir.join(&first).exists() {
                    let problem =
                        format!("--repair {}: holds {first} already; choose another folder", dir.display());
                    return Err(Error::Usage(problem));
                }
                output::check_writable(&dir.join(PREFIX))?;
                Some(ShardWriter::create(dir, PREFIX, SHARD_MIB * MIB)?)
            }
            None => None,
        };
        let mut task = None;
        let report = lint(&self.shards, cores(), writer, |_, all| {
            task.get_or_insert_with(|| Task::new("check", all as u64, "samples")).advance(1);
        })?;
        task.map(Task::finish);
        if self.json {
            output::json(&report)?;
        } else {
            for flaw in &report.flaws {
                output::line(flaw)?;
            }
            for shard in &report.repaired {
                output::line(shard.display())?;
            }
            let LintReport { shards, samples, clean, .. } = report;
            output::line(format_args!("{samples} samples in {shards} shards, {clean} of them whole"))?;
        }
        if report.flaws.is_empty() {
            return Ok(());
        }
        let problem = format!("flaws: {}", report.flaws.len());
        Err(output::file_error(Path::new(&self.shards.join(" ")), problem))
    }
}

/// One thread a core.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 data bench 'shards/train-*.tar' --workers 8 --transform 'resize:144 | random_crop:128'\n\n\
    Times of stages are milliseconds of one worker for a sample."
)]
pub struct BenchArgs {
    /// Shards: files, globs or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Threads that read, decode and transform; the default is one a core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_024))]
    workers: Option<u64>,
    /// Augmentation, as in a config
    #[arg(long, value_name = "STEPS", default_value = "")]
    transform: Transform,
    /// Samples to load; the default is as many as there are
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    samples: Option<u64>,
    /// Print the figures as one line of JSON
    #[arg(long)]
    json: bool,
}

impl BenchArgs {
    fn run(self) -> Result<()> {
        let shards = ShardSet::open(&self.shards)?;
        for flaw in shards.flaws() {
            eprintln!("{flaw}");
        }
        let workers = self.workers.map_or_else(cores, |workers| workers as usize);
        let samples = self.samples.unwrap_or(shards.len() as u64);
        let mut task = Task::new("load", samples, "samples");
        let report = bench(shards, self.transform, workers, samples, || task.advance(1))?;
        task.finish();
        if self.json {
            return output::json(&report);
        }
        let BenchReport { samples, broken, seconds, samples_per_s, mb_per_s, stages, .. } = report;
        output::line(format_args!(
            "{samples_per_s:.0} samples/s, {mb_per_s:.1} MB/s: {samples} samples in {seconds:.1} s on {workers} \
             workers, {broken} broken"
        ))?;
        let (read, decode, transform) = (stages.read, stages.decode, stages.transform);
        output::line(format_args!("read {read:.3} ms, decode {decode:.3} ms, transform {transform:.3} ms"))
    }
}
