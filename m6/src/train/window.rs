//! Running sums between two reports, kept on the device and read back once.

use std::collections::BTreeMap;
use std::time::Instant;

use m6_runtime::RuntimeError;
use tch::{Device, Kind, Tensor};

use super::loss::Losses;
use crate::error::Result;
use crate::objectives::{Batch, Task};

const TASKS: i64 = Task::ALL.len() as i64;

const LOSS: &str = "loss";
const TASK_SUMS: &str = "task_sums";
const TASK_COUNTS: &str = "task_counts";
const EXPERT_LOAD: &str = "expert_load";
const EXPERT_DROPPED: &str = "expert_dropped";
const BATCHES: &str = "batches";
const PACKED_TOKENS: &str = "packed_tokens";
const SKIPPED_UPDATES: &str = "skipped_updates";

/// Sums since the last report.
pub(super) struct Window {
    device: Device,
    loss: Tensor,
    task_sums: Tensor,
    task_counts: Tensor,
    expert_load: Option<Tensor>,
    expert_dropped: Option<Tensor>,
    skipped_updates: Tensor,
    batches: u64,
    /// Of this process alone, as `start` is: a rate does not span an interruption.
    tokens: u64,
    /// Of all batches.
    packed_tokens: u64,
    start: Instant,
}

/// What a window came to.
pub(super) struct Report {
    /// Mean of the minimised loss.
    pub loss: f64,
    /// Mean cross-entropy of each task that had targets, in nats a token.
    pub tasks: Vec<(Task, f64)>,
    /// Norm of the last update's gradients before clipping.
    pub grad_norm: f64,
    /// Updates that were left out because their gradients were not finite.
    pub skipped_updates: f64,
    /// Tokens of this process that were not padding.
    pub tokens: u64,
    /// Mean of such tokens in a batch.
    pub tokens_per_batch: f64,
    /// Length of the window.
    pub seconds: f64,
    /// Coefficient of variation of the experts' loads, mean over blocks.
    pub expert_spread: Option<f64>,
    /// Share of the rows that full experts dropped, mean over blocks.
    pub expert_dropped: Option<f64>,
}

impl Window {
    pub(super) fn new(device: Device) -> Self {
        let zeros = |n: &[i64]| Tensor::zeros(n, (Kind::Float, device));
        Self {
            device,
            loss: zeros(&[]),
            task_sums: zeros(&[TASKS]),
            task_counts: zeros(&[TASKS]),
            expert_load: None,
            expert_dropped: None,
            skipped_updates: zeros(&[]),
            batches: 0,
            tokens: 0,
            packed_tokens: 0,
            start: Instant::now(),
        }
    }

    pub(super) fn add(&mut self, losses: &Losses, batch: &Batch) {
        self.loss += losses.total.detach();
        self.task_sums += &losses.task_sums;
        self.task_counts += &losses.task_counts;
        add_some(&mut self.expert_load, losses.expert_load.as_ref());
        add_some(&mut self.expert_dropped, losses.expert_dropped.as_ref());
        self.batches += 1;
        self.tokens += batch.real as u64;
        self.packed_tokens += batch.real as u64;
    }

    /// Counts the update whose gradients had this norm.
    pub(super) fn add_update(&mut self, grad_norm: &Tensor) {
        self.skipped_updates += grad_norm.isfinite().logical_not();
    }

    /// The sums by name, for a checkpoint.
    pub(super) fn state(&self) -> Vec<(String, Tensor)> {
        let mut state = vec![
            (LOSS.to_owned(), self.loss.shallow_clone()),
            (TASK_SUMS.to_owned(), self.task_sums.shallow_clone()),
            (TASK_COUNTS.to_owned(), self.task_counts.shallow_clone()),
            (SKIPPED_UPDATES.to_owned(), self.skipped_updates.shallow_clone()),
            (BATCHES.to_owned(), Tensor::from(self.batches as i64)),
            (PACKED_TOKENS.to_owned(), Tensor::from(self.packed_tokens as i64)),
        ];
        for (name, sum) in [(EXPERT_LOAD, &self.expert_load), (EXPERT_DROPPED, &self.expert_dropped)] {
            state.extend(sum.as_ref().map(|sum| (name.to_owned(), sum.shallow_clone())));
        }
        state
    }

