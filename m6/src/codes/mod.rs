//! Codes of pictures for training, made ahead of it so that the image tokenizer is not in the loop.
//!
//! Several augmented views of each picture are encoded, so that a model still sees more than one rendering of it
//! (LlamaGen's ten-crop codes). They are kept in a table in the run folder ([`CodeTable`]) or in the shards themselves,
//! as a member of each sample ([`write_code_shards`]).

mod encode;
mod member;
mod shards;
mod table;

use m6_data::{Sample, ShardSet};
use rand::Rng;

pub use encode::Views;
pub use member::CodeMember;
pub use shards::{CodeShards, CodesReport, write_code_shards};
pub use table::{CodeTable, TableRecipe};

use crate::error::Result;

/// The codes of a source's pictures.
#[derive(Debug)]
pub enum Codes {
    /// Made before the first step.
    Table(CodeTable),
    /// Members of the samples.
    Member(CodeMember),
}

impl Codes {
    /// Whether sample `index` of `shards` has codes.
    pub fn has(&self, shards: &ShardSet, index: usize) -> bool {
        match self {
            Self::Table(table) => table.has(index),
            Self::Member(member) => shards.has(index, member.extension()),
        }
    }

    /// The codes of one view of `sample`, which is number `index`, row-major.
    ///
    /// # Errors
    /// Names the sample when it has none or damaged ones.
    pub fn draw(&self, sample: &Sample, index: usize, rng: &mut impl Rng) -> Result<Vec<u32>> {
        match self {
            Self::Table(table) => table.draw(sample, index, rng),
            Self::Member(member) => member.draw(sample, rng),
        }
    }
}
