//! The few layers that every model here is built from.
//!
//! Weights are float32, or bf16 where the registry keeps them so; a layer casts them to the dtype of its input, so bf16
//! compute is a property of the activations and there is no autocast. Every layer states how it starts.

use tch::{Kind, Tensor};

use crate::fused;
use crate::params::{Group, Init, Params};

/// `y = x W^T + b`, `W` of shape `[out, in]`.
#[derive(Debug)]
pub struct Linear {
    weight: Tensor,
    bias: Option<Tensor>,
}

impl Linear {
    /// With a bias that starts at zero.
    pub fn new(params: &Params, input: i64, output: i64, init: Init) -> Self {
        let bias = Some(params.add("bias", &[output], Init::Zeros, Group::NoDecay));
        Self { bias, ..Self::without_bias(params, input, output, init) }
    }

    /// Without a bias.
    pub fn without_bias(params: &Params, input: i64, output: i64, init: Init) -> Self {
        Self { weight: params.add("weight", &[output, input], init, Group::Hidden), bias: None }
    }

    /// Without a bias, for what is no map between hidden layers: an output head, a router.
    pub fn head(params: &Params, input: i64, output: i64, init: Init) -> Self {
        Self { weight: params.add("weight", &[output, input], init, Group::Decay), bias: None }
    }

    /// The matrix, `[out, in]`, for losses that take it as it is.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }

    /// `[.., in] -> [.., out]` in the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        fused::linear(x, &self.weight, self.bias.as_ref())
    }
}

/// Rows of a table by index; `weight` of shape `[rows, width]`.
#[derive(Debug)]
pub struct Embedding {
    weight: Tensor,
}

impl Embedding {
    /// A table of `rows` by `width`.
    pub fn new(params: &Params, rows: i64, width: i64, init: Init) -> Self {
        Self { weight: params.add("weight", &[rows, width], init, Group::NoDecay) }
    }

    /// `[..] -> [.., width]`, float32.
    pub fn forward(&self, ids: &Tensor) -> Tensor {
        self.rows(ids, false)
    }

    /// The same where an output head shares the table, so that the gradient of all of it is there before that of the rows
    /// in use: on a GPU these are added to it where they stand, which saves three passes over the table.
    pub fn forward_shared(&self, ids: &Tensor) -> Tensor {
        self.rows(ids, self.weight.device().is_cuda())
    }

    fn rows(&self, ids: &Tensor, has_sparse_gradient: bool) -> Tensor {
        const NO_PADDING: i64 = -1;
        Tensor::embedding(&self.weight, ids, NO_PADDING, false, has_sparse_gradient).to_kind(Kind::Float)
    }

    /// The whole table, for output heads that share it.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

/// Root-mean-square norm over the last axis (Zhang and Sennrich 2019), computed in float32.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    /// Over `width` values.
    pub fn new(params: &Params, width: i64, eps: f64) -> Self {
        Self { weight: params.add("weight", &[width], Init::Ones, Group::NoDecay), eps }
    }

    /// Same shape and dtype as `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        fused::rms_norm(x, &self.weight, self.eps)
    }

    /// `x + residual`, and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> (Tensor, Tensor) {
        fused::add_rms_norm(x, residual, &self.weight, self.eps)
    }
}

/// Layer norm over the last axis (Ba et al. 2016).
#[derive(Debug)]
pub struct LayerNorm {
    weight: Tensor,
    bias: Tensor,
    eps: f64,
}

impl LayerNorm {
    /// Over `width` values.
    pub fn new(params: &Params, width: i64, eps: f64) -> Self {
        let weight = params.add("weight", &[width], Init::Ones, Group::NoDecay);
        let bias = params.add("bias", &[width], Init::Zeros, Group::NoDecay);
        Self { weight, bias, eps }
    }

    /// Same shape and dtype as `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        fused::layer_norm(x, &self.weight, &self.bias, self.eps)
    }

    /// `x + residual`, and its norm.
    pub fn forward_sum(&self, x: &Tensor, residual: &Tensor) -> (Tensor, Tensor) {
        fused::add_layer_norm(x, residual, &self.weight, &self.bias, self.eps)
    }
}

/// Group norm over `[b, c, h, w]` (Wu and He 2018).
#[derive(Debug)]
pub struct GroupNorm {
    weight: Tensor,
    bias: Tensor,
    groups: i64,
    eps: f64,
}

impl GroupNorm {
    /// Over `channels`, which `groups` divides.
    pub fn new(params: &Params, groups: i64, channels: i64, eps: f64) -> Self {
        let weight = params.add("weight", &[channels], Init::Ones, Group::NoDecay);
        let bias = params.add("bias", &[channels], Init::Zeros, Group::NoDecay);
        Self { weight, bias, groups, eps }
    }

    /// Same shape and dtype as `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        fused::group_norm(x, self.groups, &self.weight, &self.bias, self.eps, false)
    }

    /// [`GroupNorm::forward`], then swish.
    pub fn forward_swish(&self, x: &Tensor) -> Tensor {
        fused::group_norm(x, self.groups, &self.weight, &self.bias, self.eps, true)
    }

    /// What the groups of `x` add to the moments of a larger feature map.
    pub fn moments(&self, x: &Tensor) -> Moments {
        let grouped = x.to_kind(Kind::Float).reshape([x.size()[0], self.groups, -1]);
        let count = grouped.size()[2] as f64;
        let (variance, mean) = grouped.var_mean_dim([2].as_slice(), false, false);
        Moments { count, mean: mean.to_kind(Kind::Double), squares: variance.to_kind(Kind::Double) * count }
    }

    /// [`GroupNorm::forward_swish`] of a part of a feature map whose moments are `moments`. No gradient flows to them.
    pub fn forward_swish_by(&self, x: &Tensor, moments: &Moments) -> Tensor {
        let deviation = (&moments.squares / moments.count + self.eps).sqrt();
        let grouped = |values: &Tensor| values.to_kind(Kind::Double).view([1, self.groups, -1]);
        let scale = grouped(&self.weight) / deviation.unsqueeze(-1);
        let shift = grouped(&self.bias) - moments.mean.unsqueeze(-1) * &scale;
        let channels = |values: Tensor| values.flatten(1, 2).unsqueeze(-1).unsqueeze(-1).to_kind(Kind::Float);
        channels(shift).addcmul(&x.to_kind(Kind::Float), &channels(scale)).silu_().to_kind(x.kind())
    }
}

