//! `m6 data`.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::{Path, PathBuf};

use m6::{Error, Result};
use m6_data::stats::{Duplicates, Group, PictureStats, Spread, TextStats};
use m6_data::{
    BenchReport, Broken, CaptionFields, DatasetInfo, DatasetStats, LintReport, Rgb8, SampleOrder, Script,
    ShardSet, ShardWriter, SkipLimits, Skipped, Transform, bench, contact_sheet, lint, sample_image,
    write_indexes,
};
use m6_run::{Task, fetching};

use super::args::FieldArgs;
use super::args::{MIB, SHARD_MIB, cores};
use super::codes::CodesArgs;
use super::output::{self, NAMED};
use super::pack::PackArgs;

const SHEET_COLUMNS: u32 = 6;
const SHEET_TILE: u32 = 128;
/// In place of a picture that a sample does not have.
const WHITE: [u8; 3] = [255; 3];
/// Columns of [`print_spread`].
const SPREAD_COLUMNS: [&str; 6] = ["count", "min", "5 %", "median", "95 %", "max"];

/// Make, summarise and look at shards of pictures and texts
#[derive(Debug, clap::Subcommand)]
#[command(
    after_help = "Shards are files, globs, urls (http, https, s3, gs; in a build with the feature `remote`), commands \
    that write a shard (`pipe:COMMAND`), or lists of these such as `train-{000..017}.tar`, in all commands that read shards \
    and in configs. Each is a tar archive, or by its name a .txt or .jsonl whose lines are samples, compressed or not. \
    Credentials come from the environment, such as AWS_ACCESS_KEY_ID or GOOGLE_APPLICATION_CREDENTIALS.\n\n\
    Urls and commands are fetched once and kept:\n  \
    M6_CACHE        their folder; the default is m6/shards in $XDG_CACHE_HOME or ~/.cache\n  \
    M6_CACHE_LIMIT  what it may hold, in bytes or such as 20G; the default is 100G"
)]
pub enum Command {
    /// Pack a folder of pictures, a jsonl that names them, or other shards, into shards; filter them
    Pack(PackArgs),
    /// Count samples, pictures, captions and what is broken
    Info(InfoArgs),
    /// Measure lengths of texts and sizes of pictures, and find what is there more than once
    Stats(StatsArgs),
    /// Draw a sheet of pictures with their captions
    Show(ShowArgs),
    /// Find what is broken, and write shards without it
    Lint(LintArgs),
    /// Write an index beside each shard, with which it opens faster
    Index(IndexArgs),
    /// Measure how fast shards become pictures
    Bench(BenchArgs),
    /// Write shards again with the codes of their pictures, for training without the image tokenizer
    Codes(CodesArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Pack(args) => args.run(),
            Self::Info(args) => args.run(),
            Self::Stats(args) => args.run(),
            Self::Show(args) => args.run(),
            Self::Lint(args) => args.run(),
            Self::Index(args) => args.run(),
            Self::Bench(args) => args.run(),
            Self::Codes(args) => args.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data info 'shards/train-*.tar'")]
pub struct InfoArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`; see `m6 data --help`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Print the summary as one line of JSON
    #[arg(long)]
    json: bool,
}

impl InfoArgs {
    fn run(self) -> Result<()> {
        let shards = ShardSet::open_with(&self.shards, SkipLimits::default(), fetching())?;
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
        for (what, count) in [("picture", info.without_picture), ("text", info.without_text)] {
            if count > 0 {
                output::line(format_args!("  without a {what}: {count} samples"))?;
            }
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
#[command(after_help = "Example:\n  m6 data stats 'shards/train-*.tar'\n\n\
    Every picture is decoded. Pictures look alike where their 64-bit difference hashes are equal: the same picture in \
    another encoding or size does, a crop does not, and plain pictures all do. A text is Han where it has a Han \
    character, and Latin where at least half of its letters are.")]
pub struct StatsArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`; see `m6 data --help`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Threads that read and decode; the default is one a core
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1_024))]
    workers: Option<u64>,
    /// Print the figures as one line of JSON
    #[arg(long)]
    json: bool,
}

impl StatsArgs {
    fn run(self) -> Result<()> {
        let shards = ShardSet::open_with(&self.shards, SkipLimits::default(), fetching())?;
        let workers = self.workers.map_or_else(cores, |workers| workers as usize);
        let mut task = Task::new("read", shards.len() as u64, "samples");
        let stats = DatasetStats::scan(shards, workers, || task.advance(1))?;
        task.finish();
        if self.json {
            return output::json(&stats);
        }
        let DatasetStats { samples, shards, bytes, broken, pictures, texts, warnings } = stats;
        let mib = bytes as f64 / MIB as f64;
        output::line(format_args!("{samples} samples in {shards} shards, {mib:.1} MiB"))?;
        print_problems(&broken, &warnings)?;

        print_row("pictures", &SPREAD_COLUMNS)?;
        print_spread("short side in pixels", &pictures.short_side)?;
        print_spread("width / height", &pictures.aspect)?;
        print_spread("bytes", &pictures.bytes)?;
        print_row("short side below", &pictures.below.keys().collect::<Vec<_>>())?;
        print_row("  pictures", &pictures.below.values().collect::<Vec<_>>())?;
        if !texts.is_empty() {
            print_texts(&texts)?;
        }
        print_duplicates(&pictures, &texts)
    }
}

