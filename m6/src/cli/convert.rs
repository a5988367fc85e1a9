//! `m6 convert`: a language model from one kind of folder to the other.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use m6::model::{LanguageModel, StoredKind, is_published};
use m6::{Error, Result};
use tch::Device;

use super::args::Dtype;
use super::output;

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 convert Qwen2-0.5B qwen2\n  m6 convert qwen2 Qwen2-0.5B-again --dtype bf16\n\n\
    What SRC is decides the direction. A folder as Hugging Face has them (Qwen, Qwen2 or Qwen2-MoE) becomes one of this \
    program, and one of this program becomes one that transformers reads. Files of the tokenizer and \
    generation_config.json come along."
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
}

impl Args {
    pub fn run(self) -> Result<()> {
        check_empty(&self.out)?;
        let to_ours = is_published(&self.source);
        let model = LanguageModel::load(&self.source, Device::Cpu)?;
        let dtype = match self.dtype {
            None => model.stored,
            Some(Dtype::Fp32) => StoredKind::F32,
            Some(Dtype::Bf16) => StoredKind::Bf16,
        };
        if to_ours {
            model.save(&self.out, dtype)?;
        } else {
            model.publish(&self.out, dtype)?;
        }
        let kind = if to_ours { "model" } else { "model as Hugging Face has them" };
        output::line(format_args!("{}  {kind}", self.out.display()))
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
