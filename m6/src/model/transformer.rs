//! The stack: embeddings of text, patches and codes, pre-norm blocks, and one head for texts and one for codes.
//!
//! Legend: `n` tokens, `d` model width, `h` heads, `k` head width.

use std::rc::Rc;

use crate::error::Result;
use m6_runtime::attention::Layout;
use m6_runtime::nn::{Embedding, Linear};
use m6_runtime::{FloatDtype, Init, Params};
use m6_vision::{PatchConfig, PatchEncoder};
use tch::{Device, Kind, Tensor};

use super::attention::{Attend, Attention, Heads};
use super::config::{Bias, ModelConfig};
use super::mlp::Mlp;
use super::mode::Mode;
use super::moe::{Moe, RouterLosses, RouterTotals};
use super::norm::Norm;
use super::rotary::{Rotary, RotaryConfig, Rotation};
use super::sequence::{Positions, SEGMENTS, Tokens};
use super::vocab::Vocab;
use super::{INIT_STD, PATCHES};

#[derive(Debug)]
enum FeedForward {
    Dense(Mlp),
    Experts(Box<Moe>),
}

#[derive(Debug)]
struct Block {
    attention_norm: Norm,
    attention: Attention,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
}

/// The result of the stack.
#[derive(Debug)]
pub struct Hidden {
    /// `[n, d]` after the last norm.
    pub x_nd: Tensor,
    /// What the routers of all blocks come to, where there are experts.
    pub routers: Option<RouterTotals>,
}

/// What the blocks of one forward pass have in common.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pass<'a> {
    pub rotation: Option<&'a Rotation>,
    /// Tokens that are no padding, which come first.
    pub real: i64,
    pub mode: Mode,
}

/// What a block made of its input.
#[derive(Debug)]
pub(super) struct Stepped {
    /// `[n, d]` the stream after attention.
    pub x_nd: Tensor,
    /// `[n, d]` what the feed-forward adds to it.
    pub fed_nd: Tensor,
    pub losses: Option<RouterLosses>,
}

/// One transformer for all tasks. A language model is the same without the parts that are for pictures.
#[derive(Debug)]
pub struct Transformer {
    config: ModelConfig,
    vocab: Vocab,
    positions: Positions,
    compute: Kind,
    tokens: Embedding,
    /// Absent where positions are rotary.
    position_table: Option<Embedding>,
    rotary: Option<Rotary>,
    aim_table: Option<Embedding>,
    /// Absent where there is nothing but text.
    segment_table: Option<Embedding>,
    patches: Option<PatchEncoder>,
    /// One and the same many times where they share their weights.
    blocks: Vec<Rc<Block>>,
    norm: Norm,
    /// Absent where texts share the input table.
    text_head: Option<Linear>,
    /// Absent where there are no codes.
    code_head: Option<Linear>,
}

