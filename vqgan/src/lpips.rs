//! LPIPS, the learned perceptual distance of the field (Zhang et al. 2018, "The unreasonable effectiveness of deep
//! features as a perceptual metric"), version 0.1 on VGG-16, as VQGANs are trained with it. Its weights are the user's
//! files; nothing here is called LPIPS without them.

use std::collections::HashMap;
use std::path::PathBuf;

use m6_runtime::fused::channels_last;
use m6_runtime::read_tensors;
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;
use crate::error::{Result, VqganError};
use crate::model::compute_kind;

/// The stages of VGG-16, between which the sides are halved: place of each convolution in torchvision's `features`, and
/// its output channels. The last activation of each stage is compared.
const STAGES: [&[(usize, i64)]; 5] = [
    &[(0, 64), (2, 64)],
    &[(5, 128), (7, 128)],
    &[(10, 256), (12, 256), (14, 256)],
    &[(17, 512), (19, 512), (21, 512)],
    &[(24, 512), (26, 512), (28, 512)],
];
/// Mean and deviation of each colour on ImageNet, for values from -1 to 1.
const SHIFT: [f32; 3] = [-0.030, -0.088, -0.188];
const SCALE: [f32; 3] = [0.458, 0.448, 0.450];
/// Keeps the gradient of a vector's length finite at zero; its root is what LPIPS adds to the length.
const LENGTH_EPS: f64 = 1e-20;

/// Where the weights of LPIPS are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LpipsConfig {
    /// Safetensors files that together hold VGG-16 (torchvision's `features.N.weight` and `.bias`, or LPIPS's
    /// `net.sliceK.N`) and the five heads (`linK.model.1.weight`).
    pub weights: Vec<PathBuf>,
}

/// The network, frozen.
#[derive(Debug)]
pub(crate) struct Lpips {
    stages: Vec<Vec<Convolution>>,
    /// `[1, c, 1, 1]` each.
    heads: Vec<Tensor>,
    shift: Tensor,
    scale: Tensor,
    compute: Kind,
}

#[derive(Debug)]
struct Convolution {
    weight: Tensor,
    bias: Tensor,
}

impl Lpips {
    /// Reads the weights; computes in bf16 on a GPU, all but lengths and distances.
    ///
    /// # Errors
    /// When a file cannot be read, or a tensor is missing or of another shape.
    pub(crate) fn load(config: &LpipsConfig, device: Device) -> Result<Self> {
        let mut tensors = HashMap::new();
        for path in &config.weights {
            tensors.extend(read_tensors(path)?.into_iter().map(|(name, tensor)| (plain_name(&name), tensor)));
        }
        Self::new(&tensors, device).map_err(|reason| {
            let files: Vec<String> = config.weights.iter().map(|path| path.display().to_string()).collect();
            VqganError::model(files.join(" and ").as_ref(), reason)
        })
    }

    fn new(tensors: &HashMap<String, Tensor>, device: Device) -> std::result::Result<Self, String> {
        let compute = compute_kind(device);
        let take = |name: String, shape: &[i64], kind: Kind| {
            let tensor = tensors.get(&name).ok_or_else(|| format!("LPIPS: no tensor {name}"))?;
            if tensor.size() != shape {
                return Err(format!("LPIPS: {name} is {:?}, expected {shape:?}", tensor.size()));
            }
            Ok(tensor.detach().to_kind(kind).to_device(device))
        };
        let mut input = COLOURS;
        let mut stages = Vec::new();
        let mut heads = Vec::new();
        for (number, stage) in STAGES.iter().enumerate() {
            let mut convolutions = Vec::new();
            for &(place, output) in *stage {
                let weight = take(format!("features.{place}.weight"), &[output, input, 3, 3], compute)?;
                let bias = take(format!("features.{place}.bias"), &[output], compute)?;
                convolutions.push(Convolution { weight, bias });
                input = output;
            }
            stages.push(convolutions);
            heads.push(take(format!("lin{number}.model.1.weight"), &[1, input, 1, 1], Kind::Float)?);
        }
        let colours =
            |values: [f32; 3]| Tensor::from_slice(&values).view([1, COLOURS, 1, 1]).to_device(device);
        Ok(Self { stages, heads, shift: colours(SHIFT), scale: colours(SCALE), compute })
    }

    /// Mean distance of pictures `y` from `x`, `[b, 3, h, w]` from -1 to 1; a scalar with the gradient of `y`.
    pub(crate) fn distance(&self, x: &Tensor, y: &Tensor) -> Tensor {
        let x = tch::no_grad(|| self.features(x));
        let pairs = x.iter().zip(self.features(y)).zip(&self.heads);
        pairs
            .map(|((x, y), head)| {
                ((x - y).square() * head).sum_dim_intlist(1, false, Kind::Float).mean(Kind::Float)
            })
            .sum()
    }

