//! Where the tensors of a published layout lie in ours, which keeps queries, keys and values in one matrix, gate and up
//! in another, and the experts of a block in one stack.

use tch::Tensor;

use super::super::ModelConfig;
use super::config::Family;

/// One tensor of the other layout, and the part of one of ours that it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Part {
    /// Its name there.
    pub theirs: String,
    /// The name of our tensor.
    pub ours: String,
    /// Which of our stacked experts.
    expert: Option<i64>,
    /// Rows of our tensor, or of the expert's; all of them where absent.
    rows: Option<(i64, i64)>,
}

impl Part {
    fn whole(theirs: String, ours: String) -> Self {
        Self { theirs, ours, expert: None, rows: None }
    }

    /// The part of our tensor, sharing its memory.
    pub fn of(&self, ours: &Tensor) -> Tensor {
        let one = self.expert.map_or_else(|| ours.shallow_clone(), |expert| ours.select(0, expert));
        self.rows.map_or_else(|| one.shallow_clone(), |(start, count)| one.narrow(0, start, count))
    }
}

/// All tensors of a model of `family`, in the order of its blocks.
pub fn parts(family: Family, config: &ModelConfig) -> Vec<Part> {
    match family {
        Family::Qwen => qwen(config),
        Family::Qwen2 => qwen2(config),
    }
}

fn qwen(config: &ModelConfig) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut whole = |theirs: String, ours: String| parts.push(Part::whole(theirs, ours));
    whole("transformer.wte.weight".into(), "tokens.weight".into());
    for layer in 0..config.layers {
        let (theirs, ours) = (format!("transformer.h.{layer}"), format!("blocks.{layer}"));
        for (their, our) in [
            ("ln_1.weight", "attention_norm.weight"),
            ("attn.c_attn.weight", "attention.qkv.weight"),
            ("attn.c_attn.bias", "attention.qkv.bias"),
            ("attn.c_proj.weight", "attention.out.weight"),
            ("ln_2.weight", "feed_forward_norm.weight"),
            ("mlp.c_proj.weight", "mlp.down.weight"),
        ] {
            whole(format!("{theirs}.{their}"), format!("{ours}.{our}"));
        }
    }
    whole("transformer.ln_f.weight".into(), "norm.weight".into());
    if !config.tied {
        whole("lm_head.weight".into(), "text_head.weight".into());
    }
    for layer in 0..config.layers {
        // w2 goes through the swish.
        let theirs = ["w2", "w1"].map(|name| format!("transformer.h.{layer}.mlp.{name}.weight"));
        parts.extend(stacked(
            theirs,
            &format!("blocks.{layer}.mlp.gate_up.weight"),
            [config.hidden; 2],
            None,
        ));
    }
    parts
}

fn qwen2(config: &ModelConfig) -> Vec<Part> {
    let mut parts = vec![Part::whole("model.embed_tokens.weight".into(), "tokens.weight".into())];
    for layer in 0..config.layers {
        let (theirs, ours) = (format!("model.layers.{layer}"), format!("blocks.{layer}"));
        parts.extend(
            [
                ("input_layernorm.weight", "attention_norm.weight"),
                ("self_attn.o_proj.weight", "attention.out.weight"),
                ("post_attention_layernorm.weight", "feed_forward_norm.weight"),
            ]
            .map(|(their, our)| Part::whole(format!("{theirs}.{their}"), format!("{ours}.{our}"))),
        );
        let (queries, keys) = (config.heads * config.head_width(), config.kv_heads() * config.head_width());
        let has_bias = config.bias != super::super::config::Bias::None;
        for kind in ["weight", "bias"].into_iter().take(if has_bias { 2 } else { 1 }) {
            let names =
                ["q_proj", "k_proj", "v_proj"].map(|name| format!("{theirs}.self_attn.{name}.{kind}"));
            parts.extend(stacked(
                names,
                &format!("{ours}.attention.qkv.{kind}"),
                [queries, keys, keys],
                None,
            ));
        }
        parts.extend(feed_forward(config, layer, &format!("{theirs}.mlp"), &ours));
    }
    parts.push(Part::whole("model.norm.weight".into(), "norm.weight".into()));
    if !config.tied {
        parts.push(Part::whole("lm_head.weight".into(), "text_head.weight".into()));
    }
    parts
}

fn feed_forward(config: &ModelConfig, layer: i64, theirs: &str, ours: &str) -> Vec<Part> {
    let gate_up = |theirs: &str| ["gate_proj", "up_proj"].map(|name| format!("{theirs}.{name}.weight"));
    let dense = |theirs: &str, ours: &str, hidden: i64| {
        let mut parts = stacked(gate_up(theirs), &format!("{ours}.gate_up.weight"), [hidden; 2], None);
        parts.push(Part::whole(format!("{theirs}.down_proj.weight"), format!("{ours}.down.weight")));
        parts
    };
    let Some(moe) = config.experts(layer) else {
        return dense(theirs, &format!("{ours}.mlp"), config.hidden);
    };
    let ours = format!("{ours}.moe");
    let mut parts = vec![Part::whole(format!("{theirs}.gate.weight"), format!("{ours}.router.weight"))];
    let hidden = moe.hidden(config.hidden);
    for expert in 0..moe.experts {
        let their_expert = format!("{theirs}.experts.{expert}");
        let (up, down) = (format!("{ours}.experts.gate_up"), format!("{ours}.experts.down"));
        parts.extend(stacked(gate_up(&their_expert), &up, [hidden; 2], Some(expert)));
        let theirs = format!("{their_expert}.down_proj.weight");
        parts.push(Part { theirs, ours: down, expert: Some(expert), rows: None });
    }
    if let Some(width) = moe.shared {
        parts.extend(dense(&format!("{theirs}.shared_expert"), &format!("{ours}.shared"), width));
        let theirs = format!("{theirs}.shared_expert_gate.weight");
        parts.push(Part::whole(theirs, format!("{ours}.shared_gate.weight")));
    }
    parts
}

/// Tensors that are stacked row by row in one of ours.
fn stacked<const N: usize>(
    theirs: [String; N],
    ours: &str,
    heights: [i64; N],
    expert: Option<i64>,
) -> Vec<Part> {
    let mut start = 0;
    let part = |(theirs, height): (String, i64)| {
        let rows = Some((start, height));
        start += height;
        Part { theirs, ours: ours.to_owned(), expert, rows }
    };
    theirs.into_iter().zip(heights).map(part).collect()
}
