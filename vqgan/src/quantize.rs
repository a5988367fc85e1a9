//! The quantiser: from the encoder's rows to codes and back.
//!
//! Legend: `n` positions of all pictures of a batch, `d` code width, `k` codes.

use m6_runtime::nn::Embedding;
use m6_runtime::{Group, Init, Params};
use tch::{Kind, Tensor};

use crate::config::{QuantizerKind, VqganConfig};

/// The codebook and how it is compared with the encoder's rows.
#[derive(Debug)]
pub(crate) struct Quantizer {
    kind: QuantizerKind,
    codes: Codes,
}

/// What is learnt, under the names of the project that a kind comes from.
#[derive(Debug)]
enum Codes {
    /// Each code is a row of its own.
    Rows(Embedding),
    /// Row `k` of a constant table `[k, d]` times a matrix `[d, d]`, which is stored `[out, in]`.
    Projected { frozen_kd: Tensor, weight: Tensor },
    /// Logits of the codes by a convolution of size 1, `[k, d, 1, 1]` and `[k]`, and a row for each code.
    Scored { weight: Tensor, bias: Tensor, rows: Embedding },
}

impl Codes {
    fn new(params: &Params, config: &VqganConfig) -> Self {
        let (size, width) = (config.codebook_size, config.code_dim);
        // Bound of PyTorch's linear layers and convolutions, and deviation of SimVQ's rows.
        let narrow = 1.0 / (width as f64).sqrt();
        match config.quantizer {
            // Replaced by encoder outputs before it is trained.
            QuantizerKind::Normalized | QuantizerKind::Nearest => {
                Self::Rows(Embedding::new(&(params / "embedding"), size, width, Init::Normal(1.0)))
            }
            QuantizerKind::SimVq => {
                let frozen = params / "embedding";
                // No decay: it would pull all codes to zero.
                let layer = params / "embedding_proj";
                Self::Projected {
                    frozen_kd: frozen.add("weight", &[size, width], Init::Normal(narrow), Group::Buffer),
                    weight: layer.add("weight", &[width, width], Init::Uniform(narrow), Group::NoDecay),
                }
            }
            QuantizerKind::Gumbel => {
                let projection = params / "proj";
                Self::Scored {
                    weight: projection.add(
                        "weight",
                        &[size, width, 1, 1],
                        Init::Uniform(narrow),
                        Group::Decay,
                    ),
                    bias: projection.add("bias", &[size], Init::Uniform(narrow), Group::NoDecay),
                    rows: Embedding::new(&(params / "embed"), size, width, Init::Normal(1.0)),
                }
            }
        }
    }
}

impl Quantizer {
    pub(crate) fn new(params: &Params, config: &VqganConfig) -> Self {
        Self { kind: config.quantizer, codes: Codes::new(params, config) }
    }

    /// The codes `[k, d]`, not normalised. Shares storage with what is trained where each code is a row of its own.
    pub(crate) fn codebook(&self) -> Tensor {
        match &self.codes {
            Codes::Rows(rows) | Codes::Scored { rows, .. } => rows.weight().shallow_clone(),
            Codes::Projected { frozen_kd, weight } => frozen_kd.matmul(&weight.tr()),
        }
    }

    /// The encoder's vectors `[.., d]` as they are compared with codes, float32.
    pub(crate) fn rows(&self, x: &Tensor) -> Tensor {
        self.kind.scale(x)
    }

    /// Codes at `codes` as the decoder gets them, float32 `[.., d]`.
    pub(crate) fn lookup(&self, codes: &Tensor) -> Tensor {
        self.kind.lookup(&self.codebook(), codes)
    }

    /// What the rows `rows_nd` of a pass, which [`Quantizer::rows`] made, are compared with.
    pub(crate) fn compare(&self, rows_nd: &Tensor) -> Compared {
        let logits_nk = match &self.codes {
            Codes::Scored { weight, bias, .. } => Some(rows_nd.linear(&weight.flatten(1, -1), Some(bias))),
            Codes::Rows(_) | Codes::Projected { .. } => None,
        };
        Compared { kind: self.kind, codebook_kd: self.codebook(), logits_nk }
    }

    /// The code of each of the rows `rows_nd` that [`Quantizer::rows`] made, int64 `[n]`. No gradient flows.
    pub(crate) fn choose(&self, rows_nd: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        self.compare(rows_nd).choose(rows_nd)
    }
}