    /// The last activations of each stage, their channels scaled to length one, float32.
    fn features(&self, x: &Tensor) -> Vec<Tensor> {
        let mut x = channels_last(&((x - &self.shift) / &self.scale).to_kind(self.compute));
        let mut features = Vec::with_capacity(STAGES.len());
        for (number, stage) in self.stages.iter().enumerate() {
            if number > 0 {
                x = x.max_pool2d([2, 2], [2, 2], [0, 0], [1, 1], false);
            }
            for Convolution { weight, bias } in stage {
                x = x.conv2d(weight, Some(bias), [1, 1], [1, 1], [1, 1], 1).relu();
            }
            let float = x.to_kind(Kind::Float);
            let length = (float.square().sum_dim_intlist(1, true, Kind::Float) + LENGTH_EPS).sqrt();
            features.push(float / length);
        }
        features
    }
}

/// A tensor's name as torchvision and the published heads have it.
fn plain_name(name: &str) -> String {
    match name.strip_prefix("net.slice").and_then(|rest| rest.split_once('.')) {
        Some((_, rest)) => format!("features.{rest}"),
        None => name.to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use m6_runtime::write_tensors;

    use super::*;

    /// `scripts/golden_lpips.py` prints these, of the published implementation's steps on the weights of [`weights`].
    const GOLDEN: [f64; 2] = [0.018271252512931824, 0.01792006567120552];
    const GOLDEN_GRADIENT: f64 = 0.16819115754503106;

    /// Numbers that Python can make as well: `sin` of whole numbers, from -1 to 1.
    fn wave(start: i64, shape: &[i64]) -> Tensor {
        let count: i64 = shape.iter().product();
        (Tensor::arange_start(start, start + count, (Kind::Double, Device::Cpu)) * 0.7)
            .sin()
            .to_kind(Kind::Float)
            .view(shape)
    }

    /// Weights of VGG-16's shapes with He's bounds, and heads.
    pub(crate) fn weights() -> Vec<(String, Tensor)> {
        let mut tensors = Vec::new();
        let mut input = COLOURS;
        for (number, stage) in STAGES.iter().enumerate() {
            for &(place, output) in *stage {
                let bound = (6.0 / (9.0 * input as f64)).sqrt();
                let weight = wave(place as i64, &[output, input, 3, 3]) * bound;
                tensors.push((format!("features.{place}.weight"), weight));
                tensors.push((format!("features.{place}.bias"), wave(place as i64 + 1, &[output]) * 0.1));
                input = output;
            }
            let head = wave(number as i64, &[1, input, 1, 1]).abs() / input as f64;
            tensors.push((format!("lin{number}.model.1.weight"), head));
        }
        tensors
    }

    fn pictures() -> (Tensor, Tensor) {
        (wave(5, &[2, 3, 32, 32]), wave(900, &[2, 3, 32, 32]) * 0.5)
    }

    fn lpips() -> Lpips {
        Lpips::new(&weights().into_iter().collect(), Device::Cpu).unwrap()
    }

    #[test]
    fn distances_and_gradients_are_those_of_the_published_implementation() {
        let lpips = lpips();
        let (x, y) = pictures();
        for (index, golden) in (0..).zip(GOLDEN) {
            let one = |t: &Tensor| t.narrow(0, index, 1);
            let distance = lpips.distance(&one(&x), &one(&y)).double_value(&[]);
            assert!((distance / golden - 1.0).abs() < 1e-4, "{distance} against {golden}");
        }
        let y = y.set_requires_grad(true);
        lpips.distance(&x, &y).backward();
        let gradient = y.grad().abs().sum(Kind::Double).double_value(&[]);
        assert!((gradient / GOLDEN_GRADIENT - 1.0).abs() < 1e-3, "{gradient} against {GOLDEN_GRADIENT}");
    }

    #[test]
    fn equal_pictures_cost_nothing_and_plain_ones_have_a_finite_gradient() {
        let lpips = lpips();
        let (x, _) = pictures();
        assert_eq!(lpips.distance(&x, &x).double_value(&[]), 0.0);
        let y = x.zeros_like().set_requires_grad(true);
        lpips.distance(&x, &y).backward();
        assert!(y.grad().isfinite().all().int64_value(&[]) == 1);
    }

    #[test]
    fn files_are_read_together_and_what_is_missing_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let (heads, vgg): (Vec<_>, Vec<_>) =
            weights().into_iter().partition(|(name, _)| name.starts_with("lin"));
        let slices = |(name, tensor): (String, Tensor)| (name.replace("features.", "net.slice1."), tensor);
        let vgg: Vec<_> = vgg.into_iter().map(slices).collect();
        let paths = ["vgg.safetensors", "heads.safetensors"].map(|name| dir.path().join(name));
        write_tensors(&paths[0], &vgg).unwrap();
        write_tensors(&paths[1], &heads).unwrap();
        let (x, y) = pictures();
        let both = Lpips::load(&LpipsConfig { weights: paths.to_vec() }, Device::Cpu).unwrap();
        assert_eq!(both.distance(&x, &y), lpips().distance(&x, &y));
        let error =
            Lpips::load(&LpipsConfig { weights: paths[..1].to_vec() }, Device::Cpu).unwrap_err().to_string();
        assert!(
            error.contains("vgg.safetensors") && error.ends_with("LPIPS: no tensor lin0.model.1.weight"),
            "{error}"
        );
    }
}
