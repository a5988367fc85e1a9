//! From shards to examples: sample, task, caption and crop are functions of the seed and the place in the run alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use m6_data::caption::{Caption, CaptionFields};
use m6_data::mixture::{Mixture, SourceShare};
use m6_data::order::{SampleOrder, sample_rng};
use m6_data::shard::{Sample, ShardSet};
use m6_data::tokenizer::Tokenizer;
use m6_data::transform::Transform;
use m6_data::{Flaw, FlawClass, SkipLimits};
use rand::Rng;
use serde::{Deserialize, Serialize};

use super::{Example, Task, TasksConfig, captioning, image_denoising, language_modelling, text_denoising};
use crate::codes::Codes;
use crate::error::{Error, Result};
use crate::model::{CodeOrder, Language, Model, Vocab};

/// Where examples come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataConfig {
    /// Threads that decode and tokenise.
    pub workers: usize,
    /// When samples or shards that cannot be used end the run.
    #[serde(default)]
    pub skip: SkipLimits,
    /// The sources by name, mixed by their weights.
    pub sources: BTreeMap<String, SourceConfig>,
}

/// A source of examples.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceConfig {
    /// Files, globs, urls, commands or brace lists.
    pub shards: Vec<String>,
    /// Its share of the examples, relative to the other sources'.
    #[serde(default = "one")]
    pub weight: f64,
    /// How often each of its samples is visited before it leaves the mixture; endless where absent.
    #[serde(default)]
    pub epochs: Option<u64>,
    /// Shares of the tasks in place of the run's.
    #[serde(default)]
    pub tasks: Option<TasksConfig>,
    /// Texts that the model learns to write about a picture.
    pub captions: CaptionFields,
    /// Texts that it learns to draw and to write without a picture; the captions where absent.
    #[serde(default)]
    pub prompts: Option<CaptionFields>,
    /// Augmentation of pictures that are seen as patches; needed by tasks that show the model pictures.
    #[serde(default)]
    pub transform: Option<Transform>,
    /// Augmentation of pictures that become codes before the first step, for text to image; where absent, codes are
    /// read from the samples, into which `m6 data codes` wrote them.
    #[serde(default)]
    pub code_transform: Option<Transform>,
    /// Views of each picture that `code_transform` makes.
    #[serde(default = "one_view")]
    pub code_views: usize,
}

fn one() -> f64 {
    1.0
}

fn one_view() -> usize {
    1
}

impl SourceConfig {
    /// The texts that are drawn, and written without a picture.
    pub fn prompts(&self) -> &CaptionFields {
        self.prompts.as_ref().unwrap_or(&self.captions)
    }

    /// What is wrong with these settings, in one line that begins with the key; `tasks` are the ones that it serves.
    ///
    /// # Errors
    /// When a key is missing that a task needs, or a value is out of its range.
    pub fn validate(&self, tasks: &TasksConfig) -> std::result::Result<(), String> {
        let needs = |key: &str, transform: &Option<Transform>, wanted: [Task; 2]| {
            let task = wanted.into_iter().find(|task| tasks.weight(*task) > 0.0);
            match (transform, task) {
                (None, Some(task)) => Err(format!("{key} is missing: expected one for {}", task.name())),
                _ => Ok(()),
            }
        };
        tasks.validate()?;
        needs("transform", &self.transform, [Task::Captioning, Task::ImageDenoising])?;
        if self.code_views == 0 {
            return Err("code_views = 0: expected 1 or more".into());
        }
        let fields = [Some(&self.captions), self.prompts.as_ref()];
        for field in fields.into_iter().flatten().flat_map(CaptionFields::fields) {
            if let Some(lang) = field.lang.as_deref().filter(|lang| !matches!(*lang, "zh" | "en")) {
                return Err(format!("captions or prompts: lang = \"{lang}\": expected zh or en"));
            }
        }
        Ok(())
    }
}

/// A source whose shards are open.
#[derive(Debug)]
pub struct OpenSource {
    /// Its name.
    pub name: String,
    /// Its settings.
    pub config: SourceConfig,
    /// The tasks that it serves.
    pub tasks: TasksConfig,
    /// Its samples.
    pub shards: Arc<ShardSet>,
    /// Their codes, for text to image.
    pub codes: Option<Codes>,
}

