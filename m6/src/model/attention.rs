//! Self-attention, by default with normalised queries and keys (Chameleon's cure for divergence with mixed modalities).
//!
//! Legend: `n` tokens, `d` model width, `h` heads, `g` key heads, `k` head width.

use crate::error::Result;
use m6_runtime::fused::split_heads;
use m6_runtime::nn::{Linear, RmsNorm};
use m6_runtime::{Init, Params};
use tch::Tensor;

use super::INIT_STD;
use super::config::{Bias, ModelConfig};
use super::rotary::Rotation;

/// Projections around an attention that the caller provides: over packed examples in training, over a cache in
/// generation.
#[derive(Debug)]
pub struct Attention {
    qkv: Linear,
    norms: Option<[RmsNorm; 2]>,
    out: Linear,
    heads: i64,
    kv_heads: i64,
    head_width: i64,
}

/// `q` of shape `[n, h, k]`, `k` and `v` of shape `[n, g, k]` to the attended values `[n, h, k]`.
pub type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a;

impl Attention {
    /// The attention of one block; `out_std` is the initial width of the output projection.
    pub fn new(params: &Params, config: &ModelConfig, out_std: f64) -> Self {
        let (d, k) = (config.width, config.head_width());
        let (heads, kv_heads) = (config.heads, config.kv_heads());
        let norm = |name: &str| RmsNorm::new(&(params / name), k, config.norm_eps);
        let rows = (heads + 2 * kv_heads) * k;
        Self {
            qkv: linear(&(params / "qkv"), d, rows, INIT_STD, config.bias != Bias::None),
            norms: config.qk_norm.then(|| [norm("q_norm"), norm("k_norm")]),
            out: linear(&(params / "out"), heads * k, d, out_std, config.bias == Bias::All),
            heads,
            kv_heads,
            head_width: k,
        }
    }

    /// `[n, d] -> [n, d]`.
    ///
    /// # Errors
    /// Those of `attend`.
    pub fn forward(&self, x_nd: &Tensor, rotation: Option<&Rotation>, attend: &mut Attend) -> Result<Tensor> {
        let qkv = self.qkv.forward(x_nd).view([-1, self.heads + 2 * self.kv_heads, self.head_width]);
        let (q, k, v) = match (&self.norms, rotation) {
            (None, Some(rotation)) => rotation.split(&qkv, self.heads, self.kv_heads),
            (norms, rotation) => {
                let (mut q, mut k, v) = split_heads(&qkv, self.heads, self.kv_heads);
                if let Some([q_norm, k_norm]) = norms {
                    (q, k) = (q_norm.forward(&q), k_norm.forward(&k));
                }
                if let Some(rotation) = rotation {
                    (q, k) = rotation.turn(&q, &k);
                }
                (q, k, v)
            }
        };
        let attended = attend(&q, &k, &v)?; // [n, h, k]
        Ok(self.out.forward(&attended.flatten(1, 2)))
    }
}

/// A product with or without a bias.
pub(super) fn linear(params: &Params, input: i64, output: i64, std: f64, has_bias: bool) -> Linear {
    let new = if has_bias { Linear::new } else { Linear::without_bias };
    new(params, input, output, Init::Normal(std))
}
