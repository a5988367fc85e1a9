//! Names and shapes that tensors have in other projects.

use std::fmt;

/// Names of taming-transformers become LlamaGen's.
const LLAMAGEN: [(&str, &str); 6] = [
    ("mid.block_1", "mid.0"),
    ("mid.attn_1", "mid.1"),
    ("mid.block_2", "mid.2"),
    (".down.", ".conv_blocks."),
    (".up.", ".conv_blocks."),
    (".block.", ".res."),
];
/// Names of taming-transformers become those of diffusers, but for the projections of attention.
const DIFFUSERS: [(&str, &str); 12] = [
    ("mid.block_1", "mid_block.resnets.0"),
    ("mid.attn_1", "mid_block.attentions.0"),
    ("mid.block_2", "mid_block.resnets.1"),
    (".down.", ".down_blocks."),
    (".up.", ".up_blocks."),
    (".block.", ".resnets."),
    (".attn.", ".attentions."),
    (".norm.", ".group_norm."),
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    (".norm_out.", ".conv_norm_out."),
];
const DIFFUSERS_ATTENTION: [(&str, &str); 4] =
    [(".q.", ".to_q."), (".k.", ".to_k."), (".v.", ".to_v."), (".proj_out.", ".to_out.0.")];
const OLD_DIFFUSERS_ATTENTION: [(&str, &str); 4] =
    [(".q.", ".query."), (".k.", ".key."), (".v.", ".value."), (".proj_out.", ".proj_attn.")];
/// What may stand before all names, where the tokenizer is a part of something larger: nothing, latent diffusion, and
/// the Hugging Face and original forms of Chameleon and Janus.
const PREFIXES: [&str; 5] = ["", "first_stage_model.", "model.vqmodel.", "vqmodel.", "gen_vision_model."];
/// The first convolution, which is `encoder.conv_in` in every layout.
const FIRST: &str = "encoder.conv_in.weight";

/// How a project names the tensors of this network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A model folder of this program.
    Own,
    /// taming-transformers and latent-diffusion, whose names this program uses too.
    Taming,
    /// LlamaGen, and Janus in its original form.
    LlamaGen,
    /// Janus in Hugging Face's transformers: taming's names, but the decoder's levels are counted from the innermost.
    Janus,
    /// The `VQModel` of diffusers.
    Diffusers,
    /// The same in old files, which have other names for the projections of attention.
    OldDiffusers,
}

impl fmt::Display for Layout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Own => "m6",
            Self::Taming => "taming",
            Self::LlamaGen => "llamagen",
            Self::Janus => "janus",
            Self::Diffusers | Self::OldDiffusers => "diffusers",
        })
    }
}

impl Layout {
    /// The layout that the tensors `names` have, and what stands before each name.
    ///
    /// # Errors
    /// What is wrong with them, when they are of no network that this program has.
    pub(super) fn detect<'a>(
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(Self, &'static str), String> {
        let whole = |prefix: &&str| {
            names.clone().any(|name| name.strip_prefix(*prefix).is_some_and(|rest| rest == FIRST))
        };
        let prefix = PREFIXES
            .into_iter()
            .find(whole)
            .ok_or_else(|| format!("holds no `{FIRST}`, alone or after {}", PREFIXES[1..].join(", ")))?;
        let has = |part: &str| {
            names.clone().any(|name| name.strip_prefix(prefix).is_some_and(|rest| rest.starts_with(part)))
        };
        if !has("decoder.") {
            return Err("holds no `decoder`, as Chameleon's files of Hugging Face do not: it is in the \
                        `tokenizer/vqgan.ckpt` of the original release"
                .into());
        }
        let layout = if has("encoder.conv_blocks.") {
            Self::LlamaGen
        } else if has("encoder.down_blocks.") {
            let old = names.clone().any(|name| name.ends_with(".proj_attn.weight"));
            if old { Self::OldDiffusers } else { Self::Diffusers }
        } else if has("encoder.down.") {
            // The outermost level has nothing to double, so it cannot be the first one.
            if has("decoder.up.0.upsample.") { Self::Janus } else { Self::Taming }
        } else {
            return Err("has an encoder that is not one of taming, LlamaGen or diffusers".into());
        };
        Ok((layout, prefix))
    }

    /// Whether codes are chosen by angle, which the weights do not tell.
    pub(super) fn is_normalized(self) -> bool {
        matches!(self, Self::LlamaGen | Self::Janus)
    }

    /// The name that the tensor `own` has in this layout, in a network of `levels` levels.
    pub(super) fn name(self, own: &str, levels: usize) -> String {
        let turned = if matches!(self, Self::Own | Self::Taming) { None } else { turn_decoder(own, levels) };
        let name = turned.unwrap_or_else(|| own.to_owned());
        match self {
            Self::Own | Self::Taming | Self::Janus => name,
            Self::LlamaGen => replace(name, &LLAMAGEN),
            Self::Diffusers => replace(replace(name, &DIFFUSERS), &DIFFUSERS_ATTENTION),
            Self::OldDiffusers => replace(replace(name, &DIFFUSERS), &OLD_DIFFUSERS_ATTENTION),
        }
    }

