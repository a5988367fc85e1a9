//! What lies between encoder and decoder in training: which way the gradient takes past the choice of codes, and the
//! losses that belong to the choice.
//!
//! Legend as in `quantize.rs`.

use tch::{Kind, Tensor};

use crate::quantize::{Compared, Quantizer, normalize, squares};

/// What lies between encoder and decoder.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Bottleneck {
    /// The encoder's rows as they are, for the first steps of training.
    Continuous,
    /// Codes.
    Codes(Passage),
}

/// How the gradient of what the decoder is given gets to the encoder's rows.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Passage {
    /// As it is (straight-through, Bengio et al. 2013).
    StraightThrough,
    /// Turned and scaled as the row is on its way to its code (the rotation trick, Fifty et al. 2024).
    Rotation,
    /// Through the weights of a draw of codes by their logits (Gumbel-softmax, Jang et al. 2016).
    Gumbel {
        /// The lower, the nearer are the weights to a single code.
        temperature: f64,
        /// Whether the decoder is given the code of the largest weight alone, with the gradient of all of them.
        hard: bool,
    },
}

/// Positions with their codes.
#[derive(Debug)]
pub struct Quantized {
    /// Rows of the codebook, float32 `[n, d]`.
    pub rows_nd: Tensor,
    /// Their indices, int64 `[n]`.
    pub codes_n: Tensor,
    /// What the decoder is given, float32 `[n, d]`: those rows, or the drawn ones, with a gradient to the encoder's.
    pub passed_nd: Tensor,
    /// What they were chosen by.
    pub(crate) compared: Compared,
}

impl Quantizer {
    /// Codes for `rows_nd` that [`Quantizer::rows`] made, with gradients.
    pub(crate) fn quantize(&self, rows_nd: &Tensor, passage: Passage) -> Quantized {
        let compared = self.compare(rows_nd);
        let codes_n = compared.choose(rows_nd);
        let codes_nd = compared.lookup(&codes_n);
        let passed_nd = match passage {
            Passage::StraightThrough => valued(rows_nd, &codes_nd),
            Passage::Rotation => valued(&rotated(rows_nd, &codes_nd), &codes_nd),
            Passage::Gumbel { temperature, hard } => {
                draw(&compared.affinity(rows_nd), temperature, hard).matmul(&compared.codes())
            }
        };
        Quantized { rows_nd: codes_nd, codes_n, passed_nd, compared }
    }
}

/// `value` with the gradient of `carrier`.
fn valued(carrier: &Tensor, value: &Tensor) -> Tensor {
    carrier + (value - carrier).detach()
}

/// `rows_nd` through the rotation, in the plane of the two, and the scaling that take each to its row of `codes_nd`.
/// Both are constants to the gradient.
fn rotated(rows_nd: &Tensor, codes_nd: &Tensor) -> Tensor {
    let (from_nd, to_nd) = (normalize(&rows_nd.detach()), normalize(&codes_nd.detach()));
    let between_nd = normalize(&(&from_nd + &to_nd));
    let along = |axis_nd: &Tensor| (rows_nd * axis_nd).sum_dim_intlist([-1].as_slice(), true, Kind::Float);
    let turned_nd = rows_nd - &between_nd * along(&between_nd) * 2.0 + &to_nd * along(&from_nd) * 2.0;
    turned_nd * (length(codes_nd) / length(rows_nd)).detach()
}

/// Length of each row, `[n, 1]`.
fn length(rows_nd: &Tensor) -> Tensor {
    /// Keeps the ratio of two lengths finite.
    const SHORTEST: f64 = 1e-6;
    squares(rows_nd).sqrt().clamp_min(SHORTEST).unsqueeze(-1)
}

