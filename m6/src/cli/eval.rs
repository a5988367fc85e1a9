//! `m6 eval`.

use std::fmt::Display;
use std::path::PathBuf;

use m6::Result;
use m6::eval::{CaptionsRequest, PicturesRequest, captions, pictures};
use m6::generate::Sampling;
use m6::model::Model;
use m6_runtime::device::device;
use serde::Serialize;

use super::output;

/// Score a model on held-out pictures
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Are captions the true names of what pictures show?
    Captions(CaptionsArgs),
    /// Do drawn pictures look like the true ones, and are they copies of training pictures?
    Pictures(PicturesArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Captions(args) => args.run(),
            Self::Pictures(args) => args.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
struct CommonArgs {
    /// Held-out shards, named as `m6 data --help` says; names under the JSON keys `en` and `zh`
    #[arg(required = true)]
    shards: Vec<String>,
    /// Model folder
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    /// Score only the first samples
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    limit: Option<u64>,
    /// Write every result as a line of JSON, and contact sheets, into this folder
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Print the scores as one line of JSON
    #[arg(long)]
    json: bool,
}

impl CommonArgs {
    fn limit(&self) -> Option<usize> {
        self.limit.map(|limit| limit as usize)
    }

    /// The model, once it is clear that results can be written.
    fn open(&self, result: &str) -> Result<Model> {
        if let Some(out) = &self.out {
            output::check_writable(&out.join(result))?;
        }
        Model::load(&self.model, device(&self.device)?)
    }

    fn print(&self, report: &(impl Serialize + Display)) -> Result<()> {
        if self.json {
            return output::json(report);
        }
        output::line(report.to_string().trim_end())?;
        match &self.out {
            Some(out) => output::line(format_args!("{}  every result, and contact sheets", out.display())),
            None => Ok(()),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 eval captions --model models/emoji datasets/emoji/val-compose-*.tar --out out/captions"
)]
pub struct CaptionsArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Texts that are followed at once: 1 is greedy
    #[arg(long, default_value_t = 4)]
    beams: usize,
}

impl CaptionsArgs {
    fn run(self) -> Result<()> {
        let model = self.common.open("captions.jsonl")?;
        let Self { common, beams } = self;
        let request = CaptionsRequest {
            limit: common.limit(),
            shards: common.shards.clone(),
            beams,
            out: common.out.clone(),
        };
        common.print(&captions(&model, &request)?)
    }
}

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 eval pictures --model models/emoji datasets/emoji/val-compose-*.tar \
    --train 'datasets/emoji/train-*.tar' --out out/pictures\n\n\
    Each sample is drawn once for each prompt. A drawing counts as right where the true picture is the nearest to it of \
    100 candidates, in the space of the image tokenizer's latents, averaged over an 8 x 8 grid, and in that of 32 x 32 \
    pixels.")]
pub struct PicturesArgs {
    #[command(flatten)]
    common: CommonArgs,
    /// Training shards: for how near drawings are to them, and for more candidates; may be given many times
    #[arg(long, value_name = "SHARDS")]
    train: Vec<String>,
    /// Prompt over the samples' JSON keys; may be given many times
    #[arg(long = "prompt", value_name = "TEMPLATE", default_values_t = [
        "{en}, {style_en} style".to_owned(), "{zh}，{style_zh}风格".to_owned()
    ])]
    prompts: Vec<String>,
    /// Pictures among which the true one is to be found, itself included
    #[arg(long, value_name = "N", default_value_t = 100)]
    candidates: usize,
    /// Draw this many for each sample and keep the one that the model itself finds to show the prompt best
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    best_of: u64,
    /// Seed of the first drawing of every sample and of the choice of candidates
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Below 1 for safer, above 1 for wilder pictures; 0 always takes the most likely code
    #[arg(long, default_value_t = Sampling::default().temperature)]
    temperature: f64,
    /// Choose among this many most likely codes; 0 for all
    #[arg(long, default_value_t = Sampling::default().top_k)]
    top_k: usize,
    /// Choose among the most likely codes of this much probability; 1 for all
    #[arg(long, default_value_t = Sampling::default().top_p)]
    top_p: f64,
    /// How closely to follow the prompt: 1 as in training, larger more closely
    #[arg(long, value_name = "SCALE", default_value_t = 3.0)]
    guidance: f64,
}

impl PicturesArgs {
    fn run(self) -> Result<()> {
        let model = self.common.open("pictures.jsonl")?;
        let request = PicturesRequest {
            shards: self.common.shards.clone(),
            train: self.train,
            prompts: self.prompts,
            candidates: self.candidates,
            limit: self.common.limit(),
            best_of: self.best_of as usize,
            guidance: self.guidance,
            sampling: Sampling { temperature: self.temperature, top_k: self.top_k, top_p: self.top_p },
            seed: self.seed,
            out: self.common.out.clone(),
        };
        self.common.print(&pictures(&model, &request)?)
    }
}
