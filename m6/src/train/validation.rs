//! Losses on held-out data, task by task, with the averaged weights.

use std::sync::Arc;

use m6_data::{Item, RowPacker, ShardSet, Transform};
use m6_run::RunDir;
use tch::{Device, Kind, Tensor};

use super::config::{TrainConfig, ValidationConfig};
use super::loss::losses;
use crate::error::Result;
use crate::model::{Mode, Model};
use crate::objectives::{
    CodeRecipe, CodeTable, DataConfig, Example, ExampleSource, ModelView, Skipped, Task, lay_out,
};

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
        // Drawings are made in the model's own order.
        shares.text_to_image.shuffled = 0.0;
        let view = ModelView {
            vocab: model.info.vocab,
            max_text: model.info.model.max_text,
            resolution: model.info.model.patches.resolution,
            code_order: model.info.model.code_order,
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
        let (vocab, positions) = (transformer.vocab(), transformer.positions());
        let mut packer = RowPacker::new(self.tokens);
        let mut sums = Tensor::zeros([2], (Kind::Float, device));
        let mut score = |row: Vec<Item<Example>>| -> Result<()> {
            let row = row.into_iter().map(|item| item.value);
            let fill_to = device.is_cuda().then_some(self.tokens);
            let batch = lay_out(vocab, positions, row, fill_to)?.upload(device)?;
            let result = losses(transformer, &batch, Mode::Infer)?;
            sums +=
                Tensor::stack(&[result.task_sums.get(task as i64), result.task_counts.get(task as i64)], 0);
            Ok(())
        };
        for ordinal in 0..self.examples {
            let Some(value) = skipped.check(self.source.example_of(ordinal, task))? else { continue };
            let tokens = value.tokens(positions.patches());
            if let Some(row) = packer.push(Item { ordinal, tokens, value }) {
                score(row)?;
            }
        }
        while let Some(row) = packer.flush() {
            score(row)?;
        }
        Ok(sums.double_value(&[0]) / sums.double_value(&[1]))
    }
}