    /// The shape that the tensor `own` of shape `shape` has in this layout: diffusers' projections of attention are
    /// linear layers.
    pub(super) fn shape(self, own: &str, shape: &[i64]) -> Vec<i64> {
        let linear = matches!(self, Self::Diffusers | Self::OldDiffusers) && own.contains(".attn");
        match shape {
            &[output, input, 1, 1] if linear => vec![output, input],
            _ => shape.to_vec(),
        }
    }
}

/// Whether a tensor belongs to training and not to the network.
pub(super) fn is_of_training(name: &str) -> bool {
    const FIRST_PARTS: [&str; 4] = ["loss.", "discriminator.", "model_ema.", "optimizer."];
    const NAMES: [&str; 4] = [
        "colorize",
        "quantize.codebook_used",
        "quantize.embedding.cluster_size",
        "quantize.embedding.embed_avg",
    ];
    FIRST_PARTS.iter().any(|part| name.starts_with(part)) || NAMES.contains(&name)
}

/// The name with the decoder's levels counted from the innermost one; `None` for a tensor outside of them.
fn turn_decoder(own: &str, levels: usize) -> Option<String> {
    let rest = own.strip_prefix("decoder.up.")?;
    let (level, rest) = rest.split_once('.')?;
    let turned = levels.checked_sub(1 + level.parse::<usize>().ok()?)?;
    Some(format!("decoder.up.{turned}.{rest}"))
}

fn replace(name: String, pairs: &[(&str, &str)]) -> String {
    pairs.iter().fold(name, |name, (from, to)| name.replace(from, to))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_each_layout() {
        let names = |layout: Layout| {
            [
                "encoder.down.1.block.0.nin_shortcut.weight",
                "encoder.down.1.attn.0.proj_out.bias",
                "encoder.down.0.downsample.conv.weight",
                "encoder.mid.attn_1.norm.weight",
                "decoder.mid.block_2.norm1.bias",
                "decoder.up.0.block.2.conv1.weight",
                "decoder.up.2.upsample.conv.weight",
                "decoder.norm_out.weight",
                "quantize.embedding.weight",
            ]
            .map(|own| layout.name(own, 3))
        };
        assert_eq!(names(Layout::Taming), names(Layout::Own));
        assert_eq!(names(Layout::Janus)[5], "decoder.up.2.block.2.conv1.weight");
        assert_eq!(
            names(Layout::LlamaGen),
            [
                "encoder.conv_blocks.1.res.0.nin_shortcut.weight",
                "encoder.conv_blocks.1.attn.0.proj_out.bias",
                "encoder.conv_blocks.0.downsample.conv.weight",
                "encoder.mid.1.norm.weight",
                "decoder.mid.2.norm1.bias",
                "decoder.conv_blocks.2.res.2.conv1.weight",
                "decoder.conv_blocks.0.upsample.conv.weight",
                "decoder.norm_out.weight",
                "quantize.embedding.weight",
            ]
        );
        assert_eq!(
            names(Layout::Diffusers),
            [
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
                "encoder.down_blocks.1.attentions.0.to_out.0.bias",
                "encoder.down_blocks.0.downsamplers.0.conv.weight",
                "encoder.mid_block.attentions.0.group_norm.weight",
                "decoder.mid_block.resnets.1.norm1.bias",
                "decoder.up_blocks.2.resnets.2.conv1.weight",
                "decoder.up_blocks.0.upsamplers.0.conv.weight",
                "decoder.conv_norm_out.weight",
                "quantize.embedding.weight",
            ]
        );
        assert_eq!(names(Layout::OldDiffusers)[1], "encoder.down_blocks.1.attentions.0.proj_attn.bias");
    }

    #[test]
    fn diffusers_attention_is_linear() {
        let shape = |layout: Layout, name| layout.shape(name, &[8, 8, 1, 1]);
        assert_eq!(shape(Layout::Diffusers, "encoder.mid.attn_1.q.weight"), [8, 8]);
        assert_eq!(shape(Layout::Diffusers, "encoder.down.0.block.0.nin_shortcut.weight"), [8, 8, 1, 1]);
        assert_eq!(shape(Layout::LlamaGen, "encoder.mid.attn_1.q.weight"), [8, 8, 1, 1]);
    }

    #[test]
    fn what_cannot_be_taken_over_is_said() {
        let message = |names: &[&str]| Layout::detect(names.iter().copied()).unwrap_err();
        assert_eq!(
            message(&["head.weight"]),
            "holds no `encoder.conv_in.weight`, alone or after first_stage_model., model.vqmodel., vqmodel., \
             gen_vision_model."
        );
        let chameleon = ["model.vqmodel.encoder.conv_in.weight", "model.layers.0.weight"];
        assert!(message(&chameleon).starts_with("holds no `decoder`, as Chameleon's files"));
        assert!(message(&[FIRST, "decoder.conv_in.weight"]).starts_with("has an encoder that is not"));
    }
}
