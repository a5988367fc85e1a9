//! From shards to examples: sample, task, caption and crop are functions of the seed and the place in the run alone.

use std::sync::Arc;

use m6_data::caption::{Caption, CaptionFields};
use m6_data::order::{SampleOrder, sample_rng};
use m6_data::picture::Rgb8;
use m6_data::shard::{Sample, ShardSet};
use m6_data::tokenizer::Tokenizer;
use m6_data::transform::Transform;
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{
    CodeTable, Example, Task, TasksConfig, captioning, image_denoising, language_modelling, text_denoising,
};
use crate::error::{Error, Result};
use crate::model::{CodeOrder, Language, Vocab};

/// Where examples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Files, globs, urls, commands or brace lists.
    pub shards: Vec<String>,
    /// Texts that the model learns to write about a picture.
    pub captions: CaptionFields,
    /// Texts that it learns to draw and to write without a picture; the captions where absent.
    #[serde(default)]
    pub prompts: Option<CaptionFields>,
    /// Augmentation of pictures that are seen as patches.
    pub transform: Transform,
    /// Augmentation of pictures that become codes.
    pub code_transform: Transform,
    /// Augmented views of each picture that are turned into codes before the first step.
    pub code_views: usize,
    /// Threads that decode and tokenise.
    pub workers: usize,
}

/// Builds examples by their place in the run; shared by the loader's threads.
pub struct ExampleSource {
    shards: ShardSet,
    order: SampleOrder,
    seed: u64,
    data: DataConfig,
    tasks: TasksConfig,
    tokenizer: Tokenizer,
    codes: Option<Arc<CodeTable>>,
    vocab: Vocab,
    max_text: usize,
    code_order: CodeOrder,
}

/// What an [`ExampleSource`] needs to know of the model.
#[derive(Debug, Clone, Copy)]
pub struct ModelView {
    /// Its vocabulary.
    pub vocab: Vocab,
    /// Its longest text.
    pub max_text: i64,
    /// Side of the pictures that it sees.
    pub resolution: i64,
    /// The order in which it draws.
    pub code_order: CodeOrder,
}

impl ExampleSource {
    /// A source over `shards`; text to image needs `codes`.
    ///
    /// # Errors
    /// When the data set is empty or the transform does not make pictures of the model's resolution.
    pub fn new(
        shards: ShardSet,
        seed: u64,
        data: DataConfig,
        tasks: TasksConfig,
        tokenizer: Tokenizer,
        codes: Option<Arc<CodeTable>>,
        model: ModelView,
    ) -> Result<Self> {
        tasks.validate().map_err(Error::Usage)?;
        let resolution = model.resolution as u32;
        if data.transform.output_size() != Some((resolution, resolution)) {
            let problem =
                format!("data.transform: its last crop must give {resolution} x {resolution} pixels");
            return Err(Error::Usage(problem));
        }
        let order = SampleOrder::new(shards.len(), seed)?;
        let (vocab, max_text) = (model.vocab, model.max_text as usize);
        let code_order = model.code_order;
        Ok(Self { shards, order, seed, data, tasks, tokenizer, codes, vocab, max_text, code_order })
    }

    /// The example at `ordinal`, of a task drawn by the shares.
    ///
    /// # Errors
    /// When the sample's picture is broken or it lacks a caption.
    pub fn example(&self, ordinal: u64) -> Result<Example> {
        let mut rng = sample_rng(self.seed, ordinal);
        let total: f64 = Task::ALL.iter().map(|t| self.tasks.weight(*t)).sum();
        let mut draw = rng.random_range(0.0..total);
        let mut task = Task::LanguageModelling;
        for candidate in Task::ALL.into_iter().filter(|t| self.tasks.weight(*t) > 0.0) {
            task = candidate;
            draw -= self.tasks.weight(candidate);
            if draw < 0.0 {
                break;
            }
        }
        self.build(ordinal, task, &mut rng)
    }

    /// The example at `ordinal` as one of `task`.
    ///
    /// # Errors
    /// As for [`ExampleSource::example`].
    pub fn example_of(&self, ordinal: u64, task: Task) -> Result<Example> {
        self.build(ordinal, task, &mut sample_rng(self.seed, ordinal))
    }

    fn build(&self, ordinal: u64, task: Task, rng: &mut impl Rng) -> Result<Example> {
        let index = self.order.index(ordinal);
        let sample = self.shards.sample(index)?;
        Ok(match task {
            Task::LanguageModelling => {
                let (language, ids) = self.text(&sample, self.prompts(), rng)?;
                language_modelling::example(language, ids)
            }
            Task::TextDenoising => {
                let (language, ids) = self.text(&sample, self.prompts(), rng)?;
                text_denoising::example(self.vocab, language, ids, rng)
            }
            Task::Captioning => {
                let (language, ids) = self.text(&sample, &self.data.captions, rng)?;
                captioning::example(self.picture(&sample, rng)?, language, ids)
            }
            Task::ImageDenoising => {
                let (language, ids) = self.text(&sample, &self.data.captions, rng)?;
                image_denoising::example(self.vocab, self.picture(&sample, rng)?, language, ids, rng)
            }
            Task::TextToImage => {
                let (_, prompt) = self.text(&sample, self.prompts(), rng)?;
                let codes = self.codes.as_ref().ok_or_else(|| sample.error("has no codes"))?;
                let view = rng.random_range(0..codes.views());
                let codes =
                    codes.view(index, view).ok_or_else(|| sample.error("its picture could not be read"))?;
                self.tasks.text_to_image.example(self.vocab, prompt, &codes, self.code_order, rng)
            }
        })
    }

    /// Samples of the data set.
    pub fn samples(&self) -> usize {
        self.shards.len()
    }

    fn prompts(&self) -> &CaptionFields {
        self.data.prompts.as_ref().unwrap_or(&self.data.captions)
    }

    fn picture(&self, sample: &Sample, rng: &mut impl Rng) -> Result<Rgb8> {
        Ok(self.data.transform.load(sample, rng)?)
    }

    /// A caption as ids, cut to what fits between a target's begin and end.
    fn text(
        &self,
        sample: &Sample,
        fields: &CaptionFields,
        rng: &mut impl Rng,
    ) -> Result<(Language, Vec<i64>)> {
        let caption = fields.pick(sample, rng)?.ok_or_else(|| sample.error("all its captions are empty"))?;
        let mut ids: Vec<i64> = self.tokenizer.encode(&caption.text)?.into_iter().map(i64::from).collect();
        if ids.is_empty() {
            return Err(sample.error("its caption has no token in the vocabulary").into());
        }
        ids.truncate(self.max_text - 1);
        Ok((language(&caption), ids))
    }
}

/// The language that the field states, else that of the script.
fn language(caption: &Caption) -> Language {
    match caption.lang.as_deref() {
        Some("zh") => Language::Zh,
        Some("en") => Language::En,
        _ => Language::of(&caption.text),
    }
}
