//! Tar shards to samples: pictures, texts and token ids, in an order that can be resumed exactly.
//!
//! ```no_run
//! use m6_data::{CaptionFields, Loader, SampleOrder, ShardSet, Transform, sample_rng};
//!
//! let shards = ShardSet::open(&["datasets/emoji/train-*.tar".to_owned()])?;
//! let captions: CaptionFields = serde_json::from_str(r#"[{"member": "json", "key": "zh", "lang": "zh"}]"#)?;
//! let transform: Transform = "resize:72 | random_crop:64 | flip:0.5".parse()?;
//! let (seed, order) = (1, SampleOrder::new(shards.len(), 1)?);
//!
//! // Eight samples ahead on two threads; the same pairs in the same order from any ordinal on.
//! let loader = Loader::start(0, 2, 8, move |ordinal| {
//!     let mut rng = sample_rng(seed, ordinal);
//!     let sample = shards.sample(order.index(ordinal))?;
//!     let picture = transform.load(&sample, &mut rng)?;
//!     Ok::<_, m6_data::DataError>((picture, captions.pick(&sample, &mut rng)?))
//! })?;
//! for item in loader.take(100) {
//!     let (ordinal, made) = item?;
//!     let (picture, caption) = made?;
//!     println!("{ordinal}: {}x{} {caption:?}", picture.width, picture.height);
//! }
//! # Ok::<_, Box<dyn std::error::Error>>(())
//! ```

mod atomic_file;
pub mod bench;
mod cache;
pub mod caption;
pub mod chat;
mod compressed;
pub mod error;
pub mod filter;
pub mod flaw;
pub mod index_file;
pub mod info;
mod key;
mod lines;
pub mod lint;
pub mod loader;
pub mod member;
pub mod mixture;
mod npy;
pub mod order;
pub mod pack;
pub mod packing;
mod pattern;
pub mod picture;
mod pipe;
#[cfg(feature = "remote")]
mod remote;
mod rule;
mod scan;
pub mod script;
pub mod shard;
pub mod sheet;
mod sink;
pub mod skipped;
mod source;
pub mod stats;
pub mod tar_index;
#[cfg(test)]
mod testing;
pub mod tokenizer;
pub mod transform;
mod words;
pub mod writer;

pub use bench::{BenchReport, bench};
pub use cache::bytes_of;
pub use caption::{Caption, CaptionField, CaptionFields};
pub use chat::{ChatTokens, Message, Role};
pub use error::{DataError, Result};
pub use filter::{Filter, LeftOut, Scorer};
pub use flaw::{Flaw, FlawClass};
pub use index_file::{IndexReport, write_indexes};
pub use info::{Broken, DatasetInfo};
pub use lint::{LintReport, lint};
pub use loader::Loader;
pub use member::{Array, Element};
pub use mixture::{Mixture, SourceShare};
pub use order::{SampleOrder, sample_rng};
pub use pack::{PackReport, files_in, pack, pictures_in};
pub use packing::{Item, RowPacker};
pub use picture::{Rgb8, grid};
pub use script::Script;
pub use shard::{Sample, ShardSet, sample_image, shard_names};
pub use sheet::contact_sheet;
pub use skipped::{SkipCounts, SkipLimits, SkipLog, Skipped};
pub use stats::DatasetStats;
pub use tokenizer::{Tokenizer, train_bpe};
pub use transform::Transform;
pub use writer::{ShardFile, ShardWriter};
