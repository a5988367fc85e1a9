//! What keeps a discriminator from growing too sure of itself where pictures are few.

use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

/// By how much the running averages of LeCam stay what they were at each batch.
const DECAY: f64 = 0.99;

/// LeCam regularisation (Tseng et al. 2021) as the authors' program has it: scores of real pictures are held below the
/// running average of the others' scores, and those of the others above that of the real ones.
#[derive(Debug)]
pub(super) struct LeCam {
    /// Decaying sums of the mean scores of real pictures, of the others, and of their weights, `[3]`.
    sums: Tensor,
}

impl LeCam {
    pub(super) fn new(params: &Params) -> Self {
        Self { sums: params.add("sums", &[3], Init::Zeros, Group::Buffer) }
    }

    /// The penalty, a scalar, for scores of any shape, which join the averages first.
    pub(super) fn penalty(&self, real: &Tensor, fake: &Tensor) -> Tensor {
        let averages = self.observe(real, fake);
        let excess = |gap: Tensor| gap.relu().square().mean(Kind::Float);
        excess(real - averages.get(1)) + excess(averages.get(0) - fake)
    }

    /// The averages after these scores, of real pictures and of the others, `[2]`. The early ones are not drawn to
    /// zero.
    fn observe(&self, real: &Tensor, fake: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        let (real, fake) = (real.mean(Kind::Float), fake.mean(Kind::Float));
        let weight = real.ones_like();
        let _ = self.sums.shallow_clone().lerp_(&Tensor::stack(&[real, fake, weight], 0), 1.0 - DECAY);
        self.sums.narrow(0, 0, 2) / self.sums.get(2)
    }
}

