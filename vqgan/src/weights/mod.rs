//! Weights of other projects in and out. They are of the same network, under other names.
//!
//! What a file holds follows from its names ([`Layout`]) and the shape of the network from the shapes of its tensors,
//! but for the side of the pictures that it was trained on.

mod layout;

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use m6_run::write_atomic;
use m6_runtime::{Params, RuntimeError, WeightFile, first_problems, write_tensors};
use serde_json::{Value, json};
use tch::{Device, Tensor};

pub use layout::Layout;

use crate::config::{NORM_GROUPS, QuantizerKind, VqganConfig};
use crate::error::{Result, VqganError};
use crate::model::{CONFIG_FILE, Dtype, Vqgan};
use crate::quantize::normalize;
use layout::is_of_training;

/// Name of the codebook in our state dict, but for Gumbel quantisers.
const CODEBOOK: &str = "quantize.embedding.weight";
/// Name of a Gumbel quantiser's codebook, in taming-transformers too.
const GUMBEL_CODEBOOK: &str = "quantize.embed.weight";
/// What stands before the names of the layer between the frozen table of SimVQ and its codes.
const SIMVQ_LAYER: &str = "quantize.embedding_proj.";
const DIFFUSERS_FILE: &str = "diffusion_pytorch_model.safetensors";
const DIFFUSERS_CLASS: &str = "VQModel";

/// What [`import`] has read.
#[derive(Debug)]
pub struct Imported {
    /// Whose names the tensors had.
    pub layout: Layout,
    /// The network.
    pub config: VqganConfig,
    /// Names of tensors that are no part of it, such as a discriminator's.
    pub left_out: Vec<String>,
}

/// Reads the weights in `source`, a safetensors or torch file or a folder with one, and writes them as a model folder
/// `out`. `resolution` is the side of the pictures that the network was trained on, which only a folder of this program
/// records.
///
/// # Errors
/// When the file cannot be read, is of another network, lacks a tensor or has one too many, or holds NaN.
pub fn import(source: &Path, out: &Path, resolution: i64, dtype: Dtype) -> Result<Imported> {
    if is_own(source) {
        let model = Vqgan::load(source, Device::Cpu)?;
        model.save(out, dtype)?;
        return Ok(Imported { layout: Layout::Own, config: model.config().clone(), left_out: Vec::new() });
    }
    let foreign = Foreign::open(source)?;
    let config = foreign.config(resolution)?;
    if matches!(foreign.layout, Layout::Diffusers | Layout::OldDiffusers) {
        check_diffusers_config(&foreign.file.path().with_file_name(CONFIG_FILE))?;
    }
    let params = Params::new(Device::Cpu, 0);
    let model = Vqgan::new(&params, &config);
    let left_out = foreign.load(&params)?;
    model.save(out, dtype)?;
    Ok(Imported { layout: foreign.layout, config, left_out })
}

/// Writes the model in folder `dir` as float32 under the names of `layout`: a safetensors file `out`, or a folder for
/// diffusers.
///
/// Codes chosen by angle become unit vectors for projects that choose by distance. That gives the same codes, since
/// among vectors of one length the nearest is the one of the smallest angle. SimVQ's table and layer become the codes
/// that they make.
///
/// # Errors
/// When the model cannot be read, the project has no such network, or the file cannot be written.
pub fn export(dir: &Path, layout: Layout, out: &Path) -> Result<()> {
    let model = Vqgan::load(dir, Device::Cpu)?;
    let config = model.config();
    if let Some(reason) = unknown_to(layout, config) {
        return Err(VqganError::model(&dir.join(CONFIG_FILE), format!("{layout} has no network {reason}")));
    }
    let codes = match config.quantizer {
        QuantizerKind::Normalized if !layout.is_normalized() => normalize(&model.codebook()),
        _ => model.codebook(),
    };
    let tensors: Vec<(String, Tensor)> = model
        .tensors()
        .into_iter()
        .filter(|(own, _)| !own.starts_with(SIMVQ_LAYER))
        .map(|(own, tensor)| {
            let tensor = if own == CODEBOOK { codes.shallow_clone() } else { tensor };
            let shape = layout.shape(&own, &tensor.size());
            (layout.name(&own, config.ch_mult.len()), tensor.reshape(shape))
        })
        .collect();
    if layout != Layout::Diffusers {
        return Ok(write_tensors(out, &tensors)?);
    }
    fs::create_dir_all(out).map_err(|error| VqganError::model(out, error))?;
    write_tensors(&out.join(DIFFUSERS_FILE), &tensors)?;
    let path = out.join(CONFIG_FILE);
    let json = serde_json::to_vec_pretty(&diffusers_config(config));
    Ok(write_atomic(&path, &json.map_err(|error| VqganError::model(&path, error))?)?)
}

