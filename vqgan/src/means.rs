//! Codes that are running means of the encoder's rows (van den Oord et al. 2017, appendix A; VQ-VAE-2, Razavi et al.
//! 2019), in the place of a gradient.
//!
//! Legend as in `quantize.rs`.

use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use crate::config::QuantizerKind;
use crate::revive::{counts, sums};

/// What is added to every count before the division, 1 being an equal share (Laplace smoothing).
const SMOOTHING: f64 = 1e-5;

/// Running count and sum of the encoder's rows that each code was given. Both are relative to an equal share of an
/// update's positions, so that they do not depend on the size of a batch.
#[derive(Debug)]
pub(crate) struct RunningMeans {
    decay: f64,
    quantizer: QuantizerKind,
    /// 1 being an equal share; `[k]`.
    counts_k: Tensor,
    /// Of the rows, on the same scale; `[k, d]`.
    sums_kd: Tensor,
    /// Of the update under way.
    update: Option<Update>,
}

/// Counts and sums of the micro-batches of one update.
#[derive(Debug)]
struct Update {
    positions: i64,
    counts_k: Tensor,
    sums_kd: Tensor,
}

impl RunningMeans {
    /// Means that start at the codes of `table`, `[k, d]`, each as of an equal share.
    pub(crate) fn new(params: &Params, decay: f64, quantizer: QuantizerKind, table: &Tensor) -> Self {
        let counts_k = params.add("counts", &table.size()[..1], Init::Ones, Group::Buffer);
        let sums_kd = params.add("sums", &table.size(), Init::Zeros, Group::Buffer);
        let mut means = Self { decay, quantizer, counts_k, sums_kd, update: None };
        means.start(table);
        means
    }

    /// Lets all codes start anew from `table`.
    pub(crate) fn start(&mut self, table: &Tensor) {
        self.restart(&self.counts_k.ones_like().gt(0.0), table);
    }

    /// Lets the codes `which_k` start anew from where they are in `table`, as of an equal share.
    pub(crate) fn restart(&mut self, which_k: &Tensor, table: &Tensor) {
        let _guard = tch::no_grad_guard();
        let counts_k = self.counts_k.ones_like().where_self(which_k, &self.counts_k);
        let sums_kd = self.quantizer.scale(table).where_self(&which_k.unsqueeze(-1), &self.sums_kd);
        self.counts_k.copy_(&counts_k);
        self.sums_kd.copy_(&sums_kd);
    }

    /// Takes a micro-batch's rows `rows_nd` and their codes into the update under way.
    pub(crate) fn observe(&mut self, rows_nd: &Tensor, codes_n: &Tensor) {
        let _guard = tch::no_grad_guard();
        let size = self.counts_k.numel() as i64;
        let (positions, counts_k, sums_kd) =
            (codes_n.numel() as i64, counts(codes_n, size), sums(rows_nd, codes_n, size));
        self.update = Some(match self.update.take() {
            None => Update { positions, counts_k, sums_kd },
            Some(before) => Update {
                positions: positions + before.positions,
                counts_k: counts_k + before.counts_k,
                sums_kd: sums_kd + before.sums_kd,
            },
        });
    }

