//! Pictures to features.

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::Tensor;

use super::norms::norm;
use super::resample::Downsample;
use super::{Middle, Norms, Own, Stage};
use crate::config::{COLOURS, VqganConfig};

/// The encoder; level 0 is the outermost.
#[derive(Debug)]
pub(crate) struct Encoder {
    conv_in: Conv2d,
    down: Vec<DownLevel>,
    mid: Middle,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct DownLevel {
    stages: Vec<Stage>,
    downsample: Option<Downsample>,
}

impl Encoder {
    pub(crate) fn new(params: &Params, config: &VqganConfig) -> Self {
        let mut width = config.ch;
        let levels = config.ch_mult.len();
        let down = (0..levels).map(|level| {
            let path = params / "down" / level;
            let stages = (0..config.num_res_blocks).map(|index| {
                let input = std::mem::replace(&mut width, config.width(level));
                Stage::new(&path, index, input, width, config.has_attention(level))
            });
            let stages = stages.collect();
            let downsample = (level + 1 < levels).then(|| Downsample::new(&(&path / "downsample"), width));
            DownLevel { stages, downsample }
        });
        let down = down.collect();
        Self {
            conv_in: Conv2d::new(&(params / "conv_in"), COLOURS, config.ch, 3, 1, 1),
            down,
            mid: Middle::new(&(params / "mid"), config),
            norm_out: norm(&(params / "norm_out"), width),
            conv_out: Conv2d::new(&(params / "conv_out"), width, config.z_channels, 3, 1, 1),
        }
    }

    /// `[b, 3, h, w] -> [b, z_channels, h / f, w / f]` for the downsampling factor `f`.
    pub(crate) fn forward(&self, x: &Tensor) -> Tensor {
        self.forward_from(0, x.shallow_clone())
    }

    /// [`Encoder::forward`] from level `start` on; `x` is what the levels outside of it made.
    pub(crate) fn forward_from(&self, start: usize, mut x: Tensor) -> Tensor {
        for level in start..self.down.len() {
            let Ok(inner) = self.level(level, x, &mut Own);
            x = inner;
        }
        self.conv_out.forward(&self.norm_out.forward_swish(&self.mid.forward(&x)))
    }

    /// Level `level` alone, with what lies between it and the next or, at the outermost, the picture.
    pub(crate) fn level<N: Norms>(&self, level: usize, x: Tensor, norms: &mut N) -> Result<Tensor, N::Stop> {
        let mut x = if level == 0 { self.conv_in.forward(&x) } else { x };
        let DownLevel { stages, downsample } = &self.down[level];
        for stage in stages {
            x = stage.forward(&x, norms)?;
        }
        Ok(match downsample {
            Some(downsample) => downsample.forward(&x),
            None => x,
        })
    }
}
