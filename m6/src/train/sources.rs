//! Opens the sources of a run.

use std::path::Path;
use std::sync::Arc;

use m6_data::{ShardSet, SkipLimits};
use m6_run::fetching;
use m6_vqgan::Vqgan;
use tch::Device;

use crate::codes::{CodeMember, CodeTable, Codes, TableRecipe, Views};
use crate::error::Result;
use crate::objectives::{OpenSource, SourceConfig, Task, TasksConfig};

/// What sources are opened with, all of them alike.
pub(super) struct Opening<'a> {
    /// Folder that keeps the tables of codes.
    pub run: &'a Path,
    pub seed: u64,
    pub workers: usize,
    pub skip: SkipLimits,
    pub device: Device,
}

impl Opening<'_> {
    /// Opens a source; where it serves text to image, the codes of its pictures are found or made with `vqgan`.
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
        let shards = Arc::new(ShardSet::open_with(&config.shards, self.skip, fetching())?);
        let codes = match &config.code_transform {
            _ if tasks.weight(Task::TextToImage) == 0.0 => None,
            Some(transform) => {
                let views = Views {
                    transform: transform.clone(),
                    count: config.code_views,
                    seed: self.seed,
                    workers: self.workers,
                    skip: self.skip,
                };
                let recipe = TableRecipe { source: name, shards: &shards, views };
                Some(Codes::Table(CodeTable::open_or_make(self.run, &recipe, vqgan, self.device)?))
            }
            None => {
                let member = CodeMember::of(vqgan)?;
                member.check(name, &shards)?;
                Some(Codes::Member(member))
            }
        };
        Ok(OpenSource { name: name.to_owned(), config, tasks, shards, codes })
    }
}
