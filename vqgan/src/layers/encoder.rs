//! Pictures to features.

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::Tensor;

use super::resample::Downsample;
use super::{Middle, Stage, norm};
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
        let mut x = self.conv_in.forward(x);
        for level in &self.down {
            for stage in &level.stages {
                x = stage.forward(&x);
            }
            if let Some(downsample) = &level.downsample {
                x = downsample.forward(&x);
            }
        }
        self.conv_out.forward(&self.norm_out.forward_swish(&self.mid.forward(&x)))
    }
}
