//! `m6 tokenizer`.

use std::path::PathBuf;

use m6::train::texts;
use m6::{Error, Result};
use m6_data::{ShardSet, train_bpe};
use m6_run::{Task, fetching};

use super::args::FieldArgs;
use super::output;

/// Make a text tokenizer
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train a byte-level BPE on the captions of shards
    Train(TrainArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Train(args) => args.run(),
        }
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 tokenizer train 'shards/train-*.tar' --field json:en --field json:zh \
    --vocab-size 4096 -o tokenizer.json"
)]
pub struct TrainArgs {
    /// Shards: files, globs, urls, commands or lists such as `train-{000..017}.tar`
    #[arg(required = true)]
    shards: Vec<String>,
    #[command(flatten)]
    fields: FieldArgs,
    /// Tokens: 256 bytes and the most frequent merges
    #[arg(long, default_value_t = 8192)]
    vocab_size: usize,
    /// The tokenizer to write
    #[arg(short, long, value_name = "FILE", default_value = "tokenizer.json")]
    out: PathBuf,
}

impl TrainArgs {
    fn run(self) -> Result<()> {
        output::check_extension("--out", &self.out, "json")?;
        if self.fields.is_empty() {
            return Err(Error::Usage("--field: expected at least one, such as `--field txt`".into()));
        }
        let fields = self.fields.caption_fields()?;
        output::check_writable(&self.out)?;
        let shards = ShardSet::open_with(&self.shards, fetching())?;
        let mut task = Task::new("read captions", shards.len() as u64, "samples");
        let texts = texts(&shards, &[&fields], || task.advance(1))?;
        task.finish();
        let count = texts.len();
        let tokenizer = train_bpe(texts.into_iter(), self.vocab_size)?;
        tokenizer.save(&self.out)?;
        let size = tokenizer.vocab_size();
        output::line(format_args!("{}  {size} tokens from {count} captions", self.out.display()))
    }
}
