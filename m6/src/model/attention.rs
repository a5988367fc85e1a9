//! Self-attention, by default with normalised queries and keys (Chameleon's cure for divergence with mixed modalities).
//!
//! Legend: `n` tokens, `d` model width, `h` heads, `g` key heads, `k` head width.

use crate::error::Result;
use m6_runtime::attention::{Layout, prefix_attention, rotary_attention};
use m6_runtime::chunked_attention::chunked_attention;
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

/// The heads of a block to the attended values `[n, h, k]`.
pub type Attend<'a> = dyn FnMut(&Heads<'_>) -> Result<Tensor> + 'a;

/// Queries, keys and values of a block.
#[derive(Debug)]
pub struct Heads<'a> {
    /// `[n, h + 2 g, k]`, side by side, as they were projected.
    qkv: Tensor,
    attention: &'a Attention,
    rotation: Option<&'a Rotation>,
}

impl Heads<'_> {
    /// Queries `[n, h, k]`, keys and values `[n, g, k]`, the first two normed and turned.
    pub fn split(&self) -> (Tensor, Tensor, Tensor) {
        let Attention { norms, heads, kv_heads, .. } = self.attention;
        match (norms, self.rotation) {
            (None, Some(rotation)) => rotation.split(&self.qkv, *heads, *kv_heads),
            (_, None) => self.normed(),
            (Some(_), Some(rotation)) => {
                let (q, k, v) = self.normed();
                let (q, k) = rotation.turn(&q, &k);
                (q, k, v)
            }
        }
    }

    /// The same, not turned.
    fn normed(&self) -> (Tensor, Tensor, Tensor) {
        let Attention { norms, heads, kv_heads, .. } = self.attention;
        let (q, k, v) = split_heads(&self.qkv, *heads, *kv_heads);
        match norms {
            Some([q_norm, k_norm]) => (q_norm.forward(&q), k_norm.forward(&k), v),
            None => (q, k, v),
        }
    }

    /// Attention over packed examples.
    ///
    /// # Errors
    /// When libtorch refuses a call.
    pub fn attend(&self, layout: &Layout, window: Option<i64>) -> Result<Tensor> {
        let Attention { norms, heads, kv_heads, .. } = self.attention;
        if let Some(rotation) = self.rotation
            && let Some(chunks) = rotation.chunks(layout.longest())
        {
            let (q, k, v) = self.normed();
            let (queries, k) = rotation.turn_in_chunks(chunks, &q, &k);
            return Ok(chunked_attention(&queries, &k, &v, layout, chunks.size)?);
        }
        if let (None, Some(angles)) = (norms, self.rotation.and_then(Rotation::angles)) {
            return Ok(rotary_attention(&self.qkv, (*heads, *kv_heads), angles, layout, window)?);
        }
        let (q, k, v) = self.split();
        Ok(prefix_attention(&q, &k, &v, layout, window)?)
    }
}

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
        let attended = attend(&Heads { qkv, attention: self, rotation })?; // [n, h, k]
        Ok(self.out.forward(&attended.flatten(1, 2)))
    }
}

/// A product with or without a bias.
pub(super) fn linear(params: &Params, input: i64, output: i64, std: f64, has_bias: bool) -> Linear {
    let new = if has_bias { Linear::new } else { Linear::without_bias };
    new(params, input, output, Init::Normal(std))
}