/// What a network has that `layout` cannot say.
fn unknown_to(layout: Layout, config: &VqganConfig) -> Option<String> {
    let last = config.resolution >> (config.ch_mult.len() - 1);
    match layout {
        Layout::LlamaGen | Layout::Janus if config.quantizer != QuantizerKind::Normalized => {
            Some(format!("with the quantiser `{}`", config.quantizer))
        }
        Layout::Diffusers | Layout::OldDiffusers if config.quantizer == QuantizerKind::Gumbel => {
            Some(format!("with the quantiser `{}`", config.quantizer))
        }
        Layout::LlamaGen | Layout::Janus if !config.mid_attention || config.attn_resolutions != [last] => {
            Some(format!("but with attention in the middle and at the side {last} alone"))
        }
        Layout::Diffusers | Layout::OldDiffusers if config.ch_mult[0] != 1 => {
            Some(format!("whose first `ch_mult` is {}, expected 1", config.ch_mult[0]))
        }
        _ => None,
    }
}

/// `config.json` of a diffusers folder.
fn diffusers_config(config: &VqganConfig) -> Value {
    let levels = 0..config.ch_mult.len();
    let block = |level: usize, plain: &str| {
        if config.has_attention(level) { format!("Attn{plain}") } else { plain.to_owned() }
    };
    let down: Vec<_> = levels.clone().map(|level| block(level, "DownEncoderBlock2D")).collect();
    let up: Vec<_> = levels.clone().rev().map(|level| block(level, "UpDecoderBlock2D")).collect();
    json!({
        "_class_name": DIFFUSERS_CLASS,
        "act_fn": "silu",
        "block_out_channels": levels.map(|level| config.width(level)).collect::<Vec<_>>(),
        "down_block_types": down,
        "in_channels": 3,
        "latent_channels": config.z_channels,
        "layers_per_block": config.num_res_blocks,
        "mid_block_add_attention": config.mid_attention,
        "norm_num_groups": NORM_GROUPS,
        "norm_type": "group",
        "num_vq_embeddings": config.codebook_size,
        "out_channels": 3,
        "sample_size": config.resolution,
        "up_block_types": up,
        "vq_embed_dim": config.code_dim,
    })
}

/// Checks what the tensors of a diffusers folder do not tell, where its config is there. Its `sample_size` is not
/// taken for the resolution: published folders have the default there.
fn check_diffusers_config(path: &Path) -> Result<()> {
    let Ok(bytes) = fs::read(path) else { return Ok(()) };
    let config: Value = serde_json::from_slice(&bytes).map_err(|error| VqganError::model(path, error))?;
    for (key, expected) in [
        ("_class_name", json!(DIFFUSERS_CLASS)),
        ("act_fn", json!("silu")),
        ("norm_num_groups", json!(NORM_GROUPS)),
        ("norm_type", json!("group")),
    ] {
        if let Some(found) = config.get(key).filter(|found| **found != expected) {
            return Err(VqganError::model(path, format!("`{key}` is {found}, expected {expected}")));
        }
    }
    Ok(())
}

/// Whether `source` is a model folder of this program.
fn is_own(source: &Path) -> bool {
    let config = fs::read(source.join(CONFIG_FILE)).ok();
    let config = config.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    config.is_some_and(|config| config.get("model").is_some_and(|model| model.get("ch_mult").is_some()))
}

/// Weights of another project.
struct Foreign {
    file: WeightFile,
    layout: Layout,
    prefix: &'static str,
    levels: usize,
}

impl Foreign {
    fn open(source: &Path) -> Result<Self> {
        let file = WeightFile::open(source)?;
        let names = file.shapes().keys().map(String::as_str);
        let (layout, prefix) =
            Layout::detect(names).map_err(|reason| VqganError::model(file.path(), reason))?;
        let mut foreign = Self { file, layout, prefix, levels: 0 };
        foreign.levels = foreign.count(|level| format!("encoder.down.{level}.block.0.conv2.weight"));
        Ok(foreign)
    }

    /// The name in the file of our tensor `own`.
    fn name(&self, own: &str) -> String {
        format!("{}{}", self.prefix, self.layout.name(own, self.levels))
    }

