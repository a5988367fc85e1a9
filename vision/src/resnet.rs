//! ResNet (He et al. 2016, "Deep residual learning for image recognition", table 1) up to its last stage, as torchvision
//! has it: halved sides at the middle convolution of a block (version 1.5), tensors under its names. It comes trained and
//! stays as it is.

use std::collections::BTreeMap;
use std::path::Path;

use m6_runtime::{Group, Init, Params, Result, RuntimeError, WeightFile, first_problems};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::COLOURS;

/// Channels of the first convolution, and within the blocks of the first stage.
const WIDTH: i64 = 64;
/// How much wider a block is outside than inside.
const EXPANSION: i64 = 4;
const STAGES: usize = 4;
const NORM_EPS: f64 = 1e-5;
/// Of the statistics of training.
const UNUSED_MOMENTUM: f64 = 0.0;
/// Mean and deviation of each colour on ImageNet, of values from 0 to 1.
const MEAN: [f32; 3] = [0.485, 0.456, 0.406];
const DEVIATION: [f32; 3] = [0.229, 0.224, 0.225];
/// What training and classifying have beside the features.
const LEFT_OUT: [&str; 3] = ["fc.weight", "fc.bias", "num_batches_tracked"];

/// One of the published depths that are made of bottlenecks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub enum Depth {
    /// ResNet-50, which M6 uses.
    Fifty,
    /// ResNet-101.
    HundredAndOne,
    /// ResNet-152.
    HundredAndFiftyTwo,
}

impl Depth {
    const ALL: [Self; 3] = [Self::Fifty, Self::HundredAndOne, Self::HundredAndFiftyTwo];

    /// Blocks of each stage.
    fn blocks(self) -> [usize; STAGES] {
        match self {
            Self::Fifty => [3, 4, 6, 3],
            Self::HundredAndOne => [3, 4, 23, 3],
            Self::HundredAndFiftyTwo => [3, 8, 36, 3],
        }
    }
}

impl From<Depth> for u32 {
    fn from(depth: Depth) -> Self {
        match depth {
            Depth::Fifty => 50,
            Depth::HundredAndOne => 101,
            Depth::HundredAndFiftyTwo => 152,
        }
    }
}

impl TryFrom<u32> for Depth {
    type Error = String;

    fn try_from(layers: u32) -> std::result::Result<Self, String> {
        let depth = Self::ALL.into_iter().find(|&depth| u32::from(depth) == layers);
        depth.ok_or_else(|| format!("resnet = {layers}: expected 50, 101 or 152 layers"))
    }
}

/// A convolution without bias and the norm after it, by the means and variances of training.
struct Layer {
    name: String,
    input: i64,
    output: i64,
    kernel: i64,
    stride: i64,
}

impl Layer {
    fn weights(&self) -> i64 {
        self.input * self.output * self.kernel * self.kernel
    }
}

/// The layers of a block.
struct BlockPlan {
    inner: [Layer; 3],
    /// Where a block changes sides or channels, what it adds to is changed by this.
    shortcut: Option<Layer>,
}

/// The first layer; a pool follows.
fn stem() -> Layer {
    Layer { name: "conv1".to_owned(), input: COLOURS, output: WIDTH, kernel: 7, stride: 2 }
}

fn block_plans(depth: Depth) -> Vec<BlockPlan> {
    let mut input = WIDTH;
    let mut plans = Vec::new();
    for (stage, count) in depth.blocks().into_iter().enumerate() {
        let (inner, output) = (WIDTH << stage, (WIDTH << stage) * EXPANSION);
        for block in 0..count {
            let stride = if stage > 0 && block == 0 { 2 } else { 1 };
            let layer = |name: &str, input, output, kernel, stride| Layer {
                name: format!("layer{}.{block}.{name}", stage + 1),
                input,
                output,
                kernel,
                stride,
            };
            plans.push(BlockPlan {
                inner: [
                    layer("conv1", input, inner, 1, 1),
                    layer("conv2", inner, inner, 3, stride),
                    layer("conv3", inner, output, 1, 1),
                ],
                shortcut: (block == 0).then(|| layer("downsample.0", input, output, 1, stride)),
            });
            input = output;
        }
    }
    plans
}

