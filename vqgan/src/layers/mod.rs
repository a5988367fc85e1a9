//! The convolutional encoder and decoder of taming-transformers (Esser et al. 2021, `diffusionmodules/model.py`),
//! under the names of its state dict.
//!
//! Legend: `b` batch, `c` channels, `h` and `w` sides of the feature map, `t = h * w`.

mod attention;
mod decoder;
mod encoder;
mod norms;
mod resample;
mod resnet;

use m6_runtime::Params;
use tch::Tensor;

pub(crate) use decoder::Decoder;
pub(crate) use encoder::Encoder;
pub(crate) use norms::{Norms, Own};

use crate::config::VqganConfig;
use attention::AttnBlock;
use resnet::ResnetBlock;

/// A residual block, followed by attention on levels that have it.
#[derive(Debug)]
struct Stage {
    block: ResnetBlock,
    attention: Option<AttnBlock>,
}

impl Stage {
    /// Stage `index` of the level at `level`.
    fn new(level: &Params, index: i64, input: i64, output: i64, attention: bool) -> Self {
        Self {
            block: ResnetBlock::new(&(level / "block" / index), input, output),
            attention: attention.then(|| AttnBlock::new(&(level / "attn" / index), output)),
        }
    }

    fn forward<N: Norms>(&self, x: &Tensor, norms: &mut N) -> Result<Tensor, N::Stop> {
        Ok(attend(self.attention.as_ref(), self.block.forward(x, norms)?))
    }
}

/// `x` after `attention`, where there is one.
fn attend(attention: Option<&AttnBlock>, x: Tensor) -> Tensor {
    match attention {
        Some(attention) => attention.forward(&x),
        None => x,
    }
}

/// The innermost blocks: residual, attention where the config has it, residual.
#[derive(Debug)]
struct Middle {
    block_1: ResnetBlock,
    attn_1: Option<AttnBlock>,
    block_2: ResnetBlock,
}

impl Middle {
    fn new(params: &Params, config: &VqganConfig) -> Self {
        let channels = config.inner_width();
        Self {
            block_1: ResnetBlock::new(&(params / "block_1"), channels, channels),
            attn_1: config.mid_attention.then(|| AttnBlock::new(&(params / "attn_1"), channels)),
            block_2: ResnetBlock::new(&(params / "block_2"), channels, channels),
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let Ok(x) = self.block_1.forward(x, &mut Own);
        let Ok(x) = self.block_2.forward(&attend(self.attn_1.as_ref(), x), &mut Own);
        x
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::Params;
    use tch::{Device, Kind, Tensor};

    use super::*;
    use crate::config::tests::tiny;

    fn shapes(params: &Params) -> Vec<(String, Vec<i64>)> {
        params.entries().into_iter().map(|(name, p)| (name, p.tensor.size())).collect()
    }

    #[test]
    fn names_and_shapes_are_tamings() {
        let params = Params::new(Device::Cpu, 1);
        let config = VqganConfig { attn_resolutions: vec![], ..tiny() };
        Encoder::new(&(&params / "encoder"), &config);
        Decoder::new(&(&params / "decoder"), &config);
        let shapes = shapes(&params);
        let shape = |name: &str| shapes.iter().find(|(n, _)| n == name).map(|(_, shape)| shape.as_slice());
        assert_eq!(shape("encoder.conv_in.weight"), Some([32, 3, 3, 3].as_slice()));
        assert_eq!(shape("encoder.down.0.block.0.norm1.weight"), Some([32].as_slice()));
        assert_eq!(shape("encoder.down.0.downsample.conv.weight"), Some([32, 32, 3, 3].as_slice()));
        assert_eq!(shape("encoder.down.1.block.0.nin_shortcut.weight"), Some([64, 32, 1, 1].as_slice()));
        assert_eq!(shape("encoder.down.1.downsample.conv.weight"), None);
        assert_eq!(shape("encoder.mid.attn_1.q.weight"), Some([64, 64, 1, 1].as_slice()));
        assert_eq!(shape("encoder.conv_out.weight"), Some([16, 64, 3, 3].as_slice()));
        assert_eq!(shape("decoder.conv_in.weight"), Some([64, 16, 3, 3].as_slice()));
        assert_eq!(shape("decoder.up.1.block.1.conv2.bias"), Some([64].as_slice()));
        assert_eq!(shape("decoder.up.1.upsample.conv.weight"), Some([64, 64, 3, 3].as_slice()));
        assert_eq!(shape("decoder.up.0.block.0.nin_shortcut.weight"), Some([32, 64, 1, 1].as_slice()));
        assert_eq!(shape("decoder.up.0.upsample.conv.weight"), None);
        assert_eq!(shape("decoder.conv_out.weight"), Some([3, 32, 3, 3].as_slice()));
    }

    /// The published f16 network (ch 128, [1,1,2,2,4]) has 343 tensors, five of them outside of these two halves.
    #[test]
    fn the_published_network_has_its_number_of_tensors() {
        let params = Params::new(Device::Cpu, 1);
        let config = VqganConfig {
            resolution: 256,
            ch: 32,
            ch_mult: vec![1, 1, 2, 2, 4],
            num_res_blocks: 2,
            attn_resolutions: vec![16],
            z_channels: 32,
            codebook_size: 2,
            code_dim: 2,
            ..tiny()
        };
        Encoder::new(&(&params / "encoder"), &config);
        Decoder::new(&(&params / "decoder"), &config);
        assert_eq!(params.entries().len(), 343 - 5);
    }

    #[test]
    fn a_network_can_do_without_attention() {
        let params = Params::new(Device::Cpu, 1);
        let config = VqganConfig { attn_resolutions: vec![], mid_attention: false, ..tiny() };
        let decoder = Decoder::new(&params, &config);
        assert!(!params.entries().iter().any(|(name, _)| name.contains("attn")));
        let z = Tensor::zeros([1, 16, 2, 2], (Kind::Float, Device::Cpu));
        assert_eq!(decoder.forward(&z).size(), [1, 3, 4, 4]);
    }

    #[test]
    fn sides_are_divided_and_come_back() {
        let params = Params::new(Device::Cpu, 1);
        let config = tiny();
        let encoder = Encoder::new(&(&params / "encoder"), &config);
        let decoder = Decoder::new(&(&params / "decoder"), &config);
        let x = Tensor::zeros([2, 3, 16, 24], (Kind::Float, Device::Cpu));
        let z = encoder.forward(&x);
        assert_eq!(z.size(), [2, 16, 8, 12]);
        assert_eq!(decoder.forward(&z).size(), x.size());
    }
}