    /// Moves the means by the update and writes them into `table`, `[k, d]`. Nothing moves where nothing was observed, or
    /// where `is_taken`, a scalar on the device, is false.
    pub(crate) fn step(&mut self, table: &mut Tensor, is_taken: &Tensor) {
        let Some(update) = self.update.take() else { return };
        let _guard = tch::no_grad_guard();
        let size = self.counts_k.numel() as f64;
        let gain = (1.0 - self.decay) * size / update.positions as f64;
        let counts_k = &self.counts_k * self.decay + update.counts_k * gain;
        let sums_kd = &self.sums_kd * self.decay + update.sums_kd * gain;
        let total = counts_k.sum(Kind::Float);
        let smoothed_k = (&counts_k + SMOOTHING) / (&total + size * SMOOTHING) * &total;
        let means_kd = &sums_kd / smoothed_k.unsqueeze(-1);
        for (kept, moved) in [(table, means_kd), (&mut self.counts_k, counts_k), (&mut self.sums_kd, sums_kd)]
        {
            let chosen = moved.where_self(is_taken, kept);
            kept.copy_(&chosen);
        }
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    const DECAY: f64 = 0.75;

    fn table() -> Tensor {
        Tensor::from_slice(&[1.0f32, 0.0, 0.0, 2.0]).view([2, 2])
    }

    fn means(params: &Params) -> RunningMeans {
        RunningMeans::new(params, DECAY, QuantizerKind::Nearest, &table())
    }

    fn taken() -> Tensor {
        Tensor::from(true)
    }

    fn close(tensor: &Tensor, expected: &[f64]) {
        let found = Vec::<f64>::try_from(tensor.to_kind(Kind::Double).flatten(0, -1)).unwrap();
        let gap = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(found.len() == expected.len() && gap < 1e-5, "{found:?}, expected {expected:?}");
    }

    fn rows(values: &[f32]) -> Tensor {
        Tensor::from_slice(values).view([-1, 2])
    }

    #[test]
    fn two_updates_are_those_by_hand() {
        let params = Params::new(Device::Cpu, 1);
        let (mut means, mut table) = (means(&params), table());
        // Four positions, three of code 0, so that shares are 1.5 and 0.5.
        let first = rows(&[1.0, 1.0, 3.0, 1.0, 2.0, 4.0, 0.0, 6.0]);
        means.observe(&first, &Tensor::from_slice(&[0i64, 0, 0, 1]));
        means.step(&mut table, &taken());
        let counts = [0.75 + 0.25 * 1.5, 0.75 + 0.25 * 0.5];
        // Sums of the rows are (6, 6) and (0, 6), halved because an equal share is two positions.
        let sums = [0.75 + 0.25 * 3.0, 0.25 * 3.0, 0.0, 0.75 * 2.0 + 0.25 * 3.0];
        close(&means.counts_k, &counts);
        close(&means.sums_kd, &sums);
        let smoothed = counts.map(|count| (count + SMOOTHING) / (2.0 + 2.0 * SMOOTHING) * 2.0);
        let divided = |sums: [f64; 4], counts: [f64; 2]| {
            [sums[0] / counts[0], sums[1] / counts[0], sums[2] / counts[1], sums[3] / counts[1]]
        };
        close(&table, &divided(sums, smoothed));

        // Both positions of code 1: code 0 keeps its place, up to the smoothing, while its count falls.
        let before = table.copy();
        means.observe(&rows(&[1.0, 1.0, 3.0, 3.0]), &Tensor::from_slice(&[1i64, 1]));
        means.step(&mut table, &taken());
        let counts = [0.75 * counts[0], 0.75 * counts[1] + 0.25 * 2.0];
        let sums = [0.75 * sums[0], 0.75 * sums[1], 0.25 * 4.0, 0.75 * sums[3] + 0.25 * 4.0];
        close(&means.counts_k, &counts);
        close(&means.sums_kd, &sums);
        close(&table, &divided(sums, counts));
        assert!((table.get(0) - before.get(0)).abs().max().double_value(&[]) < 1e-4);
    }

    #[test]
    fn an_update_is_the_same_in_one_batch_and_in_parts() {
        let (whole, parts) = (Params::new(Device::Cpu, 1), Params::new(Device::Cpu, 1));
        let (mut whole, mut parts) = (means(&whole), means(&parts));
        let (rows, codes) = (rows(&[1.0, 1.0, 3.0, 1.0, 2.0, 4.0]), Tensor::from_slice(&[0i64, 1, 0]));
        let mut tables = [table(), table()];
        whole.observe(&rows, &codes);
        whole.step(&mut tables[0], &taken());
        for (start, length) in [(0, 1), (1, 2)] {
            parts.observe(&rows.narrow(0, start, length), &codes.narrow(0, start, length));
        }
        parts.step(&mut tables[1], &taken());
        assert_eq!((&tables[0], &whole.counts_k), (&tables[1], &parts.counts_k));
        let [mut table, other] = tables;
        parts.step(&mut table, &taken());
        assert_eq!(table, other, "nothing was observed since");
    }

    #[test]
    fn an_update_that_is_not_taken_leaves_no_trace() {
        let params = Params::new(Device::Cpu, 1);
        let (mut means, mut found) = (means(&params), table());
        means.observe(&rows(&[f32::NAN, 5.0]), &Tensor::from_slice(&[0i64]));
        means.step(&mut found, &Tensor::from(false));
        assert_eq!(found, table());
        close(&means.counts_k, &[1.0, 1.0]);
        close(&means.sums_kd, &[1.0, 0.0, 0.0, 2.0]);
    }

    #[test]
    fn a_code_that_starts_anew_forgets_its_rows() {
        let params = Params::new(Device::Cpu, 1);
        let (mut means, mut table) = (means(&params), table());
        means.observe(&rows(&[5.0, 5.0]), &Tensor::from_slice(&[0i64]));
        means.step(&mut table, &taken());
        table.get(0).copy_(&Tensor::from_slice(&[-7.0f32, 1.0]));
        let kept = (means.counts_k.get(1), means.sums_kd.get(1));
        means.restart(&Tensor::from_slice(&[true, false]), &table);
        close(&means.counts_k.get(0), &[1.0]);
        close(&means.sums_kd.get(0), &[-7.0, 1.0]);
        assert_eq!((means.counts_k.get(1), means.sums_kd.get(1)), kept);
    }
}
