//! The stack: embeddings of text, patches and codes, pre-norm blocks, and one head for texts and one for codes.
//!
//! Legend: `n` tokens, `d` model width, `h` heads, `k` head width.

use crate::error::Result;
use m6_runtime::attention::{Layout, prefix_attention};
use m6_runtime::nn::{Embedding, Linear, RmsNorm};
use m6_runtime::{Init, Params};
use m6_vision::PatchEncoder;
use tch::{Device, Kind, Tensor};

use super::attention::{Attend, Attention};
use super::config::ModelConfig;
use super::mlp::Mlp;
use super::moe::Moe;
use super::sequence::{Positions, SEGMENTS, Tokens};
use super::vocab::Vocab;
use super::{INIT_STD, NORM_EPS};

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Experts(Moe),
}

#[derive(Debug)]
struct Block {
    attention_norm: RmsNorm,
    attention: Attention,
    feed_forward_norm: RmsNorm,
    feed_forward: FeedForward,
}

/// How a forward pass is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// With dropout.
    Train,
    /// Without.
    Infer,
}

/// The result of the stack.
#[derive(Debug)]
pub struct Hidden {
    /// `[n, d]` after the last norm.
    pub x_nd: Tensor,
    /// Sum of the routers' losses, where there are experts.
    pub router_loss: Option<Tensor>,
    /// `[blocks with experts, e]` share of the routed rows that each expert took.
    pub expert_load: Option<Tensor>,
}

/// One transformer for all tasks.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    vocab: Vocab,
    positions: Positions,
    compute: Kind,
    tokens: Embedding,
    position_table: Embedding,
    aim_table: Option<Embedding>,
    segment_table: Embedding,
    patches: PatchEncoder,
    blocks: Vec<Block>,
    norm: RmsNorm,
    code_head: Linear,
}

impl Transformer {
    /// Registers every weight. Text output shares the input table's rows; codes have a head of their own, since
    /// a code's neighbours on the way in are not its neighbours on the way out.
    pub fn new(params: &Params, config: &ModelConfig, vocab: Vocab, code_grid: i64) -> Self {
        let d = config.width;
        // Residual branches start narrow, so that the stream's width does not grow with depth (GPT-2).
        let out_std = INIT_STD / (2.0 * config.layers as f64).sqrt();
        let positions = Positions { text: config.max_text, patch_grid: config.patches.grid(), code_grid };
        let blocks = (0..config.layers).map(|i| {
            let at = params / "blocks" / i;
            let feed_forward = match &config.moe {
                Some(moe) if (i + 1) % moe.every == 0 => {
                    FeedForward::Experts(Moe::new(&(&at / "moe"), config, moe, out_std))
                }
                _ => FeedForward::Dense(Mlp::new(&(&at / "mlp"), d, config.hidden, out_std)),
            };
            Block {
                attention_norm: RmsNorm::new(&(&at / "attention_norm"), d, NORM_EPS),
                attention: Attention::new(&(&at / "attention"), config, out_std),
                feed_forward_norm: RmsNorm::new(&(&at / "feed_forward_norm"), d, NORM_EPS),
                feed_forward,
            }
        });
        let table = |name: &str, rows: i64| Embedding::new(&(params / name), rows, d, Init::Normal(INIT_STD));
        Self {
            blocks: blocks.collect(),
            tokens: table("tokens", vocab.rows()),
            position_table: table("positions", positions.rows()),
            aim_table: config.any_order.then(|| table("aims", positions.aim_rows())),
            segment_table: table("segments", SEGMENTS),
            patches: PatchEncoder::new(&(params / "patches"), &config.patches, d),
            norm: RmsNorm::new(&(params / "norm"), d, NORM_EPS),
            code_head: Linear::head(&(params / "code_head"), d, vocab.code_rows(), Init::Normal(INIT_STD)),
            compute: compute_kind(params.device()),
            config: config.clone(),
            vocab,
            positions,
        }
    }

    /// The settings.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The vocabulary.
    pub fn vocab(&self) -> Vocab {
        self.vocab
    }

    /// The position table's layout.
    pub fn positions(&self) -> Positions {
        self.positions
    }

    /// The dtype of activations: bf16 on a GPU, float32 on the CPU.
    pub fn compute(&self) -> Kind {
        self.compute
    }