impl OpenSource {
    /// Whether sample `index` has what a task needs, by the members that it has.
    fn has_for(&self, index: usize, task: Task) -> bool {
        let Self { config, shards, codes, .. } = self;
        let has_text =
            |fields: &CaptionFields| fields.fields().iter().any(|field| shards.has(index, &field.member));
        match task {
            Task::TextDenoising | Task::LanguageModelling => has_text(config.prompts()),
            Task::Captioning | Task::ImageDenoising => {
                has_text(&config.captions) && shards.has_picture(index)
            }
            Task::TextToImage => {
                has_text(config.prompts()) && codes.as_ref().is_some_and(|codes| codes.has(shards, index))
            }
        }
    }
}

/// An example of an [`ExampleSource`].
#[derive(Debug)]
pub struct Drawn {
    /// The example.
    pub example: Example,
    /// Whether its text was cut to the longest that the model takes.
    pub is_cut: bool,
}

/// Builds examples by their place in the run; shared by the loader's threads.
pub struct ExampleSource {
    sources: Vec<Source>,
    mixture: Mixture,
    seed: u64,
    tokenizer: Tokenizer,
    model: ModelView,
}

/// An open source and the order of its samples.
struct Source {
    open: OpenSource,
    /// The samples that serve a task.
    useful: Vec<usize>,
    /// Damage of its shards, and the samples that serve none.
    flaws: Vec<Flaw>,
    order: SampleOrder,
}

impl Source {
    /// # Errors
    /// When no sample has what a task needs, or too many have not.
    fn new(open: OpenSource, seed: u64, limits: &SkipLimits) -> Result<Self> {
        let serves = |index: usize| open.tasks.served().any(|task| open.has_for(index, task));
        let tasks: Vec<&str> = open.tasks.served().map(Task::name).collect();
        let what = format!("the members that {} needs", tasks.join(" or "));
        let (useful, mut flaws) = open
            .shards
            .serving(serves, &what, limits)
            .map_err(|error| Error::Usage(format!("data.sources.{}: {error}", open.name)))?;
        flaws.splice(..0, open.shards.flaws().iter().cloned());
        Ok(Self { order: SampleOrder::new(useful.len(), seed)?, useful, flaws, open })
    }

    /// Which sample is visited.
    fn index(&self, visit: u64) -> usize {
        self.useful[self.order.index(visit)]
    }
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

impl ModelView {
    /// What examples need to know of `model`.
    pub fn of(model: &Model) -> Self {
        let config = &model.info.model;
        Self {
            vocab: model.info.vocab,
            max_text: config.max_text,
            resolution: model.resolution(),
            code_order: config.code_order,
        }
    }
}

impl ExampleSource {
    /// A mixture of `sources`.
    ///
    /// # Errors
    /// When a source is empty or cannot be mixed, its transform does not make pictures of the model's resolution, or more
    /// of its samples than `limits` allow lack what its tasks need.
    pub fn new(
        sources: Vec<OpenSource>,
        seed: u64,
        limits: &SkipLimits,
        tokenizer: Tokenizer,
        model: ModelView,
    ) -> Result<Self> {
        let side = model.resolution as u32;
        for OpenSource { name, config, .. } in &sources {
            let size = config.transform.as_ref().map(Transform::output_size);
            if size.is_some_and(|size| size != Some((side, side))) {
                let problem =
                    format!("data.sources.{name}.transform: its last crop must give {side} x {side} pixels");
                return Err(Error::Usage(problem));
            }
        }
        let sources =
            sources.into_iter().map(|open| Source::new(open, seed, limits)).collect::<Result<Vec<_>>>()?;
        let share = |source: &Source| SourceShare {
            name: source.open.name.clone(),
            weight: source.open.config.weight,
            samples: source.useful.len(),
            epochs: source.open.config.epochs,
        };
        let mixture = Mixture::new(&sources.iter().map(share).collect::<Vec<_>>(), seed)?;
        Ok(Self { sources, mixture, seed, tokenizer, model })
    }

    /// The example at `ordinal`, of a source and a task drawn by their shares.
    ///
    /// # Errors
    /// When the sample's picture is broken or it lacks a caption.
    pub fn example(&self, ordinal: u64) -> Result<Drawn> {
        let mut rng = sample_rng(self.seed, ordinal);
        let place = self.mixture.place(ordinal);
        let source = &self.sources[place.source];
        let index = source.index(place.visit);
        let task = source.open.tasks.draw(&mut rng, |task| source.open.has_for(index, task));
        // Of the samples that are visited each serves one.
        self.build(&source.open, index, task.unwrap_or(Task::LanguageModelling), &mut rng)
    }

    /// Whether the sample at `ordinal` has the members that a task needs.
    pub fn has_for(&self, ordinal: u64, task: Task) -> bool {
        let place = self.mixture.place(ordinal);
        let source = &self.sources[place.source];
        source.open.has_for(source.index(place.visit), task)
    }

