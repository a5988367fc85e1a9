//! `m6 tokenizer`.

use std::fs;
use std::path::{Path, PathBuf};

use m6::train::texts;
use m6::{Error, Result};
use m6_data::chat::{ChatTokens, IGNORED, Message};
use m6_data::{ShardSet, SkipLimits, Tokenizer, train_bpe};
use m6_run::{Task, fetching};
use serde::de::DeserializeOwned;
use serde_json::json;

use super::args::FieldArgs;
use super::output;

/// Make a text tokenizer, and use one
#[derive(Debug, clap::Subcommand)]
pub enum Command {
    /// Train a byte-level BPE on the captions of shards
    Train(TrainArgs),
    /// Show the token ids of texts
    Encode(EncodeArgs),
    /// Show the token ids of conversations in ChatML, and which of them are learned
    Chat(ChatArgs),
}

impl Command {
    pub fn run(self) -> Result<()> {
        match self {
            Self::Train(args) => args.run(),
            Self::Encode(args) => args.run(),
            Self::Chat(args) => args.run(),
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
        let shards = ShardSet::open_with(&self.shards, SkipLimits::default(), fetching())?;
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

#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  m6 tokenizer encode tokenizer.json captions.txt\n\n\
    Nothing is put before or after a text.")]
pub struct EncodeArgs {
    /// A `tokenizer.json`, WordPiece's `vocab.txt` or tiktoken ranks (`*.tiktoken`)
    tokenizer: PathBuf,
    /// A text a line, or of `*.jsonl` a JSON string a line, which can hold line ends
    #[arg(value_name = "FILE")]
    texts: PathBuf,
    /// Take the name of a special token, such as `<|endoftext|>`, for the token; it is text like any other without this
    #[arg(long)]
    special: bool,
    /// Print each text's ids as one line of JSON
    #[arg(long)]
    json: bool,
}

impl EncodeArgs {
    fn run(self) -> Result<()> {
        let mut tokenizer = Tokenizer::load(&self.tokenizer)?;
        if self.special {
            tokenizer = tokenizer.with_special_names();
        }
        let file = read(&self.texts)?;
        let is_json = self.texts.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("jsonl"));
        for (number, line) in (1..).zip(file.lines()) {
            let tokens = if is_json {
                tokenizer.encode(&parse::<String>(&self.texts, number, line, "a JSON string")?)?
            } else {
                tokenizer.encode(line)?
            };
            if self.json {
                output::json(&json!({"tokens": tokens}))?;
            } else {
                let ids: Vec<String> = tokens.iter().map(u32::to_string).collect();
                output::line(ids.join(" "))?;
            }
        }
        Ok(())
    }
}

#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 tokenizer chat qwen.tiktoken chats.jsonl\n\nA line of chats.jsonl:\n  {\"messages\": \
    [{\"role\": \"user\", \"content\": \"Hi\"}, {\"role\": \"assistant\", \"content\": \"Hello.\"}]}\n\nTokens that are not \
    learned are in parentheses; with --json their label is -100."
)]
pub struct ChatArgs {
    /// A `tokenizer.json` with the tokens of ChatML, or tiktoken ranks (`*.tiktoken`)
    tokenizer: PathBuf,
    /// A conversation a line (`*.jsonl`)
    #[arg(value_name = "FILE")]
    conversations: PathBuf,
    /// Print each conversation's tokens and labels as one line of JSON
    #[arg(long)]
    json: bool,
}

/// A line of a file of conversations.
#[derive(Debug, serde::Deserialize)]
struct Conversation {
    messages: Vec<Message>,
}

impl ChatArgs {
    fn run(self) -> Result<()> {
        let tokenizer = Tokenizer::load(&self.tokenizer)?;
        for (number, line) in (1..).zip(read(&self.conversations)?.lines()) {
            let what = "an object with messages of a role and a content";
            let Conversation { messages } = parse(&self.conversations, number, line, what)?;
            let chat = ChatTokens::new(&tokenizer, &messages).map_err(|error| {
                output::file_error(&self.conversations, format_args!("line {number}: {error}"))
            })?;
            if self.json {
                output::json(&chat)?;
                continue;
            }
            let shown = chat.tokens.iter().zip(&chat.labels).map(|(token, label)| match *label {
                IGNORED => format!("({token})"),
                _ => token.to_string(),
            });
            output::line(shown.collect::<Vec<_>>().join(" "))?;
        }
        Ok(())
    }
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).map_err(|error| output::file_error(path, error))
}

/// What line `number` of the file `path` says in JSON.
fn parse<T: DeserializeOwned>(path: &Path, number: usize, line: &str, what: &str) -> Result<T> {
    serde_json::from_str(line)
        .map_err(|error| output::file_error(path, format_args!("line {number}: expected {what}: {error}")))
}
