//! The pretraining tasks: how a sample becomes a prefix that is seen whole and a target that is predicted.
//!
//! | task | prefix | target |
//! |---|---|---|
//! | text denoising | text with one span masked | the whole text |
//! | language modelling | nothing | text |
//! | captioning | patches | text |
//! | image-based denoising | patches, masked text | the whole text |
//! | text to image | text | begin of image, codes, end of image |
//!
//! The first four are M6's (section 3.3), the fifth its text-guided generation (section 4.1).

mod captioning;
mod image_denoising;
mod language_modelling;
mod packing;
mod source;
mod text_denoising;
mod text_to_image;

use m6_data::picture::Rgb8;
use rand::Rng;
use serde::{Deserialize, Serialize};

pub use packing::{Batch, HostBatch, Targets, lay_out};
pub use source::{DataConfig, Drawn, ExampleSource, ModelView, OpenSource, SourceConfig};
pub use text_to_image::{TextToImage, null_prompt};

use crate::model::{Language, Sequence, Special, Vocab};

/// A pretraining task.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Task {
    /// Restore a text of which one span is masked.
    TextDenoising,
    /// Continue a text from nothing.
    LanguageModelling,
    /// Write the caption of a picture.
    Captioning,
    /// Restore a caption of which one span is masked, with the picture in sight.
    ImageDenoising,
    /// Draw the picture of a caption.
    TextToImage,
}

impl Task {
    /// All tasks; the place of a task here is its number in metrics.
    pub const ALL: [Self; 5] = [
        Self::TextDenoising,
        Self::LanguageModelling,
        Self::Captioning,
        Self::ImageDenoising,
        Self::TextToImage,
    ];

    /// Name in configs and metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::TextDenoising => "text_denoising",
            Self::LanguageModelling => "language_modelling",
            Self::Captioning => "captioning",
            Self::ImageDenoising => "image_denoising",
            Self::TextToImage => "text_to_image",
        }
    }
}

/// Which tasks are trained, each with its share of the examples.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct TasksConfig {
    /// Share of text denoising.
    pub text_denoising: f64,
    /// Share of language modelling.
    pub language_modelling: f64,
    /// Share of captioning.
    pub captioning: f64,
    /// Share of image-based denoising.
    pub image_denoising: f64,
    /// Share and settings of text to image.
    pub text_to_image: TextToImage,
}

impl TasksConfig {
    /// The share of a task, relative to the others.
    pub fn weight(&self, task: Task) -> f64 {
        match task {
            Task::TextDenoising => self.text_denoising,
            Task::LanguageModelling => self.language_modelling,
            Task::Captioning => self.captioning,
            Task::ImageDenoising => self.image_denoising,
            Task::TextToImage => self.text_to_image.weight,
        }
    }

    /// The tasks with a share.
    pub(crate) fn served(&self) -> impl Iterator<Item = Task> {
        Task::ALL.into_iter().filter(|task| self.weight(*task) > 0.0)
    }

    /// One of the tasks that `can` be served, drawn by the shares; none where there is none.
    pub(crate) fn draw(&self, rng: &mut impl Rng, can: impl Fn(Task) -> bool) -> Option<Task> {
        let tasks: Vec<Task> = self.served().filter(|task| can(*task)).collect();
        let total: f64 = tasks.iter().map(|task| self.weight(*task)).sum();
        let mut draw = rng.random_range(0.0..total.max(f64::MIN_POSITIVE));
        let drawn = tasks.iter().find(|task| {
            draw -= self.weight(**task);
            draw < 0.0
        });
        drawn.or(tasks.last()).copied()
    }

    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When a share is negative, all are zero, or a probability is none.
    pub fn validate(&self) -> Result<(), String> {
        for task in Task::ALL {
            let weight = self.weight(task);
            if !(weight >= 0.0 && weight.is_finite()) {
                return Err(format!("tasks.{} = {weight}: expected a share of 0 or more", task.name()));
            }
        }
        if Task::ALL.iter().all(|task| self.weight(*task) == 0.0) {
            return Err("tasks: all shares are 0; expected at least one task".into());
        }
        self.text_to_image.validate()
    }
}

/// One part of a prefix.
#[derive(Debug, Clone)]
pub enum Piece {
    /// Text and special ids.
    Text(Vec<i64>),
    /// A picture, seen as patches.
    Picture(Rgb8),
}

impl Piece {
    /// Tokens of the piece in a row; `patches` is the number of patches of a picture.
    pub fn tokens(&self, patches: usize) -> usize {
        match self {
            Self::Text(ids) => ids.len(),
            Self::Picture(_) => patches,
        }
    }

    /// Appends its tokens, and its picture to the pictures of the row.
    pub fn append(self, sequence: &mut Sequence, pictures: &mut Vec<Rgb8>) {
        match self {
            Self::Text(ids) => sequence.prefix_text(&ids),
            Self::Picture(picture) => {
                sequence.patches();
                pictures.push(picture);
            }
        }
    }
}

/// What is predicted.
#[derive(Debug, Clone)]
pub enum Target {
    /// A text, begun by its language's token and ended by the end of text.
    Text {
        /// Language of the text.
        language: Language,
        /// Its ids.
        ids: Vec<i64>,
    },
    /// A picture's codes, begun and ended by the image's tokens.
    Codes {
        /// The codes as the model sees them, perhaps with noise.
        seen: Vec<u32>,
        /// The true codes.
        codes: Vec<u32>,
        /// The place of each of them in the picture, counted along its rows.
        places: Vec<i64>,
    },
}

/// One training example.
#[derive(Debug, Clone)]
pub struct Example {
    /// Its task.
    pub task: Task,
    /// Seen whole.
    pub prefix: Vec<Piece>,
    /// Predicted.
    pub target: Target,
}

impl Example {
    /// Tokens of the example in a row; `patches` is the number of patches of a picture.
    pub fn tokens(&self, patches: usize) -> usize {
        self.prefix.iter().map(|piece| piece.tokens(patches)).sum::<usize>() + self.target.tokens()
    }
}

impl Target {
    /// Predicted tokens, which are as many as the tokens put in.
    pub fn tokens(&self) -> usize {
        1 + match self {
            Self::Text { ids, .. } => ids.len(),
            Self::Codes { codes, .. } => codes.len(),
        }
    }

    /// Appends the tokens that go in.
    pub fn append(&self, sequence: &mut Sequence, vocab: Vocab) {
        match self {
            Self::Text { language, ids } => {
                sequence.target_text(&[vocab.special(language.start())], 0);
                sequence.target_text(ids, 1);
            }
            Self::Codes { seen, places, .. } => {
                sequence.begin_of_image(places.first().copied());
                let aims = places.iter().skip(1).copied().map(Some).chain([None]);
                for ((&code, &place), aim) in seen.iter().zip(places).zip(aims) {
                    sequence.code(code, place, aim);
                }
            }
        }
    }

    /// The label of each token that goes in: rows of the text head or of the code head.
    pub fn labels(&self, vocab: Vocab) -> Vec<i64> {
        match self {
            Self::Text { ids, .. } => {
                ids.iter().copied().chain([vocab.special(Special::EndOfText)]).collect()
            }
            Self::Codes { codes, .. } => {
                codes.iter().map(|&c| i64::from(c)).chain([vocab.end_of_image()]).collect()
            }
        }
    }
}