    /// The example at `ordinal` as one of `task`.
    ///
    /// # Errors
    /// As for [`ExampleSource::example`].
    pub fn example_of(&self, ordinal: u64, task: Task) -> Result<Drawn> {
        let place = self.mixture.place(ordinal);
        let source = &self.sources[place.source];
        let index = source.index(place.visit);
        self.build(&source.open, index, task, &mut sample_rng(self.seed, ordinal))
    }

    /// What is known to be wrong with the sources before a sample is read.
    pub fn flaws(&self) -> impl Iterator<Item = &Flaw> {
        self.sources.iter().flat_map(|source| &source.flaws)
    }

    /// A fingerprint of the samples of each source and their order, by name.
    pub fn identities(&self) -> BTreeMap<String, String> {
        let identity = |source: &Source| (source.open.name.clone(), source.open.shards.identity());
        self.sources.iter().map(identity).collect()
    }

    /// A flaw of the sample at `ordinal`.
    pub fn flaw(&self, ordinal: u64, class: FlawClass, reason: String) -> Flaw {
        let place = self.mixture.place(ordinal);
        let source = &self.sources[place.source];
        source.open.shards.flaw(source.index(place.visit), class, reason)
    }

    /// How often each source was gone through in the examples before `ordinal`, by name.
    pub fn epochs(&self, ordinal: u64) -> impl Iterator<Item = (&str, f64)> {
        let visits = self.mixture.visits(ordinal);
        self.sources
            .iter()
            .zip(visits)
            .map(|(source, visits)| (source.open.name.as_str(), visits as f64 / source.useful.len() as f64))
    }

    fn build(&self, source: &OpenSource, index: usize, task: Task, rng: &mut impl Rng) -> Result<Drawn> {
        let OpenSource { config, tasks, shards, codes, .. } = source;
        let (vocab, captions, prompts) = (self.model.vocab, &config.captions, config.prompts());
        let sample = shards.sample(index)?;
        let picture = |rng: &mut _| match &config.transform {
            Some(transform) => Ok::<_, Error>(transform.load(&sample, rng)?),
            None => Err(sample.error(FlawClass::Unfit, "is of a source without a transform").into()),
        };
        let mut is_cut = false;
        let mut text = |fields, rng: &mut _| {
            let (language, mut ids) = self.text(&sample, fields, rng)?;
            // The target has room for its begin and end, too.
            let longest = self.model.max_text as usize - 1;
            is_cut |= ids.len() > longest;
            ids.truncate(longest);
            Ok::<_, Error>((language, ids))
        };
        let example = match task {
            Task::LanguageModelling => {
                let (language, ids) = text(prompts, rng)?;
                language_modelling::example(language, ids)
            }
            Task::TextDenoising => {
                let (language, ids) = text(prompts, rng)?;
                text_denoising::example(vocab, language, ids, rng)
            }
            Task::Captioning => {
                let (language, ids) = text(captions, rng)?;
                captioning::example(picture(rng)?, language, ids)
            }
            Task::ImageDenoising => {
                let (language, ids) = text(captions, rng)?;
                image_denoising::example(vocab, picture(rng)?, language, ids, rng)
            }
            Task::TextToImage => {
                let (_, prompt) = text(prompts, rng)?;
                let codes = codes.as_ref();
                let codes = codes.ok_or_else(|| sample.error(FlawClass::MissingMember, "has no codes"))?;
                let codes = codes.draw(&sample, index, rng)?;
                tasks.text_to_image.example(vocab, prompt, &codes, self.model.code_order, rng)
            }
        };
        Ok(Drawn { example, is_cut })
    }

    /// Samples of all sources that serve a task.
    pub fn samples(&self) -> usize {
        self.sources.iter().map(|source| source.useful.len()).sum()
    }

    /// A caption as ids.
    fn text(
        &self,
        sample: &Sample,
        fields: &CaptionFields,
        rng: &mut impl Rng,
    ) -> Result<(Language, Vec<i64>)> {
        let caption = fields
            .pick(sample, rng)?
            .ok_or_else(|| sample.error(FlawClass::Unfit, "all its captions are empty"))?;
        let ids: Vec<i64> = self.tokenizer.encode(&caption.text)?.into_iter().map(i64::from).collect();
        if ids.is_empty() {
            let reason = "its caption has no token in the vocabulary";
            return Err(sample.error(FlawClass::Unfit, reason).into());
        }
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