/// Codebook and logits of one pass, with gradients.
#[derive(Debug)]
pub(crate) struct Compared {
    kind: QuantizerKind,
    /// Not normalised.
    codebook_kd: Tensor,
    /// Of the kind that has logits.
    logits_nk: Option<Tensor>,
}

impl Compared {
    /// The codes as they are compared with the encoder's rows and given to the decoder, float32 `[k, d]`.
    pub(crate) fn codes(&self) -> Tensor {
        self.kind.scale(&self.codebook_kd)
    }

    /// Codes at `codes` as the decoder gets them, float32 `[.., d]`.
    pub(crate) fn lookup(&self, codes: &Tensor) -> Tensor {
        self.kind.lookup(&self.codebook_kd, codes)
    }

    /// The code of each of the rows, int64 `[n]`. No gradient flows.
    pub(crate) fn choose(&self, rows_nd: &Tensor) -> Tensor {
        let _guard = tch::no_grad_guard();
        match &self.logits_nk {
            Some(logits_nk) => logits_nk.argmax(-1, false),
            None => self.kind.nearest(rows_nd, &self.codebook_kd).0,
        }
    }

    /// How well each code suits each of the rows, float32 `[n, k]`: its logit, or the negative squared distance but for the
    /// square of the row, which is the same for all codes.
    pub(crate) fn affinity(&self, rows_nd: &Tensor) -> Tensor {
        if let Some(logits_nk) = &self.logits_nk {
            return logits_nk.shallow_clone();
        }
        let codes_kd = self.codes();
        rows_nd.matmul(&codes_kd.tr()) * 2.0 - squares(&codes_kd)
    }
}

impl QuantizerKind {
    /// `x` in float32, since reduced precision would pick wrong codes; its last axis at the length that counts.
    pub(crate) fn scale(self, x: &Tensor) -> Tensor {
        match self {
            Self::Normalized => normalize(x),
            Self::Nearest | Self::SimVq | Self::Gumbel => x.to_kind(Kind::Float),
        }
    }

    /// Codes at `codes` as the decoder gets them, float32 `[.., d]`.
    fn lookup(self, codebook_kd: &Tensor, codes: &Tensor) -> Tensor {
        self.scale(&Tensor::embedding(codebook_kd, codes, -1, false, false))
    }

    /// For each row of `rows_nd` the index of the nearest code in `codebook_kd`, and a distance of the two that grows
    /// as the squared one does. No gradient flows.
    pub(crate) fn nearest(self, rows_nd: &Tensor, codebook_kd: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let codes_kd = self.scale(codebook_kd);
        let product_nk = rows_nd.matmul(&codes_kd.tr());
        if self == Self::Normalized {
            // Between unit vectors the smallest distance is the largest product.
            let (cosine_n, codes_n) = product_nk.max_dim(-1, false);
            return (codes_n, (1.0f64 - cosine_n).clamp_min(0.0));
        }
        let (rest_n, codes_n) = (squares(&codes_kd) - product_nk * 2.0).min_dim(-1, false);
        (codes_n, (squares(rows_nd) + rest_n).clamp_min(0.0))
    }
}

/// Squared length of each row.
pub(crate) fn squares(rows: &Tensor) -> Tensor {
    rows.square().sum_dim_intlist([-1].as_slice(), false, Kind::Float)
}