    fn has(&self, own: &str) -> bool {
        self.file.shapes().contains_key(&self.name(own))
    }

    /// How many of our tensors `own(0)`, `own(1)`, ... there are.
    fn count(&self, own: impl Fn(usize) -> String) -> usize {
        (0..).take_while(|&index| self.has(&own(index))).count()
    }

    /// Length of an axis of our tensor `own`.
    fn length(&self, own: &str, axis: usize) -> Result<i64> {
        let name = self.name(own);
        let shape = self.file.shapes().get(&name).ok_or_else(|| self.problem(self.file.missing(&name)))?;
        let length = shape.get(axis).filter(|&&length| length > 0);
        length.copied().ok_or_else(|| self.problem(format!("`{name}` has shape {shape:?}")))
    }

    fn problem(&self, reason: String) -> VqganError {
        VqganError::model(self.file.path(), reason)
    }

    /// The network whose tensors these are.
    fn config(&self, resolution: i64) -> Result<VqganConfig> {
        let ch = self.length("encoder.conv_in.weight", 0)?;
        let mut ch_mult = Vec::new();
        for level in 0..self.levels {
            let width = self.length(&format!("encoder.down.{level}.block.0.conv2.weight"), 0)?;
            if width % ch != 0 {
                let reason =
                    format!("level {level} has {width} channels, expected a multiple of the first {ch}");
                return Err(self.problem(reason));
            }
            ch_mult.push(width / ch);
        }
        let side = |level: usize| resolution.checked_shr(level as u32).unwrap_or(0);
        let attention = |level: &usize| self.has(&format!("encoder.down.{level}.attn.0.norm.weight"));
        let (quantizer, codebook) = if self.has(GUMBEL_CODEBOOK) {
            (QuantizerKind::Gumbel, GUMBEL_CODEBOOK)
        } else if self.layout.is_normalized() {
            (QuantizerKind::Normalized, CODEBOOK)
        } else {
            (QuantizerKind::Nearest, CODEBOOK)
        };
        let blocks = self.count(|block| format!("encoder.down.0.block.{block}.conv2.weight"));
        let config = VqganConfig {
            resolution,
            ch,
            ch_mult,
            num_res_blocks: blocks as i64,
            attn_resolutions: (0..self.levels).filter(attention).map(side).collect(),
            mid_attention: self.has("encoder.mid.attn_1.norm.weight"),
            z_channels: self.length("encoder.conv_out.weight", 0)?,
            codebook_size: self.length(codebook, 0)?,
            code_dim: self.length(codebook, 1)?,
            quantizer,
        };
        let valid = config.validate();
        valid.map_err(|problem| self.problem(format!("`{}` is {}", problem.key, problem.message)))?;
        Ok(config)
    }

    /// Reads all weights into `params`; returns the names of the tensors that no network has.
    fn load(&self, params: &Params) -> Result<Vec<String>> {
        let mut rest: BTreeSet<&str> = self.file.shapes().keys().map(String::as_str).collect();
        let mut problems = Vec::new();
        let mut pairs = Vec::new();
        for (own, param) in params.entries() {
            let name = self.name(&own);
            let expected = self.layout.shape(&own, &param.tensor.size());
            rest.remove(name.as_str());
            match self.file.shapes().get(&name) {
                None => problems.push(format!("{}, the model needs {expected:?}", self.file.missing(&name))),
                Some(shape) if *shape != expected => {
                    problems.push(format!("`{name}` has shape {shape:?}, the model needs {expected:?}"));
                }
                Some(_) => pairs.push((name, param.tensor)),
            }
        }
        let (left_out, unknown): (Vec<&str>, Vec<&str>) =
            rest.into_iter().partition(|name| name.strip_prefix(self.prefix).is_none_or(is_of_training));
        problems.extend(unknown.into_iter().map(|name| {
            format!("`{name}` of shape {:?} is not part of the model", self.file.shapes()[name])
        }));
        if !problems.is_empty() {
            let (path, problem) = (self.file.path().to_owned(), first_problems(&problems));
            return Err(RuntimeError::Mismatch { path, problem }.into());
        }
        let _guard = tch::no_grad_guard();
        for (name, mut target) in pairs {
            let source = self.file.read(&name)?;
            target.f_copy_(&source.f_reshape(target.size())?)?;
        }
        Ok(left_out.into_iter().map(str::to_owned).collect())
    }
}
