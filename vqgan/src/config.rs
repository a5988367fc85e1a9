//! The shape of an image tokenizer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Groups of every group norm (taming-transformers' `Normalize`).
pub(crate) const NORM_GROUPS: i64 = 32;
/// Colour channels of a picture.
pub(crate) const COLOURS: i64 = 3;
/// The structural losses and SSIM look through a window of 11 pixels.
const MIN_RESOLUTION: i64 = 16;
const MAX_RESOLUTION: i64 = 4096;
const MAX_WIDTH: i64 = 1 << 16;
const MAX_LEVELS: usize = 8;

/// How a position gets its code.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum QuantizerKind {
    /// By the angle: the encoder's rows and the codes are scaled to length one (LlamaGen, Sun et al. 2024).
    #[default]
    Normalized,
    /// By the distance between rows as they are (van den Oord et al. 2017; taming-transformers, Chameleon).
    Nearest,
    /// By that distance too, but the codes are frozen random rows times one learned matrix, so that each step moves all
    /// of them (SimVQ, Zhu et al. 2024).
    SimVq,
    /// By the largest of the logits that a projection gives the codes (taming-transformers' `GumbelQuantize`; DALL-E,
    /// Ramesh et al. 2021).
    Gumbel,
}

impl QuantizerKind {
    /// Whether a code is a row that can be put anywhere without moving the others, to where rows of the encoder are.
    pub(crate) fn has_free_codes(self) -> bool {
        matches!(self, Self::Normalized | Self::Nearest)
    }
}

impl fmt::Display for QuantizerKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Normalized => "normalized",
            Self::Nearest => "nearest",
            Self::SimVq => "simvq",
            Self::Gumbel => "gumbel",
        })
    }
}

/// Encoder, decoder and codebook, under the names of taming-transformers' `ddconfig` (Esser et al. 2021).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqganConfig {
    /// Side of the training pictures in pixels. The network is convolutional and takes other sizes too.
    pub resolution: i64,
    /// Channels of the outermost level.
    pub ch: i64,
    /// Channels of each level as a multiple of `ch`, outermost first; each further level halves the sides.
    pub ch_mult: Vec<i64>,
    /// Residual blocks a level in the encoder; the decoder has one more.
    pub num_res_blocks: i64,
    /// Levels with attention, by their side at `resolution`.
    #[serde(default)]
    pub attn_resolutions: Vec<i64>,
    /// Whether there is attention between the two innermost blocks of each half.
    #[serde(default = "yes")]
    pub mid_attention: bool,
    /// Channels between the encoder and the projection to codes.
    pub z_channels: i64,
    /// Codes in the codebook.
    pub codebook_size: i64,
    /// Width of a code; small for normalised codes.
    pub code_dim: i64,
    /// How a position gets its code.
    #[serde(default)]
    pub quantizer: QuantizerKind,
}

fn yes() -> bool {
    true
}

/// A key of a config's table and what is wrong with its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigProblem {
    /// The key.
    pub key: &'static str,
    /// The value found and what was expected.
    pub message: String,
}

impl VqganConfig {
    /// Pixels a code, along each side.
    #[must_use]
    pub fn downsample(&self) -> i64 {
        1 << (self.ch_mult.len() - 1)
    }

    /// Codes along each side of a picture of `resolution`.
    #[must_use]
    pub fn grid(&self) -> i64 {
        self.resolution / self.downsample()
    }

    /// Channels of level `level`, 0 being the outermost.
    pub(crate) fn width(&self, level: usize) -> i64 {
        self.ch * self.ch_mult[level]
    }

    /// Channels of the innermost level.
    pub(crate) fn inner_width(&self) -> i64 {
        self.width(self.ch_mult.len() - 1)
    }

    /// Whether the blocks of level `level` have attention.
    pub(crate) fn has_attention(&self, level: usize) -> bool {
        self.attn_resolutions.contains(&(self.resolution >> level))
    }