/// Weights `[n, k]` of the codes in a draw by `logits_nk`.
fn draw(logits_nk: &Tensor, temperature: f64, hard: bool) -> Tensor {
    // The negative logarithm of an exponential variable is a Gumbel variable.
    let noise_nk = -logits_nk.detach().empty_like().exponential_(1.0).log();
    let weights_nk = ((logits_nk + noise_nk) / temperature).softmax(-1, Kind::Float);
    if !hard {
        return weights_nk;
    }
    let first = weights_nk.argmax(-1, true);
    valued(&weights_nk, &weights_nk.detach().zeros_like().scatter_value(-1, &first, 1.0))
}

impl Quantized {
    /// Mean squared distance that pulls the codes to the encoder's rows.
    pub fn codebook_loss(&self, rows_nd: &Tensor) -> Tensor {
        (&self.rows_nd - rows_nd.detach()).square().mean(Kind::Float)
    }

    /// Mean squared distance that pulls the encoder's rows to their codes (van den Oord et al. 2017; its weight is
    /// their beta).
    pub fn commitment_loss(&self, rows_nd: &Tensor) -> Tensor {
        (rows_nd - self.rows_nd.detach()).square().mean(Kind::Float)
    }
}

/// Mean divergence, in nats, of the codes' probabilities by `logits_nk` from equal ones (DALL-E, Ramesh et al. 2021).
pub(crate) fn divergence_from_uniform(logits_nk: &Tensor) -> Tensor {
    let codes = logits_nk.size()[1] as f64;
    codes.ln() - entropy(&logits_nk.log_softmax(-1, Kind::Float)).mean(Kind::Float)
}

/// Entropy, in nats, of the codes at a position, mean over positions, less that of the mean over positions: low where
/// each position is sure of its code and all codes are in use (MAGVIT-v2, Yu et al. 2023; LlamaGen). Probabilities are
/// the softmax of `affinity_nk / temperature`.
pub(crate) fn entropy_loss(affinity_nk: &Tensor, temperature: f64) -> Tensor {
    let positions = affinity_nk.size()[0] as f64;
    let log_nk = (affinity_nk / temperature).log_softmax(-1, Kind::Float);
    // In logarithms, or a code that nothing is near to has probability zero and no gradient that is a number.
    let log_mean_k = log_nk.logsumexp([0].as_slice(), false) - positions.ln();
    entropy(&log_nk).mean(Kind::Float) - entropy(&log_mean_k)
}