/// Float32 `x` with its last axis scaled to length one.
pub(crate) fn normalize(x: &Tensor) -> Tensor {
    /// Keeps a zero vector's gradient finite.
    const NORM_EPS: f64 = 1e-12;
    let x = x.to_kind(Kind::Float);
    &x / x.square().sum_dim_intlist([-1].as_slice(), true, Kind::Float).clamp_min(NORM_EPS).sqrt()
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::bottleneck::Passage;
    use crate::config::tests::tiny;

    fn setup() -> (Params, Quantizer, Tensor) {
        let params = Params::new(Device::Cpu, 1);
        let quantizer = Quantizer::new(&(&params / "quantize"), &tiny());
        let raw = params.add("raw", &[10, 8], Init::Normal(3.0), Group::Decay);
        (params, quantizer, raw)
    }

    #[test]
    fn the_code_is_the_nearest_by_euclidean_distance_of_unit_vectors() {
        let (_, quantizer, raw) = setup();
        let rows = normalize(&raw);
        let quantized = quantizer.quantize(&rows, Passage::StraightThrough);
        let distances = (rows.unsqueeze(1) - normalize(&quantizer.codebook()).unsqueeze(0)).square();
        let expected = distances.sum_dim_intlist([-1].as_slice(), false, Kind::Float).argmin(-1, false);
        assert_eq!(quantized.codes_n, expected);
        let lengths = quantized.rows_nd.square().sum_dim_intlist([-1].as_slice(), false, Kind::Float);
        assert!((lengths - 1.0).abs().max().double_value(&[]) < 1e-5);
    }

    #[test]
    fn nearest_codes_are_those_of_the_euclidean_distance_of_rows_as_they_are() {
        let params = Params::new(Device::Cpu, 1);
        let config = VqganConfig { quantizer: QuantizerKind::Nearest, ..tiny() };
        let quantizer = Quantizer::new(&params, &config);
        let rows = quantizer.rows(&params.add("raw", &[10, 8], Init::Normal(3.0), Group::Decay).detach());
        let distances = (rows.unsqueeze(1) - quantizer.codebook().unsqueeze(0)).square();
        let distances = distances.sum_dim_intlist([-1].as_slice(), false, Kind::Float);
        let (expected, codes) = distances.min_dim(-1, false);
        let (codes_n, distance_n) = QuantizerKind::Nearest.nearest(&rows, &quantizer.codebook());
        assert_eq!(codes_n, codes);
        assert!((distance_n - expected).abs().max().double_value(&[]) < 1e-4);
        let quantized = quantizer.quantize(&rows, Passage::StraightThrough);
        assert_eq!(quantized.rows_nd, quantizer.codebook().index_select(0, &codes));
        assert_ne!(codes, QuantizerKind::Normalized.nearest(&normalize(&rows), &quantizer.codebook()).0);
    }

    #[test]
    fn simvqs_codes_are_the_frozen_rows_times_the_matrix() {
        let params = Params::new(Device::Cpu, 1);
        let config = VqganConfig { quantizer: QuantizerKind::SimVq, ..tiny() };
        let quantizer = Quantizer::new(&params, &config);
        let tensor = |name: &str| params.entries().into_iter().find(|(n, _)| n == name).unwrap().1.tensor;
        let (frozen, matrix) = (tensor("embedding.weight"), tensor("embedding_proj.weight"));
        assert_eq!(params.trainable().len(), 1);
        let third = Tensor::from_slice(&[3i64]);
        let expected = (matrix * frozen.get(3)).sum_dim_intlist([-1].as_slice(), true, Kind::Float).tr();
        assert!((quantizer.lookup(&third) - &expected).abs().max().double_value(&[]) < 1e-6);
        let rows = Tensor::cat(&[expected, quantizer.codebook().get(5).unsqueeze(0)], 0).detach();
        assert_eq!(Vec::<i64>::try_from(quantizer.choose(&rows)).unwrap(), [3, 5]);
        // One row's distance to its code moves every code.
        let before = quantizer.codebook().detach();
        let quantized = quantizer.quantize(&(rows.get(0).unsqueeze(0) + 1.0), Passage::StraightThrough);
        quantized.codebook_loss(&(rows.get(0).unsqueeze(0) + 1.0)).backward();
        let _guard = tch::no_grad_guard();
        let mut weight = tensor("embedding_proj.weight");
        let moved = &weight - weight.grad();
        weight.copy_(&moved);
        assert!(
            (quantizer.codebook() - before).abs().amin([-1].as_slice(), false).min().double_value(&[]) > 0.0
        );
    }

    #[test]
    fn affinity_ranks_codes_as_their_distances_do() {
        for kind in [QuantizerKind::Normalized, QuantizerKind::Nearest, QuantizerKind::SimVq] {
            let params = Params::new(Device::Cpu, 1);
            let quantizer = Quantizer::new(&params, &VqganConfig { quantizer: kind, ..tiny() });
            let rows = quantizer.rows(&params.add("raw", &[10, 8], Init::Normal(3.0), Group::Buffer));
            let compared = quantizer.compare(&rows);
            let distances = (rows.unsqueeze(1) - compared.codes().unsqueeze(0)).square();
            let distances = distances.sum_dim_intlist([-1].as_slice(), false, Kind::Float);
            let gap = squares(&rows).unsqueeze(-1) - compared.affinity(&rows) - distances;
            assert!(gap.abs().max().double_value(&[]) < 1e-4, "{kind}: {gap}");
        }
    }
}
