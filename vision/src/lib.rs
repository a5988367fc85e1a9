//! Pictures to patch features: the way by which a transformer sees.
//!
//! M6 takes the features of 2-D patches from a ResNet-50 trained beforehand (M6, section 3). Here the extractor is a
//! small stack of strided convolutions that is trained with the transformer: at this size it learns faster than
//! linear patches (Xiao et al. 2021, "Early convolutions help transformers see better").
//!
//! Legend: `b` pictures, `c` channels, `g` patches a side, `d` model width.

use m6_runtime::nn::{Conv2d, GroupNorm, Linear};
use m6_runtime::{Init, Params};
use tch::{Kind, Tensor};

/// Shape of the extractor.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PatchConfig {
    /// Side of the square pictures, in pixels.
    pub resolution: i64,
    /// Channels of each convolution; every one halves the side. Each a multiple of [`NORM_GROUPS`].
    pub channels: Vec<i64>,
}

/// Groups of the norms between the convolutions.
pub const NORM_GROUPS: i64 = 16;
const NORM_EPS: f64 = 1e-6;
/// Bounds that keep a damaged or absurd config from asking for all memory.
const MAX_RESOLUTION: i64 = 1 << 13;
const MAX_CHANNELS: i64 = 1 << 16;

impl PatchConfig {
    /// Patches a side, `g`.
    pub fn grid(&self) -> i64 {
        self.resolution >> self.channels.len()
    }

    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When there are no channels, a width that the norm cannot group, or a side that cannot be halved so often.
    pub fn validate(&self) -> Result<(), String> {
        let halvings = self.channels.len() as u32;
        if halvings == 0 || halvings > 8 {
            return Err(format!("channels = {:?}: expected one to eight widths", self.channels));
        }
        if let Some(width) =
            self.channels.iter().find(|&&c| !(1..=MAX_CHANNELS).contains(&c) || c % NORM_GROUPS != 0)
        {
            return Err(format!(
                "channels = {:?}: {width} is not a multiple of {NORM_GROUPS} up to {MAX_CHANNELS}",
                self.channels
            ));
        }
        if self.resolution > MAX_RESOLUTION {
            return Err(format!("resolution = {}: expected at most {MAX_RESOLUTION}", self.resolution));
        }
        if self.resolution <= 0 || self.resolution % (1 << halvings) != 0 {
            return Err(format!(
                "resolution = {}: expected a multiple of {}",
                self.resolution,
                1 << halvings
            ));
        }
        Ok(())
    }
}

/// Convolutions of stride 2 with norm and SiLU between them, then a projection to the model's width.
#[derive(Debug)]
pub struct PatchEncoder {
    convolutions: Vec<(Conv2d, GroupNorm)>,
    project: Linear,
}

impl PatchEncoder {
    /// An extractor whose features have `width` values.
    pub fn new(params: &Params, config: &PatchConfig, width: i64) -> Self {
        let mut input = 3;
        let convolutions = config.channels.iter().enumerate().map(|(i, &output)| {
            let conv = Conv2d::new(&(params / "conv" / i), input, output, 3, 2, 1);
            input = output;
            (conv, GroupNorm::new(&(params / "norm" / i), NORM_GROUPS, output, NORM_EPS))
        });
        let convolutions = convolutions.collect();
        let project =
            Linear::new(&(params / "project"), input, width, Init::Normal(1.0 / (input as f64).sqrt()));
        Self { convolutions, project }
    }

    /// `[b, 3, side, side]` bytes to features `[b * g * g, d]` in `kind`, row-major within a picture.
    pub fn forward(&self, pictures: &Tensor, kind: Kind) -> Tensor {
        /// Bytes to about [-1, 1].
        const HALF_RANGE: f64 = 127.5;
        let mut x = (pictures.to_kind(Kind::Float) / HALF_RANGE - 1.0).to_kind(kind);
        for (conv, norm) in &self.convolutions {
            x = norm.forward(&conv.forward(&x)).silu();
        }
        let x_bgd = x.flatten(2, 3).transpose(1, 2); // [b, g * g, c]
        self.project.forward(&x_bgd).flatten(0, 1)
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    fn config() -> PatchConfig {
        PatchConfig { resolution: 32, channels: vec![16, 32, 32] }
    }

    #[test]
    fn features_are_row_major_and_in_the_asked_dtype() {
        let params = Params::new(Device::Cpu, 1);
        let encoder = PatchEncoder::new(&params, &config(), 24);
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

    #[test]
    fn wrong_settings_are_named() {
        let wrong = PatchConfig { resolution: 30, ..config() };
        assert_eq!(wrong.validate().unwrap_err(), "resolution = 30: expected a multiple of 8");
        let wrong = PatchConfig { channels: vec![10], ..config() };
        assert_eq!(wrong.validate().unwrap_err(), "channels = [10]: 10 is not a multiple of 16 up to 65536");
        assert!(config().validate().is_ok());
    }
}