fn print_texts(texts: &BTreeMap<String, TextStats>) -> Result<()> {
    print_row("characters of texts", &SPREAD_COLUMNS)?;
    for (field, text) in texts {
        print_spread(field, &text.characters)?;
    }
    print_row("words of Latin texts", &SPREAD_COLUMNS)?;
    for (field, text) in texts.iter().filter(|(_, text)| text.words.count > 0) {
        print_spread(field, &text.words)?;
    }
    print_row("scripts of texts", &["Han", "Latin", "other"])?;
    for (field, text) in texts {
        let shares = [Script::Han, Script::Latin, Script::Other].map(|script| {
            let count = text.scripts.get(&script).copied().unwrap_or(0);
            format!("{:.1} %", 100.0 * count as f64 / text.characters.count as f64)
        });
        print_row(&format!("  {field}"), &shares)?;
    }
    Ok(())
}

fn print_duplicates(pictures: &PictureStats, texts: &BTreeMap<String, TextStats>) -> Result<()> {
    let by_picture =
        [("pictures of equal bytes", &pictures.same_bytes), ("pictures that look alike", &pictures.alike)];
    let by_text = texts.iter().map(|(field, text)| (field.as_str(), &text.same));
    print_row("more than once", &["distinct", "groups", "samples"])?;
    for (name, Duplicates { distinct, groups, samples, .. }) in by_picture.into_iter().chain(by_text) {
        print_row(&format!("  {name}"), &[distinct, groups, samples])?;
    }
    for (name, duplicates) in by_picture {
        for Group { samples, keys } in &duplicates.largest {
            let more = if *samples > keys.len() { ", ..." } else { "" };
            output::line(format_args!("{name}: {samples} samples: {}{more}", keys.join(", ")))?;
        }
    }
    Ok(())
}

fn print_spread<T: Display>(name: &str, spread: &Spread<T>) -> Result<()> {
    let Spread { count, min, p5, median, p95, max } = spread;
    // The precision is for fractions; whole numbers are printed whole.
    let values = [min, p5, median, p95, max].map(|value| format!("{value:.2}"));
    let count = count.to_string();
    print_row(&format!("  {name}"), &[&[count][..], &values].concat())
}

/// A line of a table: its name, then right-aligned columns.
fn print_row(name: &str, columns: &[impl Display]) -> Result<()> {
    let columns: String = columns.iter().map(|column| format!("{column:>10}")).collect();
    output::line(format_args!("{name:<28}{columns}"))
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 data show 'shards/train-*.tar' --field json:en --field json:zh -o sheet.png"
)]
pub struct ShowArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`; see `m6 data --help`
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
        let shards = ShardSet::open_with(&self.shards, SkipLimits::default(), fetching())?;
        for flaw in shards.flaws() {
            eprintln!("{flaw}");
        }
        let order = SampleOrder::new(shards.len(), self.seed)?;
        let count = self.count.min(shards.len() as u64);
        let mut skipped = Skipped::default();
        let mut items = Vec::new();
        for ordinal in 0..count {
            let made = item(&shards, order.index(ordinal), &fields);
            items.extend(skipped.check(made, None, |note| eprintln!("{note}"))?);
        }
        if items.is_empty() {
            return Err(Error::Usage("none of the samples can be shown".to_owned()));
        }
        let shown = items.len();
        contact_sheet(&items, SHEET_COLUMNS, SHEET_TILE)?.save_png(&self.out)?;
        output::line(format_args!("{}  {shown} of {} samples", self.out.display(), shards.len()))
    }
}

/// What a sheet shows of a sample: its picture, and its texts or else its key.
fn item(shards: &ShardSet, index: usize, fields: &CaptionFields) -> m6_data::Result<(Rgb8, Vec<String>)> {
    let sample = shards.sample(index)?;
    let mut labels: Vec<String> = fields.all(&sample)?.into_iter().map(|caption| caption.text).collect();
    if labels.is_empty() {
        labels.push(sample.key.to_owned());
    }
    let picture = match sample.picture() {
        Some(_) => sample_image(&sample)?,
        None => Rgb8::filled(SHEET_TILE, SHEET_TILE, WHITE),
    };
    Ok((picture, labels))
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data lint 'shards/train-*.tar' --repair clean\n\n\
    Every picture is decoded, and every cls, npy and safetensors is read. Samples may lack a picture or a text, unless \
    --require asks for it. Exit code 1 where something was found.")]
pub struct LintArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`; see `m6 data --help`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Report the samples that lack this: `picture`, or an extension such as `json`; may be given many times
    #[arg(long = "require", value_name = "MEMBER")]
    required: Vec<String>,
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
        let report = lint(&self.shards, &self.required, cores(), writer, fetching(), |_, all| {
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

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 data index 'shards/train-*.tar'\n\n\
    train-000000.idx beside train-000000.tar lists its members, as NVIDIA DALI's wds2idx writes it. Shards without one \
    are read through when they are opened. Exit code 1 where a shard could not be indexed.")]
pub struct IndexArgs {
    /// Shards: files, globs or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl IndexArgs {
    fn run(self) -> Result<()> {
        let mut task = None;
        let report = write_indexes(&self.shards, |_, all| {
            task.get_or_insert_with(|| Task::new("index", all as u64, "shards")).advance(1);
        })?;
        task.map(Task::finish);
        if self.json {
            output::json(&report)?;
        } else {
            for path in &report.written {
                output::line(path.display())?;
            }
        }
        for skipped in &report.skipped {
            eprintln!("no index: {skipped}");
        }
        if report.skipped.is_empty() {
            return Ok(());
        }
        let problem = format!("shards without an index: {}", report.skipped.len());
        Err(output::file_error(Path::new(&self.shards.join(" ")), problem))
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 data bench 'shards/train-*.tar' --workers 8 --transform 'resize:144 | random_crop:128'\n\n\
    Times of stages are milliseconds of one worker for a sample."
)]
pub struct BenchArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`; see `m6 data --help`
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
        let shards = ShardSet::open_with(&self.shards, SkipLimits::default(), fetching())?;
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
