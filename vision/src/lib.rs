//! Pictures to patch features: the way by which a transformer sees.
//!
//! M6 takes the features of 2-D patches from a ResNet-50 trained beforehand (M6, section 3); ViT projects the pixels of a
//! patch (Dosovitskiy et al. 2021); small stacks learn faster through a few convolutions.
//!
//! Legend: `b` pictures, `c` channels, `g` patches a side, `p` pixels a side of a patch, `d` model width.

mod convolutions;
mod resnet;

use std::path::Path;

use m6_runtime::nn::Linear;
use m6_runtime::{Init, Params, Result};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use convolutions::Convolutions;
pub use convolutions::NORM_GROUPS;
pub use resnet::Depth;
use resnet::Resnet;

const COLOURS: i64 = 3;
/// Keeps a damaged or absurd config from asking for all memory.
const MAX_RESOLUTION: i64 = 1 << 13;

/// How pictures become features: `resolution`, and one of `channels`, `linear` and `resnet`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub struct PatchConfig {
    /// Side of the square pictures, in pixels.
    pub resolution: i64,
    /// What makes the features.
    pub extractor: Extractor,
}

/// What makes features of a patch, before they are projected to the model's width.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Extractor {
    /// `channels`: convolutions that are trained with the stack, by the channels of each; every one halves the side. Each
    /// a multiple of [`NORM_GROUPS`].
    Convolutions(Vec<i64>),
    /// `linear`: the pixels of a patch themselves, as in ViT, by the patch's side.
    Linear(i64),
    /// `resnet`: a ResNet that was trained beforehand and stays as it is, as in M6, by its layers.
    Resnet(Depth),
}

#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fields {
    resolution: i64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    channels: Option<Vec<i64>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    linear: Option<i64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    resnet: Option<Depth>,
}

impl TryFrom<Fields> for PatchConfig {
    type Error = String;

    fn try_from(fields: Fields) -> std::result::Result<Self, String> {
        let extractor = match (fields.channels, fields.linear, fields.resnet) {
            (Some(channels), None, None) => Extractor::Convolutions(channels),
            (None, Some(side), None) => Extractor::Linear(side),
            (None, None, Some(depth)) => Extractor::Resnet(depth),
            _ => return Err("expected one of the keys channels, linear and resnet".to_owned()),
        };
        Ok(Self { resolution: fields.resolution, extractor })
    }
}

impl From<PatchConfig> for Fields {
    fn from(PatchConfig { resolution, extractor }: PatchConfig) -> Self {
        let mut fields = Self { resolution, channels: None, linear: None, resnet: None };
        match extractor {
            Extractor::Convolutions(channels) => fields.channels = Some(channels),
            Extractor::Linear(side) => fields.linear = Some(side),
            Extractor::Resnet(depth) => fields.resnet = Some(depth),
        }
        fields
    }
}

impl PatchConfig {
    /// Convolutions of these channels on pictures of this side.
    pub fn convolutions(resolution: i64, channels: &[i64]) -> Self {
        Self { resolution, extractor: Extractor::Convolutions(channels.to_vec()) }
    }

    /// Pixels a side of a patch, `p`.
    pub fn stride(&self) -> i64 {
        match &self.extractor {
            Extractor::Convolutions(channels) => 1 << channels.len(),
            Extractor::Linear(side) => *side,
            Extractor::Resnet(_) => Depth::STRIDE,
        }
    }

    /// Patches a side, `g`.
    pub fn grid(&self) -> i64 {
        self.resolution / self.stride()
    }

    /// Values of a patch before they are projected.
    pub fn features(&self) -> i64 {
        match &self.extractor {
            Extractor::Convolutions(channels) => channels.last().copied().unwrap_or(COLOURS),
            Extractor::Linear(side) => COLOURS * side * side,
            Extractor::Resnet(_) => Depth::FEATURES,
        }
    }

