//! `m6 train`.

use m6::Result;

use super::args::ConfigArgs;
use super::output;

/// Train a model on the tasks of its config; the same command again resumes an unfinished run
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  m6 train configs/demo/train.toml --set schedule.steps=200 --set run=out/short"
)]
pub struct Args {
    #[command(flatten)]
    config: ConfigArgs,
}

impl Args {
    pub fn run(self) -> Result<()> {
        let outcome = m6::train::run(&self.config.config, &self.config.overrides)?;
        match outcome.model {
            Some(model) => {
                output::line(format_args!("{}  model after {} steps", model.display(), outcome.step))
            }
            None => output::line(format_args!(
                "{}  stopped after {} steps; the same command resumes it",
                outcome.run.display(),
                outcome.step
            )),
        }
    }
}