impl Depth {
    /// Pixels a side of a patch.
    pub(crate) const STRIDE: i64 = 32;
    /// Values of a patch's features.
    pub(crate) const FEATURES: i64 = (WIDTH * EXPANSION) << (STAGES - 1);

    /// Weights of all layers, norms included.
    pub fn parameters(self) -> i64 {
        self.layers().iter().map(|(layer, _)| layer.weights() + 2 * layer.output).sum()
    }

    /// Products of features of a square picture of this side.
    pub fn products(self, side: i64) -> i64 {
        self.layers().iter().map(|(layer, reduction)| layer.weights() * (side / reduction).pow(2)).sum()
    }

    /// All layers, and by how much each one's output is smaller a side than the picture.
    fn layers(self) -> Vec<(Layer, i64)> {
        let mut layers = vec![(stem(), 2)];
        let mut reduction = 4;
        for BlockPlan { inner, shortcut } in block_plans(self) {
            for layer in shortcut.into_iter().chain(inner) {
                let is_shortcut = layer.kernel == 1 && layer.stride > 1;
                // The stride of the middle layer holds for it and for what follows.
                if !is_shortcut {
                    reduction *= layer.stride;
                }
                let after = if is_shortcut { reduction * layer.stride } else { reduction };
                layers.push((layer, after));
            }
        }
        layers
    }
}

/// A convolution and its norm, frozen.
#[derive(Debug)]
struct ConvNorm {
    kernel: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    stride: i64,
}

impl ConvNorm {
    /// A convolution's norm has its name with `bn` for `conv`; that of a shortcut is its second layer.
    fn new(params: &Params, layer: &Layer) -> Self {
        let Layer { ref name, input, output, kernel, stride } = *layer;
        let norm = match name.strip_suffix("downsample.0") {
            Some(block) => format!("{block}downsample.1"),
            None => name.replace("conv", "bn"),
        };
        let shape = [output, input, kernel, kernel];
        let init = Init::Normal((2.0 / (output * kernel * kernel) as f64).sqrt());
        let of_norm = |name, init| (params / &norm).add(name, &[output], init, Group::Buffer);
        Self {
            kernel: (params / name).add("weight", &shape, init, Group::Buffer),
            weight: of_norm("weight", Init::Ones),
            bias: of_norm("bias", Init::Zeros),
            mean: of_norm("running_mean", Init::Zeros),
            variance: of_norm("running_var", Init::Ones),
            stride,
        }
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let (s, p) = (self.stride, self.kernel.size()[2] / 2);
        let x = x.conv2d(&self.kernel.to_kind(x.kind()), None::<Tensor>, [s, s], [p, p], [1, 1], 1);
        let [weight, bias, mean, variance] = [&self.weight, &self.bias, &self.mean, &self.variance].map(Some);
        x.batch_norm(weight, bias, mean, variance, false, UNUSED_MOMENTUM, NORM_EPS, true)
    }
}

#[derive(Debug)]
struct Block {
    inner: [ConvNorm; 3],
    shortcut: Option<ConvNorm>,
}

impl Block {
    fn forward(&self, x: &Tensor) -> Tensor {
        let [reduce, middle, expand] = &self.inner;
        let inside = middle.forward(&reduce.forward(x).relu_()).relu_();
        let past = self.shortcut.as_ref().map_or_else(|| x.shallow_clone(), |shortcut| shortcut.forward(x));
        (expand.forward(&inside) + past).relu_()
    }
}

/// The network up to its last stage, frozen.
#[derive(Debug)]
pub(crate) struct Resnet {
    stem: ConvNorm,
    blocks: Vec<Block>,
    mean: Tensor,
    deviation: Tensor,
}

impl Resnet {
    pub(crate) fn new(params: &Params, depth: Depth) -> Self {
        let block = |plan: BlockPlan| Block {
            inner: plan.inner.each_ref().map(|layer| ConvNorm::new(params, layer)),
            shortcut: plan.shortcut.map(|layer| ConvNorm::new(params, &layer)),
        };
        let colours =
            |values: [f32; 3]| Tensor::from_slice(&values).view([1, 3, 1, 1]).to_device(params.device());
        Self {
            stem: ConvNorm::new(params, &stem()),
            blocks: block_plans(depth).into_iter().map(block).collect(),
            mean: colours(MEAN),
            deviation: colours(DEVIATION),
        }
    }