/// R1 (Mescheder et al. 2018), without its weight: the squared length of the gradient of each picture's score, averaged
/// over the pictures `real`; a scalar. `score` gives one score a picture, `[b]`, by operations that have second
/// derivatives.
pub(super) fn gradient_penalty(real: &Tensor, score: impl FnOnce(&Tensor) -> Tensor) -> Tensor {
    let real = real.detach().set_requires_grad(true);
    let total = score(&real).sum(Kind::Float);
    let gradient = &Tensor::run_backward(&[total], &[real], true, true)[0];
    gradient.square().flatten(1, -1).sum_dim_intlist(1, false, Kind::Float).mean(Kind::Float)
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::discriminator::{Discriminator, DiscriminatorNorm};

    #[test]
    fn lecam_matches_a_plain_computation() {
        let params = Params::new(Device::Cpu, 1);
        let lecam = LeCam::new(&params);
        let (mut sums, mut weight) = ([0.0; 2], 0.0);
        for step in 0..4 {
            let real = [0.5 + f64::from(step), 1.0, -0.25];
            let fake = [-1.0, 0.75 * f64::from(step)];
            let mean = |scores: &[f64]| scores.iter().sum::<f64>() / scores.len() as f64;
            sums = [0.99 * sums[0] + 0.01 * mean(&real), 0.99 * sums[1] + 0.01 * mean(&fake)];
            weight = 0.99 * weight + 0.01;
            let [average_real, average_fake] = sums.map(|sum| sum / weight);
            let expected = mean(&real.map(|score| (score - average_fake).max(0.0).powi(2)))
                + mean(&fake.map(|score| (average_real - score).max(0.0).powi(2)));
            let tensor = |scores: &[f64]| Tensor::from_slice(scores).to_kind(Kind::Float);
            let penalty = lecam.penalty(&tensor(&real), &tensor(&fake)).double_value(&[]);
            assert!((penalty - expected).abs() < 1e-5 * expected, "{penalty} {expected} at {step}");
        }
        assert_eq!(params.count(), 0, "the averages are not trained");
    }

    #[test]
    fn lecam_moves_scores_and_not_averages() {
        let lecam = LeCam::new(&Params::new(Device::Cpu, 1));
        let scores = |value: f32| Tensor::from_slice(&[value, value]).set_requires_grad(true);
        let (real, fake) = (scores(1.0), scores(-1.0));
        lecam.penalty(&real, &fake).backward();
        // Each of two scores is 2 from the other side's average: 2 * 2 / 2.
        assert_eq!(Vec::<f32>::try_from(real.grad()).unwrap(), [2.0, 2.0]);
        assert_eq!(Vec::<f32>::try_from(fake.grad()).unwrap(), [-2.0, -2.0]);
    }

    #[test]
    fn the_gradient_penalty_and_its_gradient_match_their_formulas() {
        let a = Tensor::from(1.5f32).set_requires_grad(true);
        let x = Tensor::arange(2 * 3 * 2 * 2, (Kind::Float, Device::Cpu)).view([2, 3, 2, 2]) * 0.1;
        let score = |x: &Tensor| (x.square() * &a).flatten(1, -1).sum_dim_intlist(1, false, Kind::Float);
        // The gradient of a score is 2 a x, so that the penalty is 4 a² |x|² over two pictures.
        let squares = (0..24).map(|i| (f64::from(i) * 0.1).powi(2)).sum::<f64>();
        let penalty = gradient_penalty(&x, score);
        assert!((penalty.double_value(&[]) - 2.0 * 2.25 * squares).abs() < 1e-3);
        penalty.backward();
        assert!((a.grad().double_value(&[]) - 4.0 * 1.5 * squares).abs() < 1e-3);
    }

    /// The discriminator by plain operations: statistics by means, singular values by decomposition.
    fn plain_scores(params: &Params, norm: DiscriminatorNorm, x: &Tensor) -> Tensor {
        let entries = params.entries();
        let get = |name: &str| &entries.iter().find(|(full, _)| full == name).unwrap().1.tensor;
        let conv = |x: &Tensor, name: &str, stride: i64| {
            let kernel = get(&format!("{name}.weight")).shallow_clone();
            let kernel = match norm {
                DiscriminatorNorm::Spectral => &kernel / kernel.flatten(1, -1).svd(true, true).1.max(),
                _ => kernel,
            };
            x.conv2d(&kernel, Some(get(&format!("{name}.bias"))), [stride, stride], [1, 1], [1, 1], 1)
        };
        let normed = |x: &Tensor| {
            let (rows, dims) = match norm {
                DiscriminatorNorm::Group => (x.view([x.size()[0], 32, -1]), [2].as_slice()),
                DiscriminatorNorm::Batch => (x.flatten(2, -1), [0, 2].as_slice()),
                DiscriminatorNorm::Spectral => return x.shallow_clone(),
            };
            let centred = &rows - rows.mean_dim(dims, true, Kind::Float);
            let variance = centred.square().mean_dim(dims, true, Kind::Float);
            (centred / (variance + 1e-5).sqrt()).view_as(x)
        };
        let leaky = |x: Tensor| x.maximum(&(&x * 0.2));
        let x = leaky(conv(x, "conv.0", 2));
        let x = leaky(normed(&conv(&x, "conv.1", 2)));
        let x = leaky(normed(&conv(&x, "conv.2", 1)));
        conv(&x, "verdict", 1).flatten(1, -1).mean_dim(1, false, Kind::Float)
    }

    /// The gradient of the penalty is made of second derivatives of the discriminator.
    #[test]
    fn discriminators_have_second_derivatives() {
        const SETTLED: usize = 300;
        for norm in [DiscriminatorNorm::Group, DiscriminatorNorm::Batch, DiscriminatorNorm::Spectral] {
            let params = Params::new(Device::Cpu, 1);
            let discriminator = Discriminator::new(&params, 2, norm);
            let x = Params::new(Device::Cpu, 2).add("x", &[2, 3, 32, 32], Init::Uniform(1.0), Group::Buffer);
            // Until the power iteration has come near its end.
            (0..SETTLED).for_each(|_| drop(discriminator.forward(&x)));
            let entries = params.trainable();
            let kernels: Vec<&Tensor> = entries
                .iter()
                .filter(|(name, _)| name.starts_with("conv") && name.ends_with("weight"))
                .map(|(_, param)| &param.tensor)
                .collect();
            let gradients = |penalty: Tensor| Tensor::run_backward(&[penalty], &kernels, false, false);
            let fast = gradients(gradient_penalty(&x, |x| discriminator.forward(x).scores()));
            let plain = gradients(gradient_penalty(&x, |x| plain_scores(&params, norm, x)));
            for (layer, (fast, plain)) in fast.iter().zip(&plain).enumerate() {
                let gap = ((fast - plain).norm() / plain.norm()).double_value(&[]);
                assert!(gap < 0.02, "{norm:?}, layer {layer}: {gap}");
            }
        }
    }
}
