//! The quantiser: from the encoder's rows to codes and back.
//!
//! Legend: `n` positions of all pictures of a batch, `d` code width, `k` codes.

use m6_runtime::nn::Embedding;
use m6_runtime::{Init, Params};
use tch::{Kind, Tensor};

use crate::config::{QuantizerKind, VqganConfig};

/// The codebook and how it is compared with the encoder's rows.
#[derive(Debug)]
pub(crate) struct Quantizer {
    kind: QuantizerKind,
    embedding: Embedding,
}

/// Positions with their codes.
#[derive(Debug)]
pub struct Quantized {
    /// Rows of the codebook, float32 `[n, d]`.
    pub rows_nd: Tensor,
    /// Their indices, int64 `[n]`.
    pub codes_n: Tensor,
}

impl Quantizer {
    pub(crate) fn new(params: &Params, config: &VqganConfig) -> Self {
        let embedding = Embedding::new(
            &(params / "embedding"),
            config.codebook_size,
            config.code_dim,
            // Replaced by encoder outputs before it is trained.
            Init::Normal(1.0),
        );
        Self { kind: config.quantizer, embedding }
    }

    /// The table `[k, d]` as it is stored, not normalised.
    pub(crate) fn codebook(&self) -> &Tensor {
        self.embedding.weight()
    }

    /// The encoder's vectors `[.., d]` as they are compared with codes, float32.
    pub(crate) fn rows(&self, x: &Tensor) -> Tensor {
        self.kind.scale(x)
    }

    /// Codes at `codes` as the decoder gets them, float32 `[.., d]`.
    pub(crate) fn lookup(&self, codes: &Tensor) -> Tensor {
        self.kind.scale(&self.embedding.forward(codes))
    }

    /// The nearest code of each of the rows `rows_nd` that [`Quantizer::rows`] made.
    pub(crate) fn quantize(&self, rows_nd: &Tensor) -> Quantized {
        let (codes_n, _) = self.kind.nearest(rows_nd, self.codebook());
        Quantized { rows_nd: self.lookup(&codes_n), codes_n }
    }
}

impl QuantizerKind {
    /// `x` in float32, since reduced precision would pick wrong codes; its last axis at the length that counts.
    pub(crate) fn scale(self, x: &Tensor) -> Tensor {
        match self {
            Self::Normalized => normalize(x),
            Self::Nearest => x.to_kind(Kind::Float),
        }
    }

    /// For each row of `rows_nd` the index of the nearest code in `codebook_kd`, and a distance of the two that grows
    /// as the squared one does. No gradient flows.
    pub(crate) fn nearest(self, rows_nd: &Tensor, codebook_kd: &Tensor) -> (Tensor, Tensor) {
        let _guard = tch::no_grad_guard();
        let codes_kd = self.scale(codebook_kd);
        let product_nk = rows_nd.matmul(&codes_kd.tr());
        match self {
            // Between unit vectors the smallest distance is the largest product.
            Self::Normalized => {
                let (cosine_n, codes_n) = product_nk.max_dim(-1, false);
                (codes_n, (1.0f64 - cosine_n).clamp_min(0.0))
            }
            Self::Nearest => {
                let (rest_n, codes_n) = (squares(&codes_kd) - product_nk * 2.0).min_dim(-1, false);
                (codes_n, (squares(rows_nd) + rest_n).clamp_min(0.0))
            }
        }
    }
}

/// Squared length of each row.
fn squares(rows: &Tensor) -> Tensor {
    rows.square().sum_dim_intlist([-1].as_slice(), false, Kind::Float)
}

/// Float32 `x` with its last axis scaled to length one.
pub(crate) fn normalize(x: &Tensor) -> Tensor {
    /// Keeps a zero vector's gradient finite.
    const NORM_EPS: f64 = 1e-12;
    let x = x.to_kind(Kind::Float);
    &x / x.square().sum_dim_intlist([-1].as_slice(), true, Kind::Float).clamp_min(NORM_EPS).sqrt()
}

impl Quantized {
    /// The codes' rows with the gradient of `rows_nd`, the encoder's (straight-through, Bengio et al. 2013).
    pub(crate) fn straight_through(&self, rows_nd: &Tensor) -> Tensor {
        rows_nd + (&self.rows_nd - rows_nd).detach()
    }

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

#[cfg(test)]
mod tests {
    use m6_runtime::Group;
    use tch::Device;

    use super::*;
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
        let quantized = quantizer.quantize(&rows);
        let distances = (rows.unsqueeze(1) - normalize(quantizer.codebook()).unsqueeze(0)).square();
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
        let (codes_n, distance_n) = QuantizerKind::Nearest.nearest(&rows, quantizer.codebook());
        assert_eq!(codes_n, codes);
        assert!((distance_n - expected).abs().max().double_value(&[]) < 1e-4);
        let quantized = quantizer.quantize(&rows);
        assert_eq!(quantized.rows_nd, quantizer.codebook().index_select(0, &codes));
        assert_ne!(codes, QuantizerKind::Normalized.nearest(&normalize(&rows), quantizer.codebook()).0);
    }

    #[test]
    fn straight_through_gives_the_code_and_the_encoders_gradient() {
        let (_, quantizer, raw) = setup();
        let rows = raw.detach().set_requires_grad(true);
        let quantized = quantizer.quantize(&normalize(&rows));
        let through = quantized.straight_through(&rows);
        assert!((&through - &quantized.rows_nd).abs().max().double_value(&[]) < 1e-6);
        (through * 3.0).sum(Kind::Float).backward();
        assert_eq!(rows.grad(), rows.ones_like() * 3.0);
        assert!(!quantizer.codebook().grad().defined());
    }

    #[test]
    fn each_loss_moves_its_own_side_only() {
        let (_, quantizer, raw) = setup();
        let rows = normalize(&raw);
        let quantized = quantizer.quantize(&rows);
        quantized.codebook_loss(&rows).backward();
        assert!(quantizer.codebook().grad().defined() && !raw.grad().defined());
        let (_, quantizer, raw) = setup();
        let rows = normalize(&raw);
        let quantized = quantizer.quantize(&rows);
        quantized.commitment_loss(&rows).backward();
        assert!(!quantizer.codebook().grad().defined() && raw.grad().defined());
    }
}
