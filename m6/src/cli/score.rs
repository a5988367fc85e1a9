//! `m6 score`: how likely a language model finds a text.

use std::fs;
use std::path::PathBuf;

use m6::generate::{Likelihood, likelihood};
use m6::model::{LanguageModel, compute_dtype};
use m6::{Error, Result};
use m6_runtime::FloatDtype;
use m6_runtime::device::device;

use super::args::Dtype;
use super::output;

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 score --model Qwen2-0.5B --text 'The sky is blue.' --json\n\n\
    The model is a folder with config.json, safetensors and tokenizer.json or qwen.tiktoken, as Hugging Face has them: \
    Qwen, Qwen2 or Qwen2-MoE; or one that `m6 convert` made of it. The first token is given, not \
    scored; nothing is put before it.")]
pub struct Args {
    /// Folder of the model
    #[arg(long, value_name = "DIR")]
    model: PathBuf,
    #[command(flatten)]
    input: Input,
    /// Where to compute: `cpu`, `cuda:N`, or `auto`
    #[arg(long, default_value = "auto")]
    device: String,
    /// Numbers of the computation; the default is bf16 on a GPU and fp32 elsewhere
    #[arg(long)]
    dtype: Option<Dtype>,
    /// Print tokens, their log-probabilities and what they come to as one line of JSON
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
#[group(required = true, multiple = false)]
struct Input {
    /// The text
    #[arg(long)]
    text: Option<String>,
    /// A file with the text
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// Token ids in place of a text
    #[arg(long, value_name = "IDS", value_delimiter = ',', num_args = 1)]
    tokens: Option<Vec<i64>>,
}

impl Args {
    pub fn run(self) -> Result<()> {
        let device = device(&self.device)?;
        let dtype = self.dtype.map_or(compute_dtype(device), FloatDtype::from);
        let mut model = LanguageModel::load(&self.model, device, Some(dtype))?;
        model.transformer.set_compute(dtype.kind());
        let tokens = self.input.tokens(&model, &self.model)?;
        let scored = likelihood(&model, &tokens)?;
        if self.json {
            return output::json(&scored);
        }
        let Likelihood { tokens, logprobs, nll, perplexity } = &scored;
        for (token, logprob) in tokens[1..].iter().zip(logprobs) {
            let text = model.tokenizer.as_ref().map(|tokenizer| tokenizer.decode(&[*token as u32]));
            let text =
                text.and_then(m6_data::Result::ok).map_or_else(String::new, |text| format!("{text:?}"));
            output::line(format_args!("{token:>8}  {logprob:>9.4}  {text}"))?;
        }
        output::line(format_args!(
            "{} tokens, {nll:.4} nats a token, perplexity {perplexity:.4}",
            tokens.len()
        ))
    }
}

impl Input {
    fn tokens(self, model: &LanguageModel, folder: &std::path::Path) -> Result<Vec<i64>> {
        if let Some(tokens) = self.tokens {
            return Ok(tokens);
        }
        let text = match (self.text, self.file) {
            (Some(text), _) => text,
            (None, Some(file)) => {
                fs::read_to_string(&file).map_err(|error| output::file_error(&file, error))?
            }
            (None, None) => String::new(),
        };
        let tokenizer = model.tokenizer.as_ref().ok_or_else(|| {
            let problem = "holds no tokenizer.json or qwen.tiktoken; --tokens takes ids";
            Error::Usage(format!("{}: {problem}", folder.display()))
        })?;
        Ok(tokenizer.encode(&text)?.into_iter().map(i64::from).collect())
    }
}