    /// The depth of the network that comes trained, where there is one.
    pub fn trained(&self) -> Option<Depth> {
        match self.extractor {
            Extractor::Resnet(depth) => Some(depth),
            Extractor::Convolutions(_) | Extractor::Linear(_) => None,
        }
    }

    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When there are no channels, a width that the norm cannot group, or a side that does not divide into patches.
    pub fn validate(&self) -> std::result::Result<(), String> {
        if self.resolution > MAX_RESOLUTION {
            return Err(format!("resolution = {}: expected at most {MAX_RESOLUTION}", self.resolution));
        }
        match &self.extractor {
            Extractor::Convolutions(channels) => convolutions::validate(channels)?,
            Extractor::Linear(side) if *side < 1 => {
                return Err(format!("linear = {side}: expected a side of at least one pixel"));
            }
            Extractor::Linear(_) | Extractor::Resnet(_) => {}
        }
        if self.resolution <= 0 || self.resolution % self.stride() != 0 {
            return Err(format!(
                "resolution = {}: expected a multiple of {}",
                self.resolution,
                self.stride()
            ));
        }
        Ok(())
    }
}

/// Features of patches, and a projection to the model's width.
#[derive(Debug)]
pub struct PatchEncoder {
    extract: Extract,
    project: Linear,
}

#[derive(Debug)]
enum Extract {
    Convolutions(Convolutions),
    /// By the patch's side.
    Linear(i64),
    Resnet(Resnet),
}

impl PatchEncoder {
    /// An encoder whose features have `width` values.
    pub fn new(params: &Params, config: &PatchConfig, width: i64) -> Self {
        let extract = match &config.extractor {
            Extractor::Convolutions(channels) => Extract::Convolutions(Convolutions::new(params, channels)),
            Extractor::Linear(side) => Extract::Linear(*side),
            Extractor::Resnet(depth) => Extract::Resnet(Resnet::new(&(params / RESNET), *depth)),
        };
        let init = Init::Normal(1.0 / (config.features() as f64).sqrt());
        Self { extract, project: Linear::new(&(params / "project"), config.features(), width, init) }
    }

    /// `[b, 3, side, side]` bytes to features `[b * g * g, d]` in `kind`, row-major within a picture.
    pub fn forward(&self, pictures: &Tensor, kind: Kind) -> Tensor {
        let rows = |features: Tensor| features.flatten(2, 3).transpose(1, 2); // [b, g * g, c]
        let x_bgc = match &self.extract {
            Extract::Convolutions(convolutions) => rows(convolutions.forward(pictures, kind)),
            Extract::Linear(side) => pixels(&centred(pictures).to_kind(kind), *side),
            Extract::Resnet(resnet) => rows(resnet.forward(pictures, kind)),
        };
        self.project.forward(&x_bgc).flatten(0, 1)
    }
}

/// What the tensors of a trained network begin with.
const RESNET: &str = "resnet";

/// Fills the trained network of the encoder under `params` from `path`, a file of torch or safetensors with the names that
/// torchvision and timm give to ResNets; what they classify by is left out.
///
/// # Errors
/// When the file cannot be read, holds NaN, or is of another network.
pub fn load_trained(params: &Params, path: &Path) -> Result<()> {
    resnet::load(&(params / RESNET), path)
}

/// Bytes to about [-1, 1].
fn centred(pictures: &Tensor) -> Tensor {
    const HALF_RANGE: f64 = 127.5;
    pictures.to_kind(Kind::Float) / HALF_RANGE - 1.0
}