    /// `[b, 3, side, side]` bytes to features `[b, 2048, g, g]` in `kind`, without gradients.
    pub(crate) fn forward(&self, pictures: &Tensor, kind: Kind) -> Tensor {
        let _guard = tch::no_grad_guard();
        let x = (pictures.to_kind(Kind::Float) / f64::from(u8::MAX) - &self.mean) / &self.deviation;
        let x = m6_runtime::fused::channels_last(&x.to_kind(kind));
        let x = self.stem.forward(&x).relu_().max_pool2d([3, 3], [2, 2], [1, 1], [1, 1], false);
        self.blocks.iter().fold(x, |x, block| block.forward(&x))
    }
}

/// Fills the network under `params` from a file of torch or safetensors under torchvision's names, which are timm's too.
///
/// # Errors
/// When the file cannot be read, holds NaN, or is of another network.
pub(crate) fn load(params: &Params, path: &Path) -> Result<()> {
    let file = WeightFile::open(path)?;
    let tensors: BTreeMap<String, Tensor> =
        params.tensors().into_iter().map(|(name, tensor)| (params.relative(&name), tensor)).collect();
    let missing = tensors.iter().filter_map(|(name, tensor)| match file.shapes().get(name) {
        None => Some(file.missing(name)),
        Some(shape) if *shape != tensor.size() => {
            Some(format!("`{name}` is {shape:?}, expected {:?}", tensor.size()))
        }
        Some(_) => None,
    });
    let is_other =
        |name: &&String| !tensors.contains_key(*name) && !LEFT_OUT.iter().any(|end| name.ends_with(end));
    let other = file.shapes().keys().filter(is_other).map(|name| format!("`{name}` is of another network"));
    let problems: Vec<String> = missing.chain(other).collect();
    if !problems.is_empty() {
        return Err(RuntimeError::Mismatch {
            path: file.path().to_owned(),
            problem: first_problems(&problems),
        });
    }
    let _guard = tch::no_grad_guard();
    for (name, mut tensor) in tensors {
        tensor.copy_(&file.read(&name)?);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::RESNET;

    /// Tensors that Python can make as well, by their names.
    fn made(name: &str, shape: &[i64]) -> Tensor {
        let start: i64 = name.bytes().map(i64::from).sum();
        let count: i64 = shape.iter().product();
        let places = Tensor::arange_start(start, start + count, (Kind::Double, Device::Cpu));
        let wave = ((&places * &places) * 0.7).sin().view(shape);
        let values = match name.rsplit('.').next() {
            _ if shape.len() == 4 => wave * (4.0 / (shape[1] * shape[2] * shape[3]) as f64).sqrt(),
            Some("weight" | "running_var") => wave * 0.3 + 1.0,
            _ => wave * 0.1,
        };
        values.to_kind(Kind::Float)
    }

    /// A file of `depth`'s tensors, and two that features do without.
    fn file(path: &Path, depth: Depth) {
        let params = Params::unfilled(Device::Cpu);
        Resnet::new(&params, depth);
        let mut tensors: Vec<_> =
            params.tensors().into_iter().map(|(name, t)| (name.clone(), made(&name, &t.size()))).collect();
        for name in ["fc.weight", "bn1.num_batches_tracked"] {
            tensors.push((name.to_owned(), Tensor::ones([2], (Kind::Float, Device::Cpu))));
        }
        m6_runtime::write_tensors(path, &tensors).unwrap();
    }

    /// A resolution that is not square in patches would not show a swap of rows and columns.
    #[test]
    fn features_are_torchvisions() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resnet50.safetensors");
        file(&path, Depth::Fifty);
        let params = Params::new(Device::Cpu, 1);
        let resnet = Resnet::new(&(&params / "patches" / RESNET), Depth::Fifty);
        crate::load_trained(&(&params / "patches"), &path).unwrap();

        let bytes: Vec<u8> = (0..2 * 3 * 64 * 96i64).map(|i| ((i * i * 7 + i / 5) % 256) as u8).collect();
        let pictures = Tensor::from_slice(&bytes).view([2, 3, 64, 96]);
        let features = resnet.forward(&pictures, Kind::Float);
        assert_eq!(features.size(), [2, 2048, 2, 3]);
        for (place, golden) in GOLDEN {
            let value = features.double_value(&place);
            assert!((value / golden - 1.0).abs() < 1e-4, "{value} against {golden} at {place:?}");
        }
        let sum = features.sum(Kind::Double).double_value(&[]);
        assert!((sum / GOLDEN_SUM - 1.0).abs() < 1e-5, "{sum} against {GOLDEN_SUM}");
        assert!(!features.requires_grad() && params.trainable().is_empty());
    }

    /// `scripts/golden_resnet.py` prints these.
    const GOLDEN: [([i64; 4], f64); 4] = [
        ([0, 0, 0, 0], 2_030.723_876_953_125),
        ([0, 700, 1, 2], 6_998.748_046_875),
        ([1, 1301, 0, 2], 1_920.599_609_375),
        ([1, 2046, 1, 0], 2_049.442_382_812_5),
    ];
    const GOLDEN_SUM: f64 = 60_248_006.752_742_11;

    /// 53 convolutions in bf16 after each other.
    #[test]
    #[cfg(feature = "cuda")]
    fn features_in_bf16_are_near() {
        let (cpu, gpu) = (Params::new(Device::Cpu, 3), Params::new(Device::Cuda(0), 3));
        let pictures = Tensor::randint(256, [2, 3, 64, 64], (Kind::Uint8, Device::Cpu));
        let expected = Resnet::new(&cpu, Depth::Fifty).forward(&pictures, Kind::Float);
        let resnet = Resnet::new(&gpu, Depth::Fifty);
        let features = resnet.forward(&pictures.to_device(Device::Cuda(0)), Kind::BFloat16);
        assert_eq!(features.kind(), Kind::BFloat16);
        let difference = features.to_device(Device::Cpu).to_kind(Kind::Float) - &expected;
        let share = difference.norm().double_value(&[]) / expected.norm().double_value(&[]);
        assert!(share < 0.02, "{share}");
    }

    /// torchvision's totals without the layer that classifies, 2,049,000 parameters.
    #[test]
    fn sizes_are_the_published_ones() {
        for (depth, parameters) in [
            (Depth::Fifty, 25_557_032),
            (Depth::HundredAndOne, 44_549_160),
            (Depth::HundredAndFiftyTwo, 60_192_808),
        ] {
            assert_eq!(depth.parameters(), parameters - 2_049_000);
        }
        let params = Params::unfilled(Device::Cpu);
        Resnet::new(&params, Depth::Fifty);
        let running = |name: &String| name.contains("running_");
        let values =
            |(name, tensor): (String, Tensor)| if running(&name) { 0 } else { tensor.numel() as i64 };
        assert_eq!(params.tensors().into_iter().map(values).sum::<i64>(), Depth::Fifty.parameters());
        // 4.09 G products are published for 224 x 224, 2.05 M of them to classify.
        assert_eq!(Depth::Fifty.products(224), 4_087_136_256);
    }

    #[test]
    fn other_networks_are_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("resnet.safetensors");
        let params = Params::new(Device::Cpu, 1);
        Resnet::new(&(&params / RESNET), Depth::Fifty);
        let error = || crate::load_trained(&params, &path).unwrap_err().to_string();

        file(&path, Depth::HundredAndOne);
        assert!(error().contains("`layer3.10.bn1.bias` is of another network"), "{}", error());
        let tensors = [("conv1.weight".to_owned(), Tensor::ones([64, 3, 3, 3], (Kind::Float, Device::Cpu)))];
        m6_runtime::write_tensors(&path, &tensors).unwrap();
        assert!(error().contains("`bn1.bias` is missing"), "{}", error());
        std::fs::remove_file(&path).unwrap();
        assert!(error().contains("resnet.safetensors"), "{}", error());
    }
}