    /// Embeds a sequence: token, position, aim and segment rows; patches take features of `pictures` `[b, 3, s, s]`
    /// bytes in place of the token's row; pictures beyond the sequence's patches are padding. Returns `[n, d]` in the
    /// compute dtype.
    pub fn embed(&self, tokens: &Tokens, pictures: Option<&Tensor>) -> Tensor {
        let mut content = self.tokens.forward(&tokens.ids);
        if let Some(pictures) = pictures {
            let features = self.patches.forward(pictures, self.compute).to_kind(Kind::Float);
            let used = features.narrow(0, 0, tokens.patch_rows.size()[0]);
            content = content.index_copy(0, &tokens.patch_rows, &used);
        }
        let mut places = self.position_table.forward(&tokens.first_position)
            + self.position_table.forward(&tokens.second_position);
        if let Some(table) = &self.aim_table {
            places = places + table.forward(&tokens.first_aim) + table.forward(&tokens.second_aim);
        }
        (content + places + self.segment_table.forward(&tokens.segments)).to_kind(self.compute)
    }

    /// Runs the blocks over embedded tokens `[n, d]`; `attend` gets the block's index first. Only the first
    /// `real` tokens count for the routers' losses.
    ///
    /// # Errors
    /// Those of `attend`.
    pub fn run(
        &self,
        x_nd: Tensor,
        real: i64,
        mode: Mode,
        mut attend: impl FnMut(usize, &Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Hidden> {
        let drop = |x: Tensor| match mode {
            Mode::Train if self.config.dropout > 0.0 => x.dropout(self.config.dropout, true),
            _ => x,
        };
        let mut x_nd = drop(x_nd);
        let mut router_losses = Vec::new();
        let mut loads = Vec::new();
        for (index, block) in self.blocks.iter().enumerate() {
            let mut with_index = |q: &Tensor, k: &Tensor, v: &Tensor| attend(index, q, k, v);
            let attend_here: &mut Attend = &mut with_index;
            let attended = block.attention.forward(&block.attention_norm.forward(&x_nd), attend_here)?;
            // Never `+=`: in tch that is an in-place update of a tensor that the backward pass needs.
            x_nd = drop(attended) + x_nd;
            let normed = block.feed_forward_norm.forward(&x_nd);
            let fed = match &block.feed_forward {
                FeedForward::Dense(mlp) => mlp.forward(&normed),
                FeedForward::Experts(moe) => {
                    let output = moe.forward(&normed, real);
                    router_losses.push(output.loss);
                    loads.push(output.load_e);
                    output.y_nd
                }
            };
            x_nd = drop(fed) + x_nd;
        }
        let some = !router_losses.is_empty();
        Ok(Hidden {
            x_nd: self.norm.forward(&x_nd),
            router_loss: some.then(|| Tensor::stack(&router_losses, 0).sum(Kind::Float)),
            expert_load: some.then(|| Tensor::stack(&loads, 0)),
        })
    }

    /// The stack over packed examples.
    ///
    /// # Errors
    /// When libtorch refuses an attention call.
    pub fn forward(
        &self,
        tokens: &Tokens,
        pictures: Option<&Tensor>,
        layout: &Layout,
        real: i64,
        mode: Mode,
    ) -> Result<Hidden> {
        self.run(self.embed(tokens, pictures), real, mode, |_, q, k, v| {
            Ok(prefix_attention(q, k, v, layout)?)
        })
    }

    /// The output head of text and special ids, `[text rows, d]`.
    pub fn text_head(&self) -> Tensor {
        self.tokens.weight().narrow(0, 0, self.vocab.text_rows())
    }

    /// The output head of codes and the end of the image, `[codes + 1, d]`.
    pub fn code_head(&self) -> Tensor {
        self.code_head.weight().shallow_clone()
    }

    /// `[m, d]` hidden rows to logits over text and special ids, `[m, text rows]` float32.
    pub fn text_logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.text_head().to_kind(hidden.kind()), None::<&Tensor>).to_kind(Kind::Float)
    }

    /// `[m, d]` hidden rows to logits over codes and the end of the image, `[m, codes + 1]` float32.
    pub fn code_logits(&self, hidden: &Tensor) -> Tensor {
        self.code_head.forward(hidden).to_kind(Kind::Float)
    }
}

/// bf16 on a GPU, float32 elsewhere.
pub fn compute_kind(device: Device) -> Kind {
    if device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
}
