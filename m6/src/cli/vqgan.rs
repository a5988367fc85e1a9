//! `m6 vqgan`.

use std::path::{Path, PathBuf};

use clap::ValueEnum;
use m6::Result;
use m6_vqgan::fidelity::Fidelity;
use m6_vqgan::weights::{self, Imported};
use m6_vqgan::{Dtype, EvalRequest, VqganReport};

use super::args::ConfigArgs;
use super::output;
use super::vqgan_codes::{DecodeArgs, EncodeArgs};

/// Train and score an image tokenizer, which turns pictures into codes and back, or take over a published one
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train an image tokenizer; the same command again resumes an unfinished run
    Train(TrainArgs),
    /// Score reconstructions: PSNR, SSIM, MS-SSIM, distances of the sets, codebook usage, perplexity and bits a pixel
    Eval(EvalArgs),
    /// Turn pictures of any size into codes, a NumPy file each
    Encode(EncodeArgs),
    /// Turn code files back into pictures
    Decode(DecodeArgs),
    /// Measure how fast pictures become codes and codes pictures
    Bench(BenchArgs),
    /// Make a model folder of weights of taming-transformers, latent-diffusion, LlamaGen, diffusers or Janus
    Import(ImportArgs),
    /// Write a model's weights under the names of another project
    Export(ExportArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Train(args) => args.run(),
            Self::Eval(args) => args.run(),
            Self::Encode(args) => args.run(),
            Self::Decode(args) => args.run(),
            Self::Bench(args) => args.run(),
            Self::Import(args) => args.run(),
            Self::Export(args) => args.run(),
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
    after_help = "Example:\n  m6 vqgan eval models/emoji/vqgan datasets/emoji/val-base-*.tar --grid grid.png\n\n\
    MS-SSIM has five scales, and pictures of less than 176 pixels a side have none. Bits a pixel are by the entropy of \
    the codes, and nominal by the size of the codebook.\n\n\
    Originals and reconstructions are also compared as sets, by the Frechet distance and the unbiased kernel distance. With \
    --inception the features are those of FID and KID: it takes the weights that pytorch-fid publishes, \
    pt_inception-2015-12-05, as a safetensors file or a torch file of torch 1.6 and later. The kernel distance is over all \
    pictures, without the pairs of an original and its own reconstruction; the usual KID is the mean of subsets with them. \
    Without --inception the features are of a network that was never trained and whose name stands with the figures, which \
    compare with others of that name and number of pictures, and not with FID and KID."
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
    /// Weights of FID's Inception network, whose features are then compared
    #[arg(long, value_name = "FILE")]
    inception: Option<PathBuf>,
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
        let request = EvalRequest {
            limit: self.limit.map(|limit| limit as usize),
            grid: self.grid.as_deref(),
            inception: self.inception.as_deref(),
        };
        let report = m6_vqgan::eval::run(&self.dir, &self.shards, &self.device, request)?;
        if self.json {
            return output::json(&report);
        }
        print_scores(&report.scores)?;
        if let Some(fidelity) = &report.fidelity {
            print_fidelity(fidelity)?;
        }
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
    let ms_ssim = report.ms_ssim.map_or_else(String::new, |value| format!(", MS-SSIM {value:.4}"));
    output::line(format_args!(
        "{} pictures: PSNR {:.2} dB, SSIM {:.4}{ms_ssim}, codebook usage {:.1} %, perplexity {:.0}, {:.3} bits a pixel \
         of {:.3} nominal",
        report.samples,
        report.psnr,
        report.ssim,
        100.0 * report.codebook_usage,
        report.perplexity,
        report.bits_per_pixel,
        report.nominal_bits_per_pixel
    ))
}

fn print_fidelity(fidelity: &Fidelity) -> Result<()> {
    let Fidelity { space, frechet_distance, kernel_distance } = fidelity;
    output::line(format_args!(
        "as sets, by features {}: Frechet distance {frechet_distance:.4}, kernel distance {kernel_distance:.6}",
        space.name()
    ))
}

/// Other tensors that are named.
const NAMED: usize = 3;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 vqgan import vq_ds16_c2i.pt -o tokenizer\n  \
    m6 vqgan eval tokenizer 'shards/val-*.tar' --grid grid.png\n\n\
    The layout is found out by the names of the tensors, the network by their shapes. Read are safetensors files and \
    torch files (.pt, .ckpt, .bin) of torch 1.6 and later; nothing that a torch file asks to run is run. Networks \
    with a Gumbel quantiser, MoVQ and Chameleon's files of Hugging Face, which lack a decoder, are refused.")]
pub struct ImportArgs {
    /// Weight file, or a folder with one
    source: PathBuf,
    /// Folder for the model
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Side of the pictures that it was trained on; a folder of this program has its own
    #[arg(long, value_name = "PIXELS", default_value_t = 256)]
    resolution: u16,
    /// How weights are stored
    #[arg(long, value_enum, default_value = "float32")]
    dtype: StoredDtype,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum StoredDtype {
    Float32,
    Bfloat16,
}

impl ImportArgs {
    fn run(self) -> Result<()> {
        let dtype = match self.dtype {
            StoredDtype::Float32 => Dtype::Float32,
            StoredDtype::Bfloat16 => Dtype::Bfloat16,
        };
        let imported = weights::import(&self.source, &self.out, i64::from(self.resolution), dtype)?;
        print_imported(&self.source, &imported)?;
        output::line(format_args!("{}  model", self.out.display()))
    }
}

fn print_imported(source: &Path, imported: &Imported) -> Result<()> {
    let Imported { layout, config, left_out } = imported;
    output::line(format_args!("{}  layout {layout}", source.display()))?;
    if !left_out.is_empty() {
        let named = left_out[..left_out.len().min(NAMED)].join(", ");
        let more = if left_out.len() > NAMED { ", ..." } else { "" };
        output::line(format_args!("left out {} tensors of other parts: {named}{more}", left_out.len()))?;
    }
    output::json(config)
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 vqgan export models/emoji/vqgan --layout taming -o emoji.safetensors\n\n\
    For diffusers a folder is written. Codes that are compared by angle become unit vectors where the other project \
    compares by distance, which gives the same codes."
)]
pub struct ExportArgs {
    /// Folder of the tokenizer
    dir: PathBuf,
    /// Whose names the tensors get
    #[arg(long, value_enum)]
    layout: Layout,
    /// File to write, *.safetensors, or a folder for diffusers
    #[arg(short, long, value_name = "FILE")]
    out: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Layout {
    Taming,
    Llamagen,
    Diffusers,
}

impl ExportArgs {
    fn run(self) -> Result<()> {
        let layout = match self.layout {
            Layout::Taming => weights::Layout::Taming,
            Layout::Llamagen => weights::Layout::LlamaGen,
            Layout::Diffusers => weights::Layout::Diffusers,
        };
        if self.layout != Layout::Diffusers {
            output::check_extension("-o", &self.out, "safetensors")?;
            output::check_writable(&self.out)?;
        }
        weights::export(&self.dir, layout, &self.out)?;
        output::line(format_args!("{}  weights for {layout}", self.out.display()))
    }
}
