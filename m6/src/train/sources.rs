//! Opens the sources of a run.

use std::path::Path;

use m6_data::ShardSet;
use m6_run::fetching;
use m6_vqgan::Vqgan;
use tch::Device;

use crate::error::Result;
use crate::objectives::{CodeRecipe, CodeTable, OpenSource, SourceConfig, Task, TasksConfig};

/// What sources are opened with, all of them alike.
pub(super) struct Opening<'a> {
    /// Folder that keeps the tables of codes.
    pub run: &'a Path,
    pub seed: u64,
    pub workers: usize,
    pub device: Device,
}

impl Opening<'_> {
    /// Opens a source; where it serves text to image, the codes of its pictures are read or made with `vqgan`.
    ///
    /// # Errors
    /// When shards cannot be read, or codes not be made.
    pub(super) fn open(
        &self,
        name: &str,
        config: SourceConfig,
        tasks: TasksConfig,
        vqgan: &Vqgan,
    ) -> Result<OpenSource> {
        let shards = ShardSet::open_with(&config.shards, fetching())?;
        for flaw in shards.flaws() {
            eprintln!("m6: {flaw}");
        }
        let codes = match &config.code_transform {
            Some(transform) if tasks.weight(Task::TextToImage) > 0.0 => {
                let recipe = CodeRecipe {
                    source: name,
                    shards: &shards,
                    transform,
                    views: config.code_views,
                    seed: self.seed,
                    workers: self.workers,
                    patterns: &config.shards,
                };
                Some(CodeTable::open_or_make(self.run, &recipe, vqgan, self.device)?)
            }
            _ => None,
        };
        Ok(OpenSource { name: name.to_owned(), config, tasks, shards, codes })
    }
}