    /// Checks that the network can be built and the numbers are sane.
    ///
    /// # Errors
    /// The first key whose value does not fit.
    pub fn validate(&self) -> Result<(), ConfigProblem> {
        let problem = |key, message| Err(ConfigProblem { key, message });
        let in_range = |key, value: i64, low: i64, high: i64| {
            if (low..=high).contains(&value) {
                return Ok(());
            }
            problem(key, format!("{value}, expected {low} to {high}"))
        };
        in_range("resolution", self.resolution, MIN_RESOLUTION, MAX_RESOLUTION)?;
        in_range("ch", self.ch, 1, MAX_WIDTH)?;
        in_range("num_res_blocks", self.num_res_blocks, 1, MAX_WIDTH)?;
        in_range("z_channels", self.z_channels, 1, MAX_WIDTH)?;
        in_range("codebook_size", self.codebook_size, 2, i64::from(i32::MAX))?;
        in_range("code_dim", self.code_dim, 2, MAX_WIDTH)?;
        if !(1..=MAX_LEVELS).contains(&self.ch_mult.len()) {
            return problem("ch_mult", format!("{} levels, expected 1 to {MAX_LEVELS}", self.ch_mult.len()));
        }
        for &multiple in &self.ch_mult {
            in_range("ch_mult", multiple, 1, MAX_WIDTH)?;
            if self.ch * multiple % NORM_GROUPS != 0 {
                let message = format!(
                    "{multiple} times `ch` = {} is {} channels, expected a multiple of {NORM_GROUPS} (the norm groups)",
                    self.ch,
                    self.ch * multiple
                );
                return problem("ch_mult", message);
            }
        }
        if self.ch % NORM_GROUPS != 0 {
            return problem(
                "ch",
                format!("{}, expected a multiple of {NORM_GROUPS} (the norm groups)", self.ch),
            );
        }
        if self.resolution % self.downsample() != 0 {
            let message = format!(
                "{}, expected a multiple of {} (`ch_mult` has {} levels)",
                self.resolution,
                self.downsample(),
                self.ch_mult.len()
            );
            return problem("resolution", message);
        }
        let sides: Vec<i64> = (0..self.ch_mult.len()).map(|level| self.resolution >> level).collect();
        match self.attn_resolutions.iter().find(|side| !sides.contains(side)) {
            None => Ok(()),
            Some(side) => problem("attn_resolutions", format!("{side}, expected sides among {sides:?}")),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The smallest network that has every kind of layer.
    pub(crate) fn tiny() -> VqganConfig {
        VqganConfig {
            resolution: 16,
            ch: 32,
            ch_mult: vec![1, 2],
            num_res_blocks: 1,
            attn_resolutions: vec![8],
            z_channels: 16,
            codebook_size: 32,
            code_dim: 8,
            mid_attention: true,
            quantizer: QuantizerKind::Normalized,
        }
    }

    #[test]
    fn keys_that_came_later_have_the_meaning_of_before() {
        let old = serde_json::json!({
            "resolution": 16, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [8],
            "z_channels": 16, "codebook_size": 32, "code_dim": 8
        });
        assert_eq!(serde_json::from_value::<VqganConfig>(old).unwrap(), tiny());
    }

    #[test]
    fn factor_and_grid_follow_from_the_levels() {
        let config = VqganConfig { resolution: 128, ch_mult: vec![1, 1, 2, 2], ..tiny() };
        assert_eq!((config.downsample(), config.grid()), (8, 16));
    }

    #[test]
    fn every_bad_value_is_named() {
        let message = |config: VqganConfig| {
            let problem = config.validate().unwrap_err();
            format!("{}: {}", problem.key, problem.message)
        };
        tiny().validate().unwrap();
        assert_eq!(
            message(VqganConfig { resolution: 17, ..tiny() }),
            "resolution: 17, expected a multiple of 2 (`ch_mult` has 2 levels)"
        );
        assert_eq!(message(VqganConfig { ch_mult: vec![], ..tiny() }), "ch_mult: 0 levels, expected 1 to 8");
        assert_eq!(
            message(VqganConfig { ch: 48, ch_mult: vec![2], ..tiny() }),
            "ch: 48, expected a multiple of 32 (the norm groups)"
        );
        assert_eq!(
            message(VqganConfig { ch: 48, ..tiny() }),
            "ch_mult: 1 times `ch` = 48 is 48 channels, expected a multiple of 32 (the norm groups)"
        );
        assert_eq!(message(VqganConfig { ch_mult: vec![1, 0], ..tiny() }), "ch_mult: 0, expected 1 to 65536");
        assert_eq!(
            message(VqganConfig { attn_resolutions: vec![4], ..tiny() }),
            "attn_resolutions: 4, expected sides among [16, 8]"
        );
        assert_eq!(
            message(VqganConfig { codebook_size: 1, ..tiny() }),
            "codebook_size: 1, expected 2 to 2147483647"
        );
    }
}