/// Entropy over the last axis of logarithms of probabilities.
fn entropy(log: &Tensor) -> Tensor {
    -(log.exp() * log).sum_dim_intlist([-1].as_slice(), false, Kind::Float)
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init, Params};
    use tch::Device;

    use super::*;
    use crate::config::tests::tiny;
    use crate::config::{QuantizerKind, VqganConfig};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn setup(kind: QuantizerKind) -> (Params, Quantizer, Tensor) {
        let params = Params::new(Device::Cpu, 1);
        let quantizer = Quantizer::new(&(&params / "quantize"), &VqganConfig { quantizer: kind, ..tiny() });
        let raw = params.add("raw", &[10, 8], Init::Normal(3.0), Group::Decay);
        (params, quantizer, raw)
    }

    fn largest(difference: Tensor) -> f64 {
        difference.abs().max().double_value(&[])
    }

    #[test]
    fn straight_through_gives_the_code_and_the_encoders_gradient() {
        let (_, quantizer, raw) = setup(QuantizerKind::Normalized);
        let rows = normalize(&raw).detach().set_requires_grad(true);
        let quantized = quantizer.quantize(&rows, Passage::StraightThrough);
        assert!(largest(&quantized.passed_nd - &quantized.rows_nd) < 1e-6);
        (quantized.passed_nd * 3.0).sum(Kind::Float).backward();
        assert_eq!(rows.grad(), rows.ones_like() * 3.0);
        assert!(!quantizer.codebook().grad().defined());
    }

    /// With the row e and the code q the gradient is, by the formula of the paper, `(|q| / |e|) R^T` times that of what
    /// the decoder is given, where `R = I - 2 r r^T + 2 q e^T` of unit vectors and r halves the angle between the two.
    #[test]
    fn the_rotation_carries_the_gradient_as_it_carries_the_row() {
        let (params, quantizer, raw) = setup(QuantizerKind::Nearest);
        let rows = raw.detach().set_requires_grad(true);
        let quantized = quantizer.quantize(&rows, Passage::Rotation);
        assert!(largest(&quantized.passed_nd - &quantized.rows_nd) < 1e-5);
        let incoming = params.add("incoming", &[10, 8], Init::Normal(1.0), Group::Buffer);
        (&quantized.passed_nd * &incoming).sum(Kind::Float).backward();
        assert!(!quantizer.codebook().grad().defined());
        for place in 0..10 {
            let (e, q) = (raw.get(place).detach(), quantized.rows_nd.get(place).detach());
            let unit = |x: &Tensor| x / x.norm();
            let column = |x: &Tensor| x.unsqueeze(1);
            let (from, to) = (column(&unit(&e)), column(&unit(&q)));
            let half = column(&unit(&(&from + &to).squeeze()));
            let rotation =
                Tensor::eye(8, FLOAT) - half.matmul(&half.tr()) * 2.0 + to.matmul(&from.tr()) * 2.0;
            let scaled: Tensor = rotation * (q.norm() / e.norm());
            assert!(largest(scaled.matmul(&column(&e)).squeeze() - &q) < 1e-5);
            let expected = scaled.tr().matmul(&column(&incoming.get(place))).squeeze();
            let gap = largest(rows.grad().get(place) - expected);
            assert!(gap < 1e-4, "{gap}");
        }
    }

    #[test]
    fn rows_that_cannot_be_turned_have_their_code_and_a_finite_gradient() {
        for row in [[0.0f32, 0.0], [-2.0, 0.0]] {
            let row = Tensor::from_slice(&row).view([1, 2]).set_requires_grad(true);
            let code = Tensor::from_slice(&[1.0f32, 0.0]).view([1, 2]);
            let passed = valued(&rotated(&row, &code), &code);
            assert_eq!(passed, code);
            passed.sum(Kind::Float).backward();
            assert!(row.grad().isfinite().all().int64_value(&[]) == 1);
        }
    }

    #[test]
    fn each_loss_moves_its_own_side_only() {
        for loss in [Quantized::codebook_loss, Quantized::commitment_loss] {
            let (_, quantizer, raw) = setup(QuantizerKind::Normalized);
            let rows = normalize(&raw);
            let quantized = quantizer.quantize(&rows, Passage::StraightThrough);
            let distance = (&quantized.rows_nd - &rows).square().mean(Kind::Float).double_value(&[]);
            let value = loss(&quantized, &rows);
            assert!((value.double_value(&[]) - distance).abs() < 1e-6);
            value.backward();
            assert_ne!(quantizer.codebook().grad().defined(), raw.grad().defined());
        }
    }

    #[test]
    fn draws_follow_the_logits_and_low_temperatures_give_one_code() {
        const DRAWS: i64 = 20_000;
        let shares = [0.6f32, 0.3, 0.1];
        let logits = Tensor::from_slice(&shares).log().expand([DRAWS, 3], false);
        let drawn = draw(&logits, 1.0, true);
        // One code each, as often as its probability says: the deviation of the mean is at most 0.0035.
        assert!(largest(drawn.sum_dim_intlist([-1].as_slice(), false, Kind::Float) - 1.0) < 1e-5);
        let gap = drawn.mean_dim([0].as_slice(), false, Kind::Float) - Tensor::from_slice(&shares);
        assert!(largest(gap) < 0.02);
        let soft = draw(&logits, 1.0, false);
        assert!(soft.max().double_value(&[]) < 1.0 && soft.min().double_value(&[]) > 0.0);
        let cold = draw(&logits, 1e-3, false).max_dim(-1, false).0.mean(Kind::Float).double_value(&[]);
        assert!(cold > 0.99, "{cold}");
    }

    #[test]
    fn gumbel_chooses_the_largest_logit_and_gradients_reach_projection_rows_and_codes() {
        for hard in [true, false] {
            let (params, quantizer, raw) = setup(QuantizerKind::Gumbel);
            let tensor = |name: &str| params.entries().into_iter().find(|(n, _)| n == name).unwrap().1.tensor;
            let (weight, bias) = (tensor("quantize.proj.weight"), tensor("quantize.proj.bias"));
            let logits = raw.view([10, 8, 1, 1]).conv2d(&weight, Some(&bias), [1, 1], [0, 0], [1, 1], 1);
            let expected = logits.flatten(1, -1).argmax(-1, false);
            let quantized = quantizer.quantize(&raw, Passage::Gumbel { temperature: 1.0, hard });
            assert_eq!(quantized.codes_n, expected);
            assert_eq!(quantized.rows_nd, tensor("quantize.embed.weight").index_select(0, &expected));
            let distances = quantized.passed_nd.unsqueeze(1) - tensor("quantize.embed.weight").unsqueeze(0);
            let nearest = distances
                .abs()
                .sum_dim_intlist([-1].as_slice(), false, Kind::Float)
                .amin([-1].as_slice(), false);
            assert_eq!(largest(nearest) < 1e-4, hard, "a hard draw gives a code, a soft one a mean of codes");
            quantized.passed_nd.square().sum(Kind::Float).backward();
            assert!(params.trainable().iter().all(|(_, p)| largest(p.tensor.grad()) > 0.0));
        }
    }

    #[test]
    fn the_divergence_is_that_of_its_formula() {
        let logits = Tensor::from_slice(&[0.0f32, 0.0, 0.0, 0.0]).view([2, 2]);
        assert!(divergence_from_uniform(&logits).double_value(&[]).abs() < 1e-6);
        // Probabilities 3/4 and 1/4 at one position, equal ones at the other.
        let logits = Tensor::from_slice(&[3f32.ln(), 0.0, 1.0, 1.0]).view([2, 2]);
        let expected = (0.75 * (0.75f64 * 2.0).ln() + 0.25 * (0.25f64 * 2.0).ln()) / 2.0;
        assert!((divergence_from_uniform(&logits).double_value(&[]) - expected).abs() < 1e-6);
    }

    /// Two codes a squared distance of 2 apart and two rows on them: at a temperature of 2, `p = 1 / (1 + 1 / e)` for
    /// the own one, and both codes are used alike.
    #[test]
    fn the_entropy_loss_of_two_codes_is_that_of_its_formula() {
        let codes = Tensor::eye(2, FLOAT);
        let affinity = |rows: &Tensor| rows.matmul(&codes) * 2.0 - 1.0;
        let binary = |p: f64| -(p * p.ln() + (1.0 - p) * (1.0 - p).ln());
        let p = 1.0 / (1.0 + (-1f64).exp());
        let value = |rows: &Tensor, temperature| entropy_loss(&affinity(rows), temperature).double_value(&[]);
        assert!((value(&codes, 2.0) - (binary(p) - 2f64.ln())).abs() < 1e-6);
        // Both rows on one code: what is sure at each position is sure of all, and nothing is gained.
        assert!(value(&codes.get(0).expand([2, 2], false), 2.0).abs() < 1e-6);
        // Far from the other code probabilities underflow.
        let rows = codes.shallow_clone().detach().set_requires_grad(true);
        let loss = entropy_loss(&affinity(&rows), 1e-4);
        assert!((loss.double_value(&[]) + 2f64.ln()).abs() < 1e-6);
        loss.backward();
        assert!(rows.grad().isfinite().all().int64_value(&[]) == 1);
    }
}
