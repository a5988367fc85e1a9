//! Scores of a trained model on held-out shards: are its captions right, and do its pictures show what was asked for?

mod captions;
mod features;
mod names;
mod pictures;
mod reference;
mod retrieval;
mod samples;

pub use captions::{CaptionsReport, CaptionsRequest, captions};
pub use features::FeatureSpace;
pub use names::{ByLanguage, Judged, NameScores, is_same_name, token_f1};
pub use pictures::{PicturesReport, PicturesRequest, PromptReport, pictures};
pub use reference::SpaceReport;
pub use retrieval::{Memorisation, Ranks};
pub use samples::{EvalSample, open_shards};

pub(crate) use captions::judge;
