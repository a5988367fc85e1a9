//! Keeps the whole codebook in use: codes start from encoder outputs, and those that fall out of use start anew.
//!
//! Everything happens on the device, so a training step never waits for the host. Legend as in `quantize.rs`.

use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use crate::codebook::{CodebookConfig, CodebookStart};
use crate::config::{QuantizerKind, VqganConfig};

/// The running usage of every code.
#[derive(Debug)]
pub(crate) struct Revival {
    config: CodebookConfig,
    quantizer: QuantizerKind,
    /// Share of positions a code gets, 1 being an equal share; `[k]`.
    usage_k: Tensor,
}

impl Revival {
    /// All codes start with an equal share, which is also the grace that a revived code gets.
    pub(crate) fn new(params: &Params, model: &VqganConfig, config: CodebookConfig) -> Self {
        let usage_k = params.add("usage", &[model.codebook_size], Init::Ones, Group::Buffer);
        Self { config, quantizer: model.quantizer, usage_k }
    }

    /// Running usage `[k]`, 1 being an equal share.
    pub(crate) fn usage(&self) -> &Tensor {
        &self.usage_k
    }

    /// Which codes are dead, `[k]`.
    pub(crate) fn dead(&self) -> Tensor {
        self.usage_k.lt(self.config.threshold)
    }

    /// Takes the codes `codes_n` of a batch into the running usage.
    pub(crate) fn observe(&mut self, codes_n: &Tensor) {
        let share = counts(codes_n, self.usage_k.numel() as i64) * self.equal_share(codes_n);
        let kept = &self.usage_k * self.config.decay;
        self.usage_k.copy_(&(kept + share * (1.0 - self.config.decay)));
    }

    /// Gives each dead code the place of an encoder output of this batch, in all of `tables` (`[k, d]`: the codebook
    /// and its running average). Badly served outputs are likelier (the D² sampling of k-means++, Arthur and
    /// Vassilvitskii 2007), or a plain background would take every revived code. Returns which codes were dead, `[k]`.
    pub(crate) fn revive(&mut self, rows_nd: &Tensor, tables: &mut [Tensor]) -> Tensor {
        let _guard = tch::no_grad_guard();
        let dead = self.dead();
        replace(self.quantizer, &dead, rows_nd, tables);
        self.usage_k.copy_(&self.usage_k.ones_like().where_self(&dead, &self.usage_k));
        dead
    }

    fn equal_share(&self, codes_n: &Tensor) -> f64 {
        self.usage_k.numel() as f64 / codes_n.numel() as f64
    }
}

/// Makes the codebook, `tables`, from encoder outputs `rows_nd`: random rows, then a few rounds that move the codes
/// nothing chooses to badly served rows; then, where asked for, k-means.
pub(crate) fn initialise(
    quantizer: QuantizerKind,
    start: CodebookStart,
    rows_nd: &Tensor,
    tables: &mut [Tensor],
) {
    const ROUNDS: usize = 8;
    const KMEANS_ROUNDS: usize = 10;
    let _guard = tch::no_grad_guard();
    let size = tables[0].size()[0];
    let random = rows_nd.index_select(0, &draw(&rows_nd.select(1, 0).ones_like(), size));
    tables.iter_mut().for_each(|table| table.copy_(&random));
    for _ in 0..ROUNDS {
        let (codes_n, _) = quantizer.nearest(rows_nd, &tables[0]);
        replace(quantizer, &counts(&codes_n, size).eq(0.0), rows_nd, tables);
    }
    if start == CodebookStart::KMeans {
        (0..KMEANS_ROUNDS).for_each(|_| move_to_means(quantizer, rows_nd, tables));
    }
}

/// A round of k-means (Lloyd 1982): each code goes to the mean of the rows that choose it, and one that none chooses to
/// a badly served row.
fn move_to_means(quantizer: QuantizerKind, rows_nd: &Tensor, tables: &mut [Tensor]) {
    let size = tables[0].size()[0];
    let (codes_n, _) = quantizer.nearest(rows_nd, &tables[0]);
    let counts_k = counts(&codes_n, size);
    let means_kd = sums(rows_nd, &codes_n, size) / counts_k.clamp_min(1.0).unsqueeze(-1);
    tables.iter_mut().for_each(|table| table.copy_(&quantizer.scale(&means_kd)));
    replace(quantizer, &counts_k.eq(0.0), rows_nd, tables);
}

