//! Features to pictures.

use m6_runtime::Params;
use m6_runtime::nn::{Conv2d, GroupNorm};
use tch::Tensor;

use super::norms::norm;
use super::resample::Upsample;
use super::{Middle, Norms, Own, Stage};
use crate::config::{COLOURS, VqganConfig};

/// The decoder; `up` is in the order of use, innermost level first, while names count from the outermost.
#[derive(Debug)]
pub(crate) struct Decoder {
    conv_in: Conv2d,
    mid: Middle,
    up: Vec<UpLevel>,
    norm_out: GroupNorm,
    conv_out: Conv2d,
}

#[derive(Debug)]
struct UpLevel {
    stages: Vec<Stage>,
    upsample: Option<Upsample>,
}

impl Decoder {
    pub(crate) fn new(params: &Params, config: &VqganConfig) -> Self {
        let inner = config.inner_width();
        let mut width = inner;
        let up = (0..config.ch_mult.len()).rev().map(|level| {
            let path = params / "up" / level;
            let stages = (0..=config.num_res_blocks).map(|index| {
                let input = std::mem::replace(&mut width, config.width(level));
                Stage::new(&path, index, input, width, config.has_attention(level))
            });
            let stages = stages.collect();
            let upsample = (level > 0).then(|| Upsample::new(&(&path / "upsample"), width));
            UpLevel { stages, upsample }
        });
        let up = up.collect();
        Self {
            conv_in: Conv2d::new(&(params / "conv_in"), config.z_channels, inner, 3, 1, 1),
            mid: Middle::new(&(params / "mid"), config),
            up,
            norm_out: norm(&(params / "norm_out"), width),
            conv_out: Conv2d::new(&(params / "conv_out"), width, COLOURS, 3, 1, 1),
        }
    }

    /// `[b, z_channels, h, w] -> [b, 3, h f, w f]` for the downsampling factor `f`.
    pub(crate) fn forward(&self, z: &Tensor) -> Tensor {
        self.forward_to(0, z)
    }

    /// [`Decoder::forward`] up to level `end`, 0 being the outermost.
    pub(crate) fn forward_to(&self, end: usize, z: &Tensor) -> Tensor {
        let mut x = self.mid.forward(&self.conv_in.forward(z));
        for level in (end..self.up.len()).rev() {
            let Ok(outer) = self.level(level, x, &mut Own);
            x = outer;
        }
        x
    }

    /// Level `level` alone, with what lies between it and the one inside of it and, at the outermost, the picture.
    pub(crate) fn level<N: Norms>(&self, level: usize, x: Tensor, norms: &mut N) -> Result<Tensor, N::Stop> {
        let place = self.up.len() - 1 - level;
        let upsample = self.up[..place].last().and_then(|inner| inner.upsample.as_ref());
        let mut x = match upsample {
            Some(upsample) => upsample.forward(&x),
            None => x,
        };
        for stage in &self.up[place].stages {
            x = stage.forward(&x, norms)?;
        }
        if level > 0 {
            return Ok(x);
        }
        Ok(self.conv_out.forward(&norms.swish(&self.norm_out, &x)?))
    }

    /// The kernel of the last convolution, at which losses are balanced.
    pub(crate) fn last_kernel(&self) -> &Tensor {
        self.conv_out.weight()
    }
}
