//! Losses on held-out data, task by task, with the averaged weights.

use std::sync::Arc;

use m6_data::{ShardSet, Transform};
use m6_run::RunDir;
use tch::{Device, Kind, Tensor};

use super::config::{TrainConfig, ValidationConfig};
use super::loss::losses;
use crate::error::Result;
use crate::model::{Mode, Model};
use crate::objectives::{CodeRecipe, CodeTable, DataConfig, ExampleSource, ModelView, Packer, Skipped, Task};

/// Held-out examples.
pub(super) struct Validation {
    source: ExampleSource,
    tasks: Vec<Task>,
    examples: u64,
    tokens: usize,
}

impl Validation {
    /// Opens the validation shards with the training data's captions; pictures are not augmented.
    pub(super) fn open(
        config: &TrainConfig,
        settings: &ValidationConfig,
        run: &RunDir,
        model: &Model,
    ) -> Result<Self> {
        let shards = ShardSet::open(&settings.shards)?;
        let device = model.params.device();
        let code_transform = Transform::centered(model.vqgan.config().resolution as u32);
        let codes = if config.tasks.weight(Task::TextToImage) > 0.0 {
            let recipe = CodeRecipe {
                shards: &shards,
                transform: &code_transform,
                views: 1,
                seed: config.seed,
                workers: config.data.workers,
                patterns: &settings.shards,
            };
            Some(Arc::new(CodeTable::open_or_make(run.path(), &recipe, &model.vqgan, device)?))
        } else {
            None
        };
        let tasks: Vec<Task> =
            Task::ALL.into_iter().filter(|task| config.tasks.weight(*task) > 0.0).collect();
        let mut shares = config.tasks.clone();
        shares.text_to_image.drop_prompt = 0.0;
        shares.text_to_image.noise = 0.0;
        // Drawings are made row by row.
        shares.text_to_image.shuffled = 0.0;
        let view = ModelView {
            vocab: model.info.vocab,
            max_text: model.info.model.max_text,
            resolution: model.info.model.patches.resolution,
        };
        let data =
            DataConfig { transform: Transform::centered(view.resolution as u32), ..config.data.clone() };
        let tokenizer = model.tokenizer.clone();
        let source = ExampleSource::new(shards, config.seed, data, shares, tokenizer, codes, view)?;
        Ok(Self { source, tasks, examples: settings.examples, tokens: config.schedule.tokens })
    }

    /// Mean cross-entropy of each task's targets, in nats a token; samples that cannot be used are left out.
    pub(super) fn losses(&self, model: &Model, device: Device) -> Result<Vec<(Task, f64)>> {
        let _guard = tch::no_grad_guard();
        let mut skipped = Skipped::default();
        self.tasks.iter().map(|&task| Ok((task, self.loss_of(model, task, device, &mut skipped)?))).collect()
    }

    /// No number where there is no example.
    fn loss_of(&self, model: &Model, task: Task, device: Device, skipped: &mut Skipped) -> Result<f64> {
        let transformer = &model.transformer;
        let mut packer = Packer::new(transformer.vocab(), transformer.positions(), self.tokens);
        let mut sums = Tensor::zeros([2], (Kind::Float, device));
        let mut score = |packer: &mut Packer| -> Result<()> {
            let result = losses(transformer, &packer.finish(device)?, Mode::Infer)?;
            sums +=
                Tensor::stack(&[result.task_sums.get(task as i64), result.task_counts.get(task as i64)], 0);
            Ok(())
        };
        for ordinal in 0..self.examples {
            let mut left = skipped.check(self.source.example_of(ordinal, task))?;
            while let Some(example) = left.take() {
                left = packer.push(example);
                if left.is_some() {
                    score(&mut packer)?;
                }
            }
        }
        if !packer.is_empty() {
            score(&mut packer)?;
        }
        Ok(sums.double_value(&[0]) / sums.double_value(&[1]))
    }
}