/// Overwrites the rows `which_k` of all `tables` by rows drawn from `rows_nd` by their squared distance to the
/// codebook, `tables[0]`.
fn replace(quantizer: QuantizerKind, which_k: &Tensor, rows_nd: &Tensor, tables: &mut [Tensor]) {
    let (_, distance_n) = quantizer.nearest(rows_nd, &tables[0]);
    // The first of the codes to replace takes the first row drawn, and so on.
    let turn_k = (which_k.cumsum(0, Kind::Int64) - 1).clamp_min(0);
    let drawn = draw(&distance_n, which_k.size()[0]).index_select(0, &turn_k);
    let drawn = rows_nd.index_select(0, &drawn);
    for table in tables {
        let replaced = drawn.where_self(&which_k.unsqueeze(-1), table);
        table.copy_(&replaced);
    }
}

/// How often each of `size` codes occurs in `codes_n`, float32 `[size]`.
pub(crate) fn counts(codes_n: &Tensor, size: i64) -> Tensor {
    let options = (Kind::Float, codes_n.device());
    // Unlike `bincount` this needs no look at the largest code, which would wait for the device.
    let mut counts = Tensor::zeros([size], options);
    counts.index_add_(0, codes_n, &Tensor::ones([codes_n.numel() as i64], options))
}

/// The sum of the rows of `rows_nd` that each of `size` codes has in `codes_n`, `[size, d]`.
pub(crate) fn sums(rows_nd: &Tensor, codes_n: &Tensor, size: i64) -> Tensor {
    let mut sums = Tensor::zeros([size, rows_nd.size()[1]], (Kind::Float, rows_nd.device()));
    sums.index_add_(0, codes_n, rows_nd)
}

