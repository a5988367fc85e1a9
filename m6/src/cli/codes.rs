//! `m6 data codes`.

use std::path::{Path, PathBuf};

use m6::codes::{CodeShards, CodesReport, Views, write_code_shards};
use m6::{Error, Result};
use m6_data::{SkipLimits, Transform};
use m6_runtime::device::device;
use m6_vqgan::Vqgan;

use super::args::cores;
use super::output;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 data codes 'shards/train-*.tar' -o coded --vqgan models/emoji/vqgan \\\n    \
    --transform 'resize:130 | random_crop:128 | flip:0.5' --views 8\n\n\
    Each sample keeps its members and gets one more, codes-HASH.npy: [views, rows, columns] of 16-bit unsigned integers, \
    where HASH is that of the tokenizer. A source of `m6 train` without a code_transform reads them. Samples whose picture \
    is absent or broken stay without, are named in DIR/skipped.jsonl and counted, and so are samples whose names cannot be \
    written again, which are left out. Exit code 1 where a shard could not be used. Shards that are there already are left alone: the same command goes on where it was \
    stopped, and several may share the shards out."
)]
pub struct CodesArgs {
    /// Shards: files, globs, urls or lists such as `train-{000..017}.tar`, each of a file name of its own
    #[arg(required = true)]
    shards: Vec<String>,
    /// Folder for the shards with codes, which have the names of the old
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Folder of the image tokenizer
    #[arg(long, value_name = "DIR")]
    vqgan: PathBuf,
    /// Augmentation of each view, as in a config; ends in a crop to the tokenizer's size
    #[arg(long, value_name = "STEPS")]
    transform: Transform,
    /// Views of each picture
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    views: u64,
    /// Seed of the augmentation
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// So many samples in a row that cannot be used end the work
    #[arg(long, value_name = "N", default_value_t = SkipLimits::default().in_a_row)]
    skip_in_a_row: u64,
    /// More than this share of samples that cannot be used ends it, once there were a thousand
    #[arg(long, value_name = "SHARE", default_value_t = SkipLimits::default().share)]
    skip_share: f64,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print the report as one line of JSON
    #[arg(long)]
    json: bool,
}

impl CodesArgs {
    pub fn run(self) -> Result<()> {
        let skip = SkipLimits { in_a_row: self.skip_in_a_row, share: self.skip_share };
        skip.validate().map_err(|problem| Error::Usage(format!("--skip-{}", problem.replace('_', "-"))))?;
        let device = device(&self.device)?;
        let vqgan = Vqgan::load(&self.vqgan, device)?;
        output::check_writable(&self.out.join("codes.json"))?;
        let views = Views {
            transform: self.transform,
            count: self.views as usize,
            seed: self.seed,
            workers: cores(),
            skip,
        };
        let request = CodeShards { shards: &self.shards, views, out: &self.out };
        let report = write_code_shards(&request, &vqgan, device)?;
        if self.json {
            output::json(&report)?;
        } else {
            for shard in &report.shards {
                output::line(shard.display())?;
            }
            let CodesReport { member, shards, kept, samples, with_codes, left_out, .. } = &report;
            output::line(format_args!(
                "{with_codes} of {samples} samples got .{member} in {} shards; {left_out} were left out, {kept} more \
                 shards were there",
                shards.len() - kept
            ))?;
        }
        if report.unusable.is_empty() {
            return Ok(());
        }
        let problem = format!("shards that cannot be used: {}", report.unusable.len());
        Err(output::file_error(Path::new(&self.shards.join(" ")), problem))
    }
}