/// `[b, 3, side, side]` to the values of each patch, `[b, g * g, 3 * p * p]`, in the order of a convolution's kernel.
fn pixels(x: &Tensor, p: i64) -> Tensor {
    let (b, side) = (x.size()[0], x.size()[2]);
    let g = side / p;
    let x_bgpgp = x.view([b, COLOURS, g, p, g, p]);
    x_bgpgp.permute([0, 2, 4, 1, 3, 5]).reshape([b, g * g, COLOURS * p * p])
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn config() -> PatchConfig {
        PatchConfig::convolutions(32, &[16, 32, 32])
    }

    #[test]
    fn features_are_row_major_and_in_the_asked_dtype() {
        let of_patches = PatchConfig { extractor: Extractor::Linear(8), ..config() };
        for config in [config(), of_patches] {
            let params = Params::new(Device::Cpu, 1);
            let encoder = PatchEncoder::new(&params, &config, 24);
            let dark = Tensor::zeros([2, 3, 32, 32], (Kind::Uint8, Device::Cpu));
            let features = encoder.forward(&dark, Kind::Float);
            assert_eq!(features.size(), [2 * 16, 24]);
            assert_eq!(encoder.forward(&dark, Kind::BFloat16).kind(), Kind::BFloat16);
            // A bright corner at the upper right of the second picture is felt most at patch (0, 3) of that picture.
            let lit = dark.copy();
            let _ = lit.get(1).narrow(1, 0, 6).narrow(2, 26, 6).fill_(255);
            let change = (encoder.forward(&lit, Kind::Float) - features).abs().sum_dim_intlist(
                [1].as_slice(),
                false,
                Kind::Float,
            );
            assert_eq!(change.argmax(None, false).int64_value(&[]), 16 + 3);
        }
    }

    /// ViT's own form is a convolution whose kernel is a patch.
    #[test]
    fn linear_patches_are_a_convolution() {
        let params = Params::new(Device::Cpu, 1);
        let config = PatchConfig { resolution: 12, extractor: Extractor::Linear(4) };
        let encoder = PatchEncoder::new(&params, &config, 5);
        let pictures = Tensor::randint(256, [2, 3, 12, 12], (Kind::Uint8, Device::Cpu));
        let kernel = params.tensors()["project.weight"].view([5, 3, 4, 4]);
        let bias = &params.tensors()["project.bias"];
        let expected = centred(&pictures).conv2d(&kernel, Some(bias), [4, 4], [0, 0], [1, 1], 1);
        let expected = expected.flatten(2, 3).transpose(1, 2).flatten(0, 1);
        let difference = (encoder.forward(&pictures, Kind::Float) - expected).abs().max();
        assert!(difference.double_value(&[]) < 1e-5);
    }

    #[test]
    fn wrong_settings_are_named() {
        let wrong = PatchConfig { resolution: 30, ..config() };
        assert_eq!(wrong.validate().unwrap_err(), "resolution = 30: expected a multiple of 8");
        let error = PatchConfig::convolutions(32, &[10]).validate().unwrap_err();
        assert_eq!(error, "channels = [10]: 10 is not a multiple of 16 up to 65536");
        let wrong = PatchConfig { resolution: 32, extractor: Extractor::Linear(0) };
        assert_eq!(wrong.validate().unwrap_err(), "linear = 0: expected a side of at least one pixel");
        let wrong = PatchConfig { resolution: 48, extractor: Extractor::Resnet(Depth::Fifty) };
        assert_eq!(wrong.validate().unwrap_err(), "resolution = 48: expected a multiple of 32");
        assert!(config().validate().is_ok());
    }

    #[test]
    fn one_key_says_what_makes_the_features() {
        let read = |text: &str| serde_json::from_str::<PatchConfig>(text).map_err(|error| error.to_string());
        for text in [
            r#"{"resolution":32,"channels":[16,32,32]}"#,
            r#"{"resolution":224,"linear":16}"#,
            r#"{"resolution":128,"resnet":50}"#,
        ] {
            let config = read(text).unwrap();
            assert_eq!(serde_json::to_string(&config).unwrap(), text);
            assert!(config.validate().is_ok());
        }
        for (text, problem) in [
            (r#"{"resolution":32}"#, "expected one of the keys channels, linear and resnet"),
            (r#"{"resolution":32,"linear":16,"resnet":50}"#, "expected one of the keys"),
            (r#"{"resolution":32,"resnet":18}"#, "resnet = 18: expected 50, 101 or 152 layers"),
            (r#"{"resolution":32,"linear":16,"depth":50}"#, "unknown field `depth`"),
        ] {
            assert!(read(text).unwrap_err().starts_with(problem), "{text}");
        }
    }
}
