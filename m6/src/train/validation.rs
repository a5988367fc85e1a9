//! Losses on held-out data, task by task, with the averaged weights.

use m6_data::{Flaw, Item, RowPacker, Skipped, Transform};
use tch::{Device, Kind, Tensor};

use super::config::{TrainConfig, ValidationConfig};
use super::feed::{check, measured};
use super::loss::losses;
use super::sources::Opening;
use crate::error::Result;
use crate::model::{Mode, Model};
use crate::objectives::{Drawn, ExampleSource, ModelView, SourceConfig, Task, lay_out};

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
        opening: &Opening,
        model: &Model,
    ) -> Result<Self> {
        let (name, source) = config.validated_source(settings)?;
        let mut shares = config.tasks_of(source).clone();
        shares.text_to_image.drop_prompt = 0.0;
        shares.text_to_image.noise = 0.0;
        // Drawings are made in the model's own order.
        shares.text_to_image.shuffled = 0.0;
        let tasks = shares.served().collect();
        let held_out = SourceConfig {
            shards: settings.shards.clone(),
            epochs: None,
            transform: Some(Transform::centered(model.resolution() as u32)),
            code_transform: Some(Transform::centered(model.vqgan.config().resolution as u32)),
            code_views: 1,
            ..source.clone()
        };
        let source = opening.open(name, held_out, shares, &model.vqgan)?;
        let source = ExampleSource::new(
            vec![source],
            config.seed,
            &config.data.skip,
            model.tokenizer.clone(),
            ModelView::of(model),
        )?;
        Ok(Self { source, tasks, examples: settings.examples, tokens: config.schedule.tokens })
    }

    /// What is known to be wrong with the shards.
    pub(super) fn flaws(&self) -> impl Iterator<Item = &Flaw> {
        self.source.flaws()
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
        let mut score = |row: Vec<Item<Drawn>>| -> Result<()> {
            let row = row.into_iter().map(|item| item.value.example);
            let fill_to = device.is_cuda().then_some(self.tokens);
            let batch = lay_out(vocab, positions, row, fill_to)?.upload(device)?;
            let result = losses(transformer, &batch, Mode::Infer)?;
            sums +=
                Tensor::stack(&[result.task_sums.get(task as i64), result.task_counts.get(task as i64)], 0);
            Ok(())
        };
        // An epoch without an example of the task is followed by none with one.
        let has_one = (0..self.source.samples() as u64).any(|ordinal| self.source.has_for(ordinal, task));
        let ordinals = (0..).filter(|&ordinal| self.source.has_for(ordinal, task));
        for ordinal in ordinals.take(if has_one { self.examples as usize } else { 0 }) {
            let drawn = self.source.example_of(ordinal, task);
            let made = drawn
                .and_then(|drawn| measured(&self.source, ordinal, drawn, positions.patches(), self.tokens));
            let Some(item) = check(skipped, made, None)? else { continue };
            if let Some(row) = packer.push(item) {
                score(row)?;
            }
        }
        while let Some(row) = packer.flush() {
            score(row)?;
        }
        Ok(sums.double_value(&[0]) / sums.double_value(&[1]))
    }
}
