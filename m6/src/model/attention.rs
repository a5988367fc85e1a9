//! Self-attention with normalised queries and keys (Chameleon's cure for divergence with mixed modalities).
//!
//! Legend: `n` tokens, `d` model width, `h` heads, `k` head width.

use crate::error::Result;
use m6_runtime::nn::{Linear, RmsNorm};
use m6_runtime::{Init, Params};
use tch::Tensor;

use super::config::ModelConfig;
use super::{INIT_STD, NORM_EPS};

/// Projections around an attention that the caller provides: over packed examples in training, over a cache in
/// generation.
#[derive(Debug)]
pub struct Attention {
    qkv: Linear,
    q_norm: RmsNorm,
    k_norm: RmsNorm,
    out: Linear,
    heads: i64,
    head_width: i64,
}

/// `q`, `k`, `v` of shape `[n, h, k]` to the attended values `[n, h, k]`.
pub type Attend<'a> = dyn FnMut(&Tensor, &Tensor, &Tensor) -> Result<Tensor> + 'a;

impl Attention {
    /// The attention of one block; `out_std` is the initial width of the output projection.
    pub fn new(params: &Params, config: &ModelConfig, out_std: f64) -> Self {
        let (d, k) = (config.width, config.head_width());
        Self {
            qkv: Linear::without_bias(&(params / "qkv"), d, 3 * d, Init::Normal(INIT_STD)),
            q_norm: RmsNorm::new(&(params / "q_norm"), k, NORM_EPS),
            k_norm: RmsNorm::new(&(params / "k_norm"), k, NORM_EPS),
            out: Linear::without_bias(&(params / "out"), d, d, Init::Normal(out_std)),
            heads: config.heads,
            head_width: k,
        }
    }

    /// `[n, d] -> [n, d]`.
    ///
    /// # Errors
    /// Those of `attend`.
    pub fn forward(&self, x_nd: &Tensor, attend: &mut Attend) -> Result<Tensor> {
        let qkv = self.qkv.forward(x_nd).view([-1, 3, self.heads, self.head_width]); // [n, 3, h, k]
        // One node of the graph: three selects would each fill the gradient of all of `qkv` with zeros.
        let [q, k, v] = &qkv.unbind(1)[..] else { unreachable!("three along axis 1") };
        let attended = attend(&self.q_norm.forward(q), &self.k_norm.forward(k), v)?; // [n, h, k]
        Ok(self.out.forward(&attended.flatten(1, 2)))
    }
}
