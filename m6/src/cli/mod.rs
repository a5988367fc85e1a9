//! The command line: one file a command, each no more than flags, a call into the libraries, and what is printed.
//!
//! Results go to standard output, everything else to standard error. The exit code is 0, 1 for a failure, or 2 for
//! wrong use: an unknown flag, a value out of its range, a config that does not fit.

mod args;
mod caption;
mod codes;
mod convert;
mod data;
mod demo;
mod eval;
mod exit;
mod generate;
mod output;
mod pack;
mod plan;
mod score;
mod tokenizer;
mod train;
mod vqgan;
mod vqgan_codes;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use m6::Result;

/// One multimodal transformer: pretrain it on pictures and texts, let it caption pictures and draw them.
#[derive(Debug, Parser)]
#[command(
    name = "m6",
    version,
    arg_required_else_help = true,
    after_help = "From pictures to a model:\n  \
        m6 data pack PICTURES/ shards/\n  \
        m6 vqgan train configs/demo/vqgan.toml\n  \
        m6 train configs/demo/train.toml\n  \
        m6 generate --model out/demo/pretraining/transformer/model \"a red heart\" -o heart.png\n\n\
        `m6 COMMAND --help` explains a command."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make, summarise and look at shards of pictures and texts
    #[command(subcommand)]
    Data(data::Command),
    /// Make a text tokenizer, and use one
    #[command(subcommand)]
    Tokenizer(tokenizer::Command),
    /// Train and score an image tokenizer, which turns pictures into codes and back
    #[command(subcommand)]
    Vqgan(vqgan::Command),
    /// Tell what a model costs before it is trained: parameters, operations, memory
    Plan(plan::Args),
    /// Train a model on the tasks of its config
    Train(train::Args),
    /// Draw pictures from prompts in English or Chinese
    Generate(generate::Args),
    /// Write captions of pictures in English and Chinese
    Caption(caption::Args),
    /// Tell how likely a language model finds a text
    Score(score::Args),
    /// Turn a published language model into a folder of this program, or back
    Convert(convert::Args),
    /// Score a model on held-out pictures
    #[command(subcommand)]
    Eval(eval::Command),
    /// Pretrain a tiny model, draw and caption with the shipped one, and show it all on a page
    Demo(demo::Args),
}

/// Parses the command line and runs its command.
pub fn main() -> ExitCode {
    m6_runtime::device::keep_freed_memory();
    let command = Cli::parse().command;
    exit::run(move || command.run())
}

impl Command {
    fn run(self) -> Result<()> {
        match self {
            Self::Data(command) => command.run(),
            Self::Tokenizer(command) => command.run(),
            Self::Vqgan(command) => command.run(),
            Self::Plan(args) => args.run(),
            Self::Train(args) => args.run(),
            Self::Generate(args) => args.run(),
            Self::Caption(args) => args.run(),
            Self::Score(args) => args.run(),
            Self::Convert(args) => args.run(),
            Self::Eval(command) => command.run(),
            Self::Demo(args) => args.run(),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_valid() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_that_does_something_shows_an_example() {
        fn check(command: &clap::Command) {
            for sub in command.get_subcommands() {
                check(sub);
            }
            if !command.has_subcommands() {
                let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(help.contains("Example:\n  m6 "), "{}", command.get_name());
            }
        }
        check(&Cli::command());
    }
}