    /// Takes sums from [`Window::state`].
    ///
    /// # Errors
    /// When one is missing.
    pub(super) fn load_state(
        &mut self,
        state: Vec<(String, Tensor)>,
    ) -> std::result::Result<(), RuntimeError> {
        let mut state: BTreeMap<String, Tensor> = state.into_iter().collect();
        let device = self.device;
        self.expert_load = state.remove(EXPERT_LOAD).map(|load| load.to_device(device));
        self.expert_dropped = state.remove(EXPERT_DROPPED).map(|dropped| dropped.to_device(device));
        let mut take = |name: &str| {
            state.remove(name).ok_or_else(|| RuntimeError::Torch(format!("window: `{name}` is missing")))
        };
        self.loss = take(LOSS)?.to_device(device);
        self.task_sums = take(TASK_SUMS)?.to_device(device);
        self.task_counts = take(TASK_COUNTS)?.to_device(device);
        self.skipped_updates = take(SKIPPED_UPDATES)?.to_device(device);
        let mut count = |name| Ok::<_, RuntimeError>(i64::try_from(take(name)?)? as u64);
        (self.batches, self.packed_tokens) = (count(BATCHES)?, count(PACKED_TOKENS)?);
        Ok(())
    }

    /// Reads everything in one copy and starts anew.
    pub(super) fn read(&mut self, grad_norm: &Tensor) -> Result<Report> {
        let spread = self.expert_load.as_ref().map(|load| {
            let load = load / self.batches as f64;
            (load.std_dim([-1].as_slice(), false, false) / load.mean_dim([-1].as_slice(), false, Kind::Float))
                .mean(Kind::Float)
        });
        let scalars = [&self.loss, grad_norm, &self.skipped_updates].map(|t| t.reshape([1]));
        let dropped = self.expert_dropped.as_ref().map(|sum| sum / self.batches as f64);
        let of_experts = [spread, dropped].map(|scalar| scalar.map(|t| t.reshape([1])));
        let parts: Vec<&Tensor> = scalars
            .iter()
            .chain([&self.task_sums, &self.task_counts])
            .chain(of_experts.iter().flatten())
            .collect();
        let values = Tensor::cat(&parts, 0).to_device(Device::Cpu).to_kind(Kind::Double);
        let values = Vec::<f64>::try_from(values).map_err(RuntimeError::from)?;
        let tasks = TASKS as usize;
        let (head, rest) = values.split_at(scalars.len());
        let (sums, rest) = rest.split_at(tasks);
        let (counts, rest) = rest.split_at(tasks);
        let mut rest = rest.iter().copied();
        let [expert_spread, expert_dropped] =
            of_experts.each_ref().map(|scalar| scalar.as_ref().and_then(|_| rest.next()));
        let report = Report {
            loss: head[0] / self.batches.max(1) as f64,
            grad_norm: head[1],
            skipped_updates: head[2],
            tasks: Task::ALL
                .into_iter()
                .enumerate()
                .filter(|(i, _)| counts[*i] > 0.0)
                .map(|(i, task)| (task, sums[i] / counts[i]))
                .collect(),
            tokens: self.tokens,
            tokens_per_batch: self.packed_tokens as f64 / self.batches.max(1) as f64,
            seconds: self.start.elapsed().as_secs_f64(),
            expert_spread,
            expert_dropped,
        };
        *self = Self::new(self.device);
        Ok(report)
    }
}

/// Adds to a sum that begins with the first of its parts.
fn add_some(sum: &mut Option<Tensor>, part: Option<&Tensor>) {
    let Some(part) = part.map(Tensor::detach) else { return };
    *sum = Some(sum.take().map_or_else(|| part.copy(), |sum| sum + &part));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skipped_updates_and_tokens_are_counted_across_a_checkpoint_and_the_rate_is_not() {
        let mut before = Window::new(Device::Cpu);
        for norm in [1.0, f64::NAN, f64::INFINITY] {
            before.add_update(&Tensor::from(norm));
        }
        (before.batches, before.tokens, before.packed_tokens) = (3, 700, 900);
        // Four blocks' experts are alike, and dropped a fifth of their rows.
        before.expert_load = Some(Tensor::full([4, 2], 1.5, (Kind::Float, Device::Cpu)));
        before.expert_dropped = Some(Tensor::from(0.6f32));
        let mut after = Window::new(Device::Cpu);
        after.load_state(before.state()).unwrap();
        after.add_update(&Tensor::from(f64::NAN));
        assert_eq!((after.batches, after.tokens), (3, 0));
        let report = after.read(&Tensor::from(1.0f32)).unwrap();
        assert_eq!((report.skipped_updates, report.tokens_per_batch), (3.0, 300.0));
        assert_eq!(report.expert_spread, Some(0.0));
        assert!(report.expert_dropped.is_some_and(|share| (share - 0.2).abs() < 1e-6));
        assert_eq!(after.read(&Tensor::from(1.0f32)).unwrap().skipped_updates, 0.0);
    }
}