impl Transformer {
    /// Registers every weight. Text output shares the input table's rows unless the config unties them; codes have a
    /// head of their own, since a code's neighbours on the way in are not its neighbours on the way out.
    pub fn new(params: &Params, config: &ModelConfig, vocab: Vocab, code_grid: i64) -> Self {
        let d = config.width;
        // Residual branches start narrow, so that the stream's width does not grow with depth (GPT-2).
        let out_std = INIT_STD / (2.0 * config.layers as f64).sqrt();
        let patch_grid = config.patches.as_ref().map_or(0, PatchConfig::grid);
        let positions = Positions { text: config.max_text, patch_grid, code_grid };
        let has_pictures = config.patches.is_some() || !vocab.is_language();
        let block = |i: i64| {
            let at = params / "blocks" / i;
            let feed_forward = match config.experts(i) {
                Some(moe) => FeedForward::Experts(Box::new(Moe::new(&(&at / "moe"), config, moe, out_std))),
                None => {
                    let (kind, has_bias) = (config.feed_forward, config.bias == Bias::All);
                    FeedForward::Dense(Mlp::new(&(&at / "mlp"), kind, d, config.hidden, out_std, has_bias))
                }
            };
            Rc::new(Block {
                attention_norm: Norm::new(&(&at / "attention_norm"), config),
                attention: Attention::new(&(&at / "attention"), config, out_std),
                feed_forward_norm: Norm::new(&(&at / "feed_forward_norm"), config),
                feed_forward,
            })
        };
        let own: Vec<_> = config.own_blocks().map(block).collect();
        let table = |name: &str, rows: i64| Embedding::new(&(params / name), rows, d, Init::Normal(INIT_STD));
        let head = |name: &str, rows: i64| Linear::head(&(params / name), d, rows, Init::Normal(INIT_STD));
        let rotary = |config: &RotaryConfig, width: i64| Rotary::new(config, width, params.device());
        Self {
            blocks: own.iter().cycle().take(config.layers as usize).cloned().collect(),
            tokens: table("tokens", vocab.rows()),
            position_table: config.rotary.is_none().then(|| table("positions", positions.rows())),
            rotary: config.rotary.as_ref().map(|settings| rotary(settings, config.head_width())),
            aim_table: config.any_order.then(|| table("aims", positions.aim_rows())),
            segment_table: has_pictures.then(|| table("segments", SEGMENTS)),
            patches: config.patches.as_ref().map(|c| PatchEncoder::new(&(params / PATCHES), c, d)),
            norm: Norm::new(&(params / "norm"), config),
            text_head: (!config.tied).then(|| head("text_head", vocab.text_rows())),
            code_head: (!vocab.is_language()).then(|| head("code_head", vocab.code_rows())),
            compute: compute_dtype(params.device()).kind(),
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

    /// Sets the dtype of activations.
    pub fn set_compute(&mut self, kind: Kind) {
        self.compute = kind;
    }

    /// Embeds a sequence: token, position, aim and segment rows, as far as there are such; patches take features of `pictures` `[b, 3, s, s]`
    /// bytes in place of the token's row; pictures beyond the sequence's patches are padding. Returns `[n, d]` in the
    /// compute dtype.
    pub fn embed(&self, tokens: &Tokens, pictures: Option<&Tensor>) -> Tensor {
        // Only there does every step have a loss at the head that shares the table.
        let is_shared = self.text_head.is_none() && self.vocab.is_language();
        let mut content = if is_shared {
            self.tokens.forward_shared(&tokens.ids)
        } else {
            self.tokens.forward(&tokens.ids)
        };
        if let (Some(pictures), Some(patches)) = (pictures, &self.patches) {
            let features = patches.forward(pictures, self.compute).to_kind(Kind::Float);
            let used = features.narrow(0, 0, tokens.patch_rows.size()[0]);
            content = content.index_copy(0, &tokens.patch_rows, &used);
        }
        let mut places = self
            .position_table
            .as_ref()
            .map(|table| table.forward(&tokens.first_position) + table.forward(&tokens.second_position));
        if let Some(table) = &self.aim_table {
            let aims = table.forward(&tokens.first_aim);
            places = Some(
                places.map_or(aims.shallow_clone(), |places| places + aims)
                    + table.forward(&tokens.second_aim),
            );
        }
        let segments = self.segment_table.as_ref().map(|table| table.forward(&tokens.segments));
        let sum = [places, segments].into_iter().flatten().fold(content, |sum, part| sum + part);
        sum.to_kind(self.compute)
    }

    /// What places `[n]` in texts of `lengths` `[n]` tokens do to queries and keys, where positions are rotary.
    pub fn rotation(&self, places: &Tensor, lengths: &Tensor, mode: Mode) -> Option<Rotation> {
        self.rotary.as_ref().map(|rotary| rotary.rotation(places, lengths, mode == Mode::Train))
    }

    /// Runs the blocks over embedded tokens `[n, d]`; `attend` gets the block's index first. Only the first
    /// `real` tokens count for the routers' losses and the experts' capacity.
    ///
    /// # Errors
    /// Those of `attend`.
    pub fn run(
        &self,
        x_nd: Tensor,
        rotation: Option<&Rotation>,
        real: i64,
        mode: Mode,
        mut attend: impl FnMut(usize, &Heads<'_>) -> Result<Tensor>,
    ) -> Result<Hidden> {
        let pass = Pass { rotation, real, mode };
        let mut x_nd = self.drop(x_nd, mode);
        let mut normed = self.norm_before(0).forward(&x_nd);
        let mut losses = Vec::new();
        for index in 0..self.blocks() {
            let mut attend_here = |heads: &Heads<'_>| attend(index, heads);
            let stepped = self.step(index, &x_nd, &normed, pass, &mut attend_here)?;
            (x_nd, normed) = self.norm_before(index + 1).forward_sum(&stepped.fed_nd, &stepped.x_nd);
            losses.extend(stepped.losses);
        }
        Ok(Hidden { x_nd: normed, routers: self.router_totals(&losses) })
    }

    /// Number of blocks.
    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Block `index` on a stream `[n, d]` and its norm.
    pub(super) fn step(
        &self,
        index: usize,
        x_nd: &Tensor,
        normed: &Tensor,
        pass: Pass<'_>,
        attend: &mut Attend,
    ) -> Result<Stepped> {
        let (block, Pass { rotation, real, mode }) = (&self.blocks[index], pass);
        let attended = self.drop(block.attention.forward(normed, rotation, attend)?, mode);
        let (x_nd, normed) = block.feed_forward_norm.forward_sum(&attended, x_nd);
        let (fed_nd, losses) = match &block.feed_forward {
            FeedForward::Dense(mlp) => (mlp.forward(&normed), None),
            FeedForward::Experts(moe) => {
                let (fed_nd, losses) = moe.forward(&normed, real, mode);
                (fed_nd, Some(losses))
            }
        };
        Ok(Stepped { x_nd, fed_nd: self.drop(fed_nd, mode), losses })
    }

    /// The first norm of block `index`, or that of the stack after the last block.
    pub(super) fn norm_before(&self, index: usize) -> &Norm {
        self.blocks.get(index).map_or(&self.norm, |block| &block.attention_norm)
    }

    pub(super) fn drop(&self, x: Tensor, mode: Mode) -> Tensor {
        match mode {
            Mode::Train if self.config.dropout > 0.0 => x.dropout(self.config.dropout, true),
            _ => x,
        }
    }

    pub(super) fn router_totals(&self, losses: &[RouterLosses]) -> Option<RouterTotals> {
        let config = self.config.moe.as_ref().filter(|_| !losses.is_empty());
        config.map(|config| RouterTotals::of(config, losses))
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
        let rotation = self.rotation(&tokens.places, &tokens.lengths, mode);
        self.run(self.embed(tokens, pictures), rotation.as_ref(), real, mode, |index, heads| {
            heads.attend(layout, self.config.window(index))
        })
    }

    /// The output head of text and special ids, `[text rows, d]`.
    pub fn text_head(&self) -> Tensor {
        match &self.text_head {
            Some(head) => head.weight().shallow_clone(),
            None if self.vocab.is_language() => self.tokens.weight().shallow_clone(),
            None => self.tokens.weight().narrow(0, 0, self.vocab.text_rows()),
        }
    }

    /// The output head of codes and the end of the image, `[codes + 1, d]`; absent in a language model.
    pub fn code_head(&self) -> Option<Tensor> {
        self.code_head.as_ref().map(|head| head.weight().shallow_clone())
    }

    /// `[m, d]` hidden rows to logits over text and special ids, `[m, text rows]` float32.
    pub fn text_logits(&self, hidden: &Tensor) -> Tensor {
        hidden.linear(&self.text_head().to_kind(hidden.kind()), None::<&Tensor>).to_kind(Kind::Float)
    }

    /// `[m, d]` hidden rows to logits over codes and the end of the image, `[m, codes + 1]` float32.
    ///
    /// # Panics
    /// In a language model, which has no codes.
    pub fn code_logits(&self, hidden: &Tensor) -> Tensor {
        let head = self.code_head.as_ref().expect("a model that draws has codes");
        head.forward(hidden).to_kind(Kind::Float)
    }
}

/// What activations are computed in where nobody says: bf16 on a GPU, float32 elsewhere.
pub fn compute_dtype(device: Device) -> FloatDtype {
    if device.is_cuda() { FloatDtype::Bf16 } else { FloatDtype::Fp32 }
}
