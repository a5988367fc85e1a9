//! The quantiser of LlamaGen (Sun et al. 2024): narrow, normalised codes.
//!
//! Legend: `n` positions of all pictures of a batch, `d` code width, `k` codes.

use m6_runtime::nn::Embedding;
use m6_runtime::{Init, Params};
use tch::{Kind, Tensor};

use crate::config::VqganConfig;

/// Codebook of unit vectors; which one a position gets is decided by the angle.
#[derive(Debug)]
pub(crate) struct Quantizer {
    embedding: Embedding,
}

/// Positions with their codes.
#[derive(Debug)]
pub struct Quantized {
    /// Unit rows of the codebook, float32 `[n, d]`.
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
            // Replaced by encoder outputs before it is trained; only directions count.
            Init::Normal(1.0),
        );
        Self { embedding }
    }

    /// The table `[k, d]` as it is stored, not normalised.
    pub(crate) fn codebook(&self) -> &Tensor {
        self.embedding.weight()
    }

    /// Unit codes at `codes`, float32 `[.., d]`.
    pub(crate) fn lookup(&self, codes: &Tensor) -> Tensor {
        normalize(&self.embedding.forward(codes))
    }

    /// The nearest code of each unit row of `rows_nd`.
    pub(crate) fn quantize(&self, rows_nd: &Tensor) -> Quantized {
        let (codes_n, _) = nearest(rows_nd, self.codebook());
        Quantized { rows_nd: self.lookup(&codes_n), codes_n }
    }
}

/// Float32 `x` with its last axis scaled to length one. Reduced precision here would pick wrong codes.
pub(crate) fn normalize(x: &Tensor) -> Tensor {
    /// Keeps a zero vector's gradient finite.
    const NORM_EPS: f64 = 1e-12;
    let x = x.to_kind(Kind::Float);
    &x / x.square().sum_dim_intlist([-1].as_slice(), true, Kind::Float).clamp_min(NORM_EPS).sqrt()
}

/// For each unit row of `rows_nd` the index of the nearest code in `codebook_kd` and the cosine between the two.
/// No gradient flows.
pub(crate) fn nearest(rows_nd: &Tensor, codebook_kd: &Tensor) -> (Tensor, Tensor) {
    let _guard = tch::no_grad_guard();
    // Between unit vectors the smallest distance is the largest product.
    let (cosine_n, codes_n) = rows_nd.matmul(&normalize(codebook_kd).tr()).max_dim(-1, false);
    (codes_n, cosine_n)
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