/// `count` indices into `weights_n`, drawn one after the other without replacement in proportion to the weights
/// (Efraimidis and Spirakis 2006); where there are fewer weights than that, each is used again in turn.
fn draw(weights_n: &Tensor, count: i64) -> Tensor {
    /// Lets rows of weight zero be drawn when there are no others.
    const WEIGHT_FLOOR: f64 = 1e-12;
    let available = count.min(weights_n.size()[0]);
    let waiting_time = -weights_n.rand_like().clamp_min(f64::from(f32::MIN_POSITIVE)).log();
    let (_, indices) = ((weights_n + WEIGHT_FLOOR) / waiting_time).topk(available, 0, true, true);
    let turns = Tensor::arange(count, (Kind::Int64, weights_n.device())).remainder(available);
    indices.index_select(0, &turns)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::codebook::EncoderGradient;
    use crate::config::tests::tiny;
    use crate::quantize::normalize;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    const CONFIG: CodebookConfig = CodebookConfig {
        warmup: 0,
        decay: 0.5,
        threshold: 0.1,
        until: 1.0,
        start: CodebookStart::Rows,
        ema: None,
        gradient: EncoderGradient::StraightThrough,
    };

    const KINDS: [QuantizerKind; 2] = [QuantizerKind::Normalized, QuantizerKind::Nearest];

    fn revival(quantizer: QuantizerKind, codebook_size: i64) -> Revival {
        let model = VqganConfig { quantizer, codebook_size, ..tiny() };
        Revival::new(&Params::new(Device::Cpu, 1), &model, CONFIG)
    }

    /// `clusters` far apart, the first of them with nearly all rows.
    fn rows(clusters: i64) -> Tensor {
        let mut which = vec![0i64; 200];
        which.extend(1..clusters);
        Tensor::eye(clusters, FLOAT).index_select(0, &Tensor::from_slice(&which))
    }

    #[test]
    fn usage_is_relative_to_an_equal_share() {
        let mut revival = revival(QuantizerKind::Normalized, 4);
        revival.observe(&Tensor::from_slice(&[0i64, 0, 0, 1]));
        // Half of the start, half of the counts 3, 1, 0, 0 over an equal share of 1.
        assert_eq!(Vec::<f32>::try_from(revival.usage()).unwrap(), [2.0, 1.0, 0.5, 0.5]);
    }

    #[test]
    fn dead_codes_move_to_where_they_are_needed_and_the_living_stay() {
        for quantizer in KINDS {
            let mut revival = revival(quantizer, 6);
            let rows = rows(6);
            // Code 0 serves the large cluster; the others are far from everything.
            let mut tables = [-Tensor::ones([6, 6], FLOAT), -Tensor::ones([6, 6], FLOAT)];
            tables[0].get(0).copy_(&rows.get(0));
            let living = tables[0].get(0);
            for _ in 0..4 {
                revival.observe(&Tensor::zeros([100], (Kind::Int64, Device::Cpu)));
            }
            assert_eq!(revival.dead().sum(Kind::Int64).int64_value(&[]), 5);
            let revived = revival.revive(&rows, &mut tables);
            assert_eq!(Vec::<bool>::try_from(revived).unwrap(), [false, true, true, true, true, true]);
            assert_eq!(tables[0].get(0), living);
            let (_, distance) = quantizer.nearest(&rows, &tables[0]);
            assert!(distance.max().double_value(&[]) < 0.01, "every cluster has a code: {distance}");
            assert_eq!(tables[0].narrow(0, 1, 5), tables[1].narrow(0, 1, 5));
            assert_eq!(revival.dead().sum(Kind::Int64).int64_value(&[]), 0);
        }
    }

    #[test]
    fn the_first_codebook_covers_rare_rows_too() {
        for (quantizer, length) in [(QuantizerKind::Normalized, 1.0), (QuantizerKind::Nearest, 5.0)] {
            let rows = rows(8) * length;
            for start in [CodebookStart::Rows, CodebookStart::KMeans] {
                let mut tables = [Tensor::zeros([12, 8], FLOAT), Tensor::zeros([12, 8], FLOAT)];
                initialise(quantizer, start, &rows, &mut tables);
                let (_, distance) = quantizer.nearest(&rows, &tables[0]);
                assert!(distance.max().double_value(&[]) < 0.01, "{distance}");
                let gap = &tables[0] - normalize(&tables[0]) * length;
                assert!(gap.abs().max().double_value(&[]) < 1e-5);
                assert_eq!(tables[0], tables[1]);
            }
        }
    }

    /// Two clusters and a code in each: k-means puts it in the middle, where no row is.
    #[test]
    fn kmeans_ends_at_the_means() {
        let rows = Tensor::from_slice(&[1.0f32, 0.0, 1.0, 0.2, 1.0, 0.4, -3.0, 0.0, -2.8, 0.0]).view([5, 2]);
        let middle = |points: &[[f32; 2]]| {
            let points = Tensor::from_slice(&points.concat()).view([-1, 2]);
            points.mean_dim([0].as_slice(), false, Kind::Float)
        };
        for (quantizer, expected) in [
            (
                QuantizerKind::Nearest,
                [middle(&[[1.0, 0.0], [1.0, 0.2], [1.0, 0.4]]), middle(&[[-3.0, 0.0], [-2.8, 0.0]])],
            ),
            (
                QuantizerKind::Normalized,
                [
                    normalize(&normalize(&rows.narrow(0, 0, 3)).mean_dim([0].as_slice(), false, Kind::Float)),
                    Tensor::from_slice(&[-1.0f32, 0.0]),
                ],
            ),
        ] {
            let mut tables = [Tensor::zeros([2, 2], FLOAT)];
            initialise(quantizer, CodebookStart::KMeans, &quantizer.scale(&rows), &mut tables);
            let (_, distance) = quantizer.nearest(&Tensor::stack(&expected, 0), &tables[0]);
            assert!(distance.max().double_value(&[]) < 1e-6, "{quantizer}: {}", tables[0]);
        }
    }

    #[test]
    fn a_batch_smaller_than_the_codebook_is_used_in_turn() {
        let drawn = Vec::<i64>::try_from(draw(&Tensor::ones([3], FLOAT), 7)).unwrap();
        assert_eq!(drawn.len(), 7);
        assert_eq!(drawn[..3], drawn[3..6]);
        assert!((0..3).all(|index| drawn.contains(&index)));
    }
}