/// Moments of each group of a [`GroupNorm`], gathered over parts of a feature map; float64 `[b, groups]`.
#[derive(Debug)]
pub struct Moments {
    count: f64,
    mean: Tensor,
    /// Sums of the squared distances from the mean.
    squares: Tensor,
}

impl Moments {
    /// Those of two parts that do not overlap, without a difference of large sums (Chan et al. 1983).
    #[must_use]
    pub fn merged(&self, other: &Self) -> Self {
        let count = self.count + other.count;
        let apart = &other.mean - &self.mean;
        Self {
            count,
            mean: &self.mean + &apart * (other.count / count),
            squares: &self.squares + &other.squares + apart.square() * (self.count * other.count / count),
        }
    }
}

/// 2-D convolution; `weight` of shape `[out, in, k, k]`, bias included.
#[derive(Debug)]
pub struct Conv2d {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: i64,
}

impl Conv2d {
    /// Starts as PyTorch's does: weight and bias uniform within `1 / sqrt(in * k * k)`.
    pub fn new(params: &Params, input: i64, output: i64, kernel: i64, stride: i64, padding: i64) -> Self {
        let bound = 1.0 / ((input * kernel * kernel) as f64).sqrt();
        let shape = [output, input, kernel, kernel];
        let weight = params.add("weight", &shape, Init::Uniform(bound), Group::Decay);
        let bias = params.add("bias", &[output], Init::Uniform(bound), Group::NoDecay);
        Self { weight, bias, stride, padding }
    }

    /// `[b, in, h, w] -> [b, out, h', w']` in the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Tensor {
        self.forward_with(x, &self.weight)
    }

    /// [`Conv2d::forward`] with the kernel `weight` in place of its own.
    pub fn forward_with(&self, x: &Tensor, weight: &Tensor) -> Tensor {
        let (weight, bias) = (weight.to_kind(x.kind()), self.bias.to_kind(x.kind()));
        let (s, p) = (self.stride, self.padding);
        x.conv2d(&weight, Some(&bias), [s, s], [p, p], [1, 1], 1)
    }

    /// The kernel, for losses that balance gradients at the last layer and for norms of it.
    pub fn weight(&self) -> &Tensor {
        &self.weight
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;

    #[test]
    fn initial_widths_are_pytorchs_and_not_tchs() {
        let params = Params::new(Device::Cpu, 1);
        let conv = Conv2d::new(&(&params / "conv"), 64, 64, 3, 1, 1);
        let bound = 1.0 / (64.0f64 * 9.0).sqrt();
        let widest = conv.weight.abs().max().double_value(&[]);
        assert!(widest <= bound && widest > 0.99 * bound, "{widest} against {bound}");
        let norm = GroupNorm::new(&(&params / "norm"), 32, 64, 1e-6);
        assert_eq!(norm.weight.min().double_value(&[]), 1.0);
    }

    #[test]
    fn compute_follows_the_input_and_gradients_reach_the_float32_weights() {
        let params = Params::new(Device::Cpu, 1);
        let linear = Linear::new(&params, 8, 4, Init::Normal(0.1));
        let y = linear.forward(&Tensor::ones([2, 8], (Kind::BFloat16, Device::Cpu)));
        assert_eq!(y.kind(), Kind::BFloat16);
        y.sum(Kind::Float).backward();
        assert_eq!(linear.weight.grad().kind(), Kind::Float);
    }

    /// The mean is far from zero, where sums of squares would lose the variance.
    #[test]
    fn moments_of_parts_norm_as_those_of_the_whole() {
        let params = Params::new(Device::Cpu, 1);
        let norm = GroupNorm::new(&params, 4, 8, 1e-6);
        for (name, parameter) in [("a", &norm.weight), ("b", &norm.bias)] {
            parameter.detach().copy_(&params.add(name, &[8], Init::Normal(1.0), Group::Buffer));
        }
        let x = params.add("x", &[2, 8, 6, 10], Init::Normal(1.0), Group::Buffer) + 300.0;
        let part = |start, length| norm.moments(&x.narrow(3, start, length));
        let moments = part(0, 3).merged(&part(3, 1)).merged(&part(4, 6));
        let expected = norm.forward_swish(&x);
        assert!((norm.forward_swish_by(&x, &moments) - expected).abs().max().double_value(&[]) < 5e-4);
    }

    #[test]
    fn rms_norm_matches_its_formula() {
        let params = Params::new(Device::Cpu, 1);
        let norm = RmsNorm::new(&params, 16, 1e-6);
        let x = Tensor::arange(32, (Kind::Float, Device::Cpu)).reshape([2, 16]) - 3.0;
        let expected = &x / (x.square().mean_dim(-1, true, Kind::Float) + 1e-6).sqrt();
        assert!((norm.forward(&x) - expected).abs().max().double_value(&[]) < 1e-5);
    }
}
