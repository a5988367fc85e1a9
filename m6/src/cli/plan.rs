//! `m6 plan`.

use std::path::PathBuf;

use m6::Result;
use m6::plan::{Machine, Plan, Subject};
use m6_data::bytes_of;

use super::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 plan configs/model/qwen2-7b.toml --gpus 8 --gpu-memory 80G\n\n\
    Arithmetic alone: nothing is allocated or computed. `m6 train` keeps float32 states with bf16 copies on one GPU, and \
    bf16 alone where its config says weights = \"bf16\" and optimizer.moments = \"bf16\"; it computes blocks again with \
    recompute = true. The other rows say what those ways would take. States spread over GPUs are those of ZeRO-3; activations \
    are not spread.")]
pub struct Args {
    /// A file of configs/model, a training config, a model folder, or a folder with Hugging Face's config.json
    config: PathBuf,
    /// GPUs over which weights, gradients and moments may be spread
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(i64).range(1..=1 << 20))]
    gpus: i64,
    /// Memory of one GPU, such as 80G; tells what fits
    #[arg(long, value_name = "BYTES", value_parser = parse_memory)]
    gpu_memory: Option<u64>,
    /// Tokens of a text, for the operations of attention; as long as an example can be, 4096 at most, if not given
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(i64).range(1..=1 << 30))]
    length: Option<i64>,
    /// Print one line of JSON
    #[arg(long)]
    json: bool,
}

fn parse_memory(text: &str) -> std::result::Result<u64, String> {
    bytes_of(text).filter(|bytes| *bytes > 0).ok_or_else(|| "expected bytes, or such as 80G".to_owned())
}

impl Args {
    pub fn run(self) -> Result<()> {
        let subject = Subject::open(&self.config)?;
        let machine = Machine { gpus: self.gpus, memory: self.gpu_memory };
        let plan = Plan::of(&subject, machine, self.length);
        if self.json { output::json(&plan) } else { output::line(plan.to_string().trim_end()) }
    }
}
