//! `m6 convert`: a language model from one kind of folder to the other, and to models that it can become.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use m6::model::{Extension, LanguageModel, Model, Upcycling, VQGAN, has_pictures, is_published};
use m6::{Error, Result};
use m6_runtime::FloatDtype;
use tch::Device;

use super::args::Dtype;
use super::output;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 convert Qwen2-0.5B qwen2\n  m6 convert qwen2 Qwen2-0.5B-again --dtype bf16\n  \
    m6 convert Qwen2-7B qwen2-moe --experts configs/model/qwen2-57b-a14b.toml --seed 1\n  \
    m6 convert Qwen2-0.5B start --pictures train.toml\n\n\
    What SRC is decides the direction. A folder as Hugging Face has them (Qwen, Qwen2 or Qwen2-MoE) becomes one of this \
    program, and one of this program becomes one that transformers reads. Files of the tokenizer and \
    generation_config.json come along.\n\n\
    With --experts a dense model of either kind, or one of this program that draws, becomes one of this program with \
    experts, as Qwen2's were made: the neurons of each feed-forward are copied, shuffled and cut into experts, half of \
    whose neurons start anew, as do routers and shared experts.\n\n\
    With --delink a model whose blocks all have the weights of the first (`share_layers`) becomes one whose blocks have their \
    own, as M6-10T did: a run that starts from it (`init`) goes on where the other stopped.\n\n\
    With --pictures a language model becomes one that a run can begin from (`init`) to learn to see and draw: special ids \
    and image codes get rows, and there are a head for codes and an extractor of patch features; what it makes of texts \
    stays what it was."
)]
pub struct Args {
    /// Folder of the model
    #[arg(value_name = "SRC")]
    source: PathBuf,
    /// Folder to write, empty or not there yet
    #[arg(value_name = "DST")]
    out: PathBuf,
    /// How weights are stored; as in SRC by default
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Give the model the experts that the table `model` of this file describes; all else in it must be as in SRC
    #[arg(long, value_name = "FILE", group = "new")]
    experts: Option<PathBuf>,
    /// Make a language model ready to learn pictures, as the keys `model` and `vqgan` of this training config say
    #[arg(long, value_name = "CONFIG", group = "new")]
    pictures: Option<PathBuf>,
    /// Give each block of a model with `share_layers` weights of its own, the same at first
    #[arg(long, conflicts_with = "new")]
    delink: bool,
    /// Seed of what is new
    #[arg(long, default_value_t = 0, requires = "new")]
    seed: u64,
}

impl Args {
    pub fn run(self) -> Result<()> {
        check_empty(&self.out)?;
        let kind = match (&self.experts, &self.pictures) {
            (Some(file), _) => {
                self.upcycle(&Upcycling::open(file, self.seed)?)?;
                "model with experts"
            }
            (_, Some(config)) => {
                self.extend(&Extension::open(config, self.seed)?)?;
                "model to begin training from"
            }
            (None, None) if self.delink => {
                self.delink()?;
                "model whose blocks can learn apart"
            }
            (None, None) => self.convert()?,
        };
        output::line(format_args!("{}  {kind}", self.out.display()))
    }

    /// Returns what was made.
    fn convert(&self) -> Result<&'static str> {
        let model = LanguageModel::load(&self.source, Device::Cpu, None)?;
        let dtype = self.dtype(model.stored);
        if is_published(&self.source) {
            model.save(&self.out, dtype)?;
            return Ok("model");
        }
        model.publish(&self.out, dtype)?;
        Ok("model as Hugging Face has them")
    }

    fn upcycle(&self, upcycling: &Upcycling) -> Result<()> {
        if !has_pictures(&self.source) {
            let model = self.load_wide()?.upcycled(upcycling)?;
            return model.save(&self.out, self.dtype(model.stored));
        }
        let mut model = Model::load(&self.source, Device::Cpu)?.upcycled(upcycling)?;
        model.info.dtype = self.dtype(model.info.dtype);
        model.save(&self.out, &self.source.join(VQGAN))
    }

    fn delink(&self) -> Result<()> {
        let mut model = Model::load(&self.source, Device::Cpu)?.delinked()?;
        model.info.dtype = self.dtype(model.info.dtype);
        model.save(&self.out, &self.source.join(VQGAN))
    }

    fn extend(&self, extension: &Extension) -> Result<()> {
        let mut model = self.load_wide()?.extended(extension)?;
        model.info.dtype = self.dtype(model.info.dtype);
        model.save(&self.out, &extension.vqgan)
    }

    /// The language model in float32, in which what is added to it is drawn.
    fn load_wide(&self) -> Result<LanguageModel> {
        LanguageModel::load(&self.source, Device::Cpu, Some(FloatDtype::Fp32))
    }

    fn dtype(&self, stored: FloatDtype) -> FloatDtype {
        self.dtype.map_or(stored, FloatDtype::from)
    }
}

/// Old shards beside new ones would be taken for the same model.
fn check_empty(dir: &Path) -> Result<()> {
    match fs::read_dir(dir).map(|mut entries| entries.next().is_none()) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::Usage(format!("{}: is not empty; expected a new or empty folder", dir.display())))
        }
        Err(error) if error.kind() == ErrorKind::NotFound => output::check_writable(dir),
        Err(error) => Err(output::file_error(dir, error)),
    }
}
