//! Running sums between two reports, kept on the device and read back once.

use std::collections::BTreeMap;
use std::time::Instant;

use m6_runtime::RuntimeError;
use tch::{Device, Kind, Tensor};

use super::loss::Losses;
use crate::error::Result;
use crate::objectives::Task;

const TASKS: i64 = Task::ALL.len() as i64;

const LOSS: &str = "loss";
const TASK_SUMS: &str = "task_sums";
const TASK_COUNTS: &str = "task_counts";
const EXPERT_LOAD: &str = "expert_load";
const EXPERT_SPREAD: &str = "expert_spread";
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
    expert_spread: Option<Tensor>,
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
    /// For each block with experts, the rows that each expert was chosen for, as a multiple of an even share.
    pub expert_load: Vec<Vec<f64>>,
    /// Coefficient of variation of the experts' loads in a batch, mean over blocks and batches.
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
            expert_spread: None,
            expert_dropped: None,
            skipped_updates: zeros(&[]),
            batches: 0,
            tokens: 0,
            packed_tokens: 0,
            start: Instant::now(),
        }
    }

    /// Takes up a batch of this many tokens that are no padding.
    pub(super) fn add(&mut self, losses: &Losses, tokens: i64) {
        self.loss += losses.total.detach();
        self.task_sums += &losses.task_sums;
        self.task_counts += &losses.task_counts;
        if let Some(load) = &losses.expert_load {
            let (std, mean) = (
                load.std_dim([-1].as_slice(), false, true),
                load.mean_dim([-1].as_slice(), true, Kind::Float),
            );
            add_some(&mut self.expert_spread, Some(&(std / &mean).mean(Kind::Float)));
            add_some(&mut self.expert_load, Some(&(load / mean)));
        }
        add_some(&mut self.expert_dropped, losses.expert_dropped.as_ref());
        self.batches += 1;
        self.tokens += tokens as u64;
        self.packed_tokens += tokens as u64;
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
        for (name, sum) in [
            (EXPERT_LOAD, &self.expert_load),
            (EXPERT_SPREAD, &self.expert_spread),
            (EXPERT_DROPPED, &self.expert_dropped),
        ] {
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
        for (name, sum) in [
            (EXPERT_LOAD, &mut self.expert_load),
            (EXPERT_SPREAD, &mut self.expert_spread),
            (EXPERT_DROPPED, &mut self.expert_dropped),
        ] {
            *sum = state.remove(name).map(|sum| sum.to_device(device));
        }
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
        let of_all = [&self.loss, grad_norm, &self.skipped_updates, &self.task_sums, &self.task_counts];
        let of_experts = [&self.expert_spread, &self.expert_dropped, &self.expert_load];
        let parts: Vec<Tensor> =
            of_all.into_iter().chain(of_experts.into_iter().flatten()).map(|sum| sum.reshape([-1])).collect();
        let values = Tensor::cat(&parts, 0).to_device(Device::Cpu).to_kind(Kind::Double);
        let mut values = Vec::<f64>::try_from(values).map_err(RuntimeError::from)?.into_iter();
        let mut take = |sum: &Tensor| values.by_ref().take(sum.numel()).collect::<Vec<_>>();
        let [loss, grad_norm, skipped_updates, sums, counts] = of_all.map(&mut take);
        let [spread, dropped, load] = of_experts.map(|sum| sum.as_ref().map(&mut take).unwrap_or_default());
        let batches = self.batches.max(1) as f64;
        let mean = |sums: &[f64]| sums.first().map(|sum| sum / batches);
        let experts = self.expert_load.as_ref().map_or(1, |load| load.size()[1] as usize);
        let report = Report {
            loss: loss[0] / batches,
            grad_norm: grad_norm[0],
            skipped_updates: skipped_updates[0],
            tasks: Task::ALL
                .into_iter()
                .enumerate()
                .filter(|(i, _)| counts[*i] > 0.0)
                .map(|(i, task)| (task, sums[i] / counts[i]))
                .collect(),
            tokens: self.tokens,
            tokens_per_batch: self.packed_tokens as f64 / batches,
            seconds: self.start.elapsed().as_secs_f64(),
            expert_load: load
                .chunks(experts)
                .map(|loads| loads.iter().map(|sum| sum / batches).collect())
                .collect(),
            expert_spread: mean(&spread),
            expert_dropped: mean(&dropped),
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
        before.expert_dropped = Some(Tensor::from(0.6f32));
        let mut after = Window::new(Device::Cpu);
        after.load_state(before.state()).unwrap();
        after.add_update(&Tensor::from(f64::NAN));
        assert_eq!((after.batches, after.tokens), (3, 0));
        let report = after.read(&Tensor::from(1.0f32)).unwrap();
        assert_eq!((report.skipped_updates, report.tokens_per_batch), (3.0, 300.0));
        assert!(report.expert_spread.is_none() && report.expert_load.is_empty());
        assert!(report.expert_dropped.is_some_and(|share| (share - 0.2).abs() < 1e-6));
        assert_eq!(after.read(&Tensor::from(1.0f32)).unwrap().skipped_updates, 0.0);
    }

    #[test]
    fn spread_is_that_of_batches_and_load_that_of_the_window() {
        let mut window = Window::new(Device::Cpu);
        let zeros = || Tensor::zeros([TASKS], (Kind::Float, Device::Cpu));
        // Two blocks; the first sends all rows to one expert, and in the next batch to the other.
        for load in [[[1.0f32, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]] {
            let losses = Losses {
                total: Tensor::from(1.0f32),
                task_sums: zeros(),
                task_counts: zeros(),
                expert_load: Some(Tensor::from_slice2(&load)),
                expert_dropped: None,
            };
            window.add(&losses, 8);
        }
        let mut after = Window::new(Device::Cpu);
        after.load_state(window.state()).unwrap();
        let report = after.read(&Tensor::from(1.0f32)).unwrap();
        assert_eq!(report.expert_load, [[1.0, 1.0], [1.0, 1.0]]);
        // Loads of 2 and 0 deviate from 1 by 1, those of the other block by 0.
        assert_eq!((report.expert_spread, report.expert_dropped), (Some(0.5), None));
    }
}
