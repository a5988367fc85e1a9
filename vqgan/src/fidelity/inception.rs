//! InceptionV3 (Szegedy et al. 2015) as FID is measured with (Heusel et al. 2017): the TensorFlow network of
//! 2015-12-05, under the names of its port to PyTorch (pytorch-fid), up to the third pooling. It differs from
//! torchvision's network in what its inner pools do.

use std::path::Path;

use m6_runtime::WeightFile;
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;
use crate::error::{Result, VqganError};

/// Side of the pictures that the network takes.
const SIDE: i64 = 299;
const NORM_EPS: f64 = 1e-3;

/// The network, frozen; computes in float32.
#[derive(Debug)]
pub(super) struct Inception {
    blocks: Vec<Vec<Branch>>,
}

/// Layers one after the other; their results beside each other make those of a block.
#[derive(Debug)]
struct Branch {
    pool: Option<Pool>,
    chain: Vec<Layer>,
    /// Take the result of the chain, all of them, and are laid beside each other.
    ends: Vec<Layer>,
}

/// Pools of 3 x 3.
#[derive(Debug, Clone, Copy)]
enum Pool {
    /// Of the places inside of the picture.
    Mean,
    Max,
    /// Halves the sides.
    Halving,
}

/// Convolution, batch norm, rectifier; the norm is part of weight and bias.
#[derive(Debug)]
struct Layer {
    weight: Tensor,
    bias: Tensor,
    stride: i64,
    padding: [i64; 2],
}

/// What a branch is made of.
struct BranchPlan {
    pool: Option<Pool>,
    chain: Vec<LayerPlan>,
    ends: Vec<LayerPlan>,
}

struct LayerPlan {
    name: &'static str,
    output: i64,
    kernel: [i64; 2],
    stride: i64,
    padding: [i64; 2],
}

/// A layer that keeps the sides.
fn same(name: &'static str, output: i64, kernel: [i64; 2]) -> LayerPlan {
    LayerPlan { name, output, kernel, stride: 1, padding: kernel.map(|side| side / 2) }
}

/// A layer that changes single places.
fn one(name: &'static str, output: i64) -> LayerPlan {
    same(name, output, [1, 1])
}

/// A layer of 3 x 3 that looks at places inside of the picture only.
fn inside(name: &'static str, output: i64, stride: i64) -> LayerPlan {
    LayerPlan { name, output, kernel: [3, 3], stride, padding: [0, 0] }
}

fn chain(chain: Vec<LayerPlan>) -> BranchPlan {
    BranchPlan { pool: None, chain, ends: Vec::new() }
}

fn pooled(pool: Pool, chain: Vec<LayerPlan>) -> BranchPlan {
    BranchPlan { pool: Some(pool), chain, ends: Vec::new() }
}

fn forked(chain: Vec<LayerPlan>, ends: [LayerPlan; 2]) -> BranchPlan {
    BranchPlan { pool: None, chain, ends: ends.into() }
}

/// `InceptionA`, with `pool` channels after the pool.
fn block_a(pool: i64) -> Vec<BranchPlan> {
    vec![
        chain(vec![one("branch1x1", 64)]),
        chain(vec![one("branch5x5_1", 48), same("branch5x5_2", 64, [5, 5])]),
        chain(vec![
            one("branch3x3dbl_1", 64),
            same("branch3x3dbl_2", 96, [3, 3]),
            same("branch3x3dbl_3", 96, [3, 3]),
        ]),
        pooled(Pool::Mean, vec![one("branch_pool", pool)]),
    ]
}

/// `InceptionB`.
fn block_b() -> Vec<BranchPlan> {
    vec![
        chain(vec![inside("branch3x3", 384, 2)]),
        chain(vec![
            one("branch3x3dbl_1", 64),
            same("branch3x3dbl_2", 96, [3, 3]),
            inside("branch3x3dbl_3", 96, 2),
        ]),
        pooled(Pool::Halving, vec![]),
    ]
}

/// `InceptionC`, with `inner` channels between its long kernels.
fn block_c(inner: i64) -> Vec<BranchPlan> {
    vec![
        chain(vec![one("branch1x1", 192)]),
        chain(vec![
            one("branch7x7_1", inner),
            same("branch7x7_2", inner, [1, 7]),
            same("branch7x7_3", 192, [7, 1]),
        ]),
        chain(vec![
            one("branch7x7dbl_1", inner),
            same("branch7x7dbl_2", inner, [7, 1]),
            same("branch7x7dbl_3", inner, [1, 7]),
            same("branch7x7dbl_4", inner, [7, 1]),
            same("branch7x7dbl_5", 192, [1, 7]),
        ]),
        pooled(Pool::Mean, vec![one("branch_pool", 192)]),
    ]
}

/// `InceptionD`.
fn block_d() -> Vec<BranchPlan> {
    vec![
        chain(vec![one("branch3x3_1", 192), inside("branch3x3_2", 320, 2)]),
        chain(vec![
            one("branch7x7x3_1", 192),
            same("branch7x7x3_2", 192, [1, 7]),
            same("branch7x7x3_3", 192, [7, 1]),
            inside("branch7x7x3_4", 192, 2),
        ]),
        pooled(Pool::Halving, vec![]),
    ]
}

/// `InceptionE`, of which the last takes maxima.
fn block_e(pool: Pool) -> Vec<BranchPlan> {
    vec![
        chain(vec![one("branch1x1", 320)]),
        forked(
            vec![one("branch3x3_1", 384)],
            [same("branch3x3_2a", 384, [1, 3]), same("branch3x3_2b", 384, [3, 1])],
        ),
        forked(
            vec![one("branch3x3dbl_1", 448), same("branch3x3dbl_2", 384, [3, 3])],
            [same("branch3x3dbl_3a", 384, [1, 3]), same("branch3x3dbl_3b", 384, [3, 1])],
        ),
        pooled(pool, vec![one("branch_pool", 192)]),
    ]
}

/// All blocks with the beginnings of their names, those before the first pools among them.
fn plan() -> Vec<(&'static str, Vec<BranchPlan>)> {
    vec![
        (
            "",
            vec![chain(vec![
                inside("Conv2d_1a_3x3", 32, 2),
                inside("Conv2d_2a_3x3", 32, 1),
                same("Conv2d_2b_3x3", 64, [3, 3]),
            ])],
        ),
        ("", vec![pooled(Pool::Halving, vec![one("Conv2d_3b_1x1", 80), inside("Conv2d_4a_3x3", 192, 1)])]),
        ("", vec![pooled(Pool::Halving, vec![])]),
        ("Mixed_5b.", block_a(32)),
        ("Mixed_5c.", block_a(64)),
        ("Mixed_5d.", block_a(64)),
        ("Mixed_6a.", block_b()),
        ("Mixed_6b.", block_c(128)),
        ("Mixed_6c.", block_c(160)),
        ("Mixed_6d.", block_c(160)),
        ("Mixed_6e.", block_c(192)),
        ("Mixed_7a.", block_d()),
        ("Mixed_7b.", block_e(Pool::Mean)),
        ("Mixed_7c.", block_e(Pool::Max)),
    ]
}

impl Inception {
    /// Reads the weights at `path`, a torch or safetensors file; tensors that are not needed may be there too.
    ///
    /// # Errors
    /// When the file cannot be read, or a tensor is missing or of another shape.
    pub(super) fn load(path: &Path, device: Device) -> Result<Self> {
        let file = WeightFile::open(path)?;
        Self::new(|name, shape| {
            let problem =
                |reason: String| Err(VqganError::model(file.path(), format!("Inception: {reason}")));
            match file.shapes().get(name) {
                None => problem(file.missing(name)),
                Some(found) if found != shape => {
                    problem(format!("`{name}` is {found:?}, expected {shape:?}"))
                }
                Some(_) => Ok(file.read(name)?.to_device(device)),
            }
        })
    }

    /// Of tensors that `read` has by name and shape.
    fn new(read: impl Fn(&str, &[i64]) -> Result<Tensor>) -> Result<Self> {
        let mut width = COLOURS;
        let mut blocks = Vec::new();
        for (prefix, branches) in plan() {
            let mut output = 0;
            let mut block = Vec::new();
            for BranchPlan { pool, chain, ends } in branches {
                let mut input = width;
                let mut layers = Vec::new();
                for plan in &chain {
                    layers.push(Layer::new(&read, prefix, plan, input)?);
                    input = plan.output;
                }
                let forks: Result<Vec<Layer>> =
                    ends.iter().map(|plan| Layer::new(&read, prefix, plan, input)).collect();
                output += if ends.is_empty() { input } else { ends.iter().map(|plan| plan.output).sum() };
                block.push(Branch { pool, chain: layers, ends: forks? });
            }
            width = output;
            blocks.push(block);
        }
        Ok(Self { blocks })
    }

    /// The activations after the third pooling, `[b, 2048]` float32, of bytes `[b, 3, h, w]`, which are stretched to
    /// 299 x 299 first.
    pub(super) fn features(&self, bytes: &Tensor) -> Tensor {
        let x = (bytes.to_kind(Kind::Float) / 255.0).upsample_bilinear2d([SIDE, SIDE], false, None, None);
        let mut x = x * 2.0 - 1.0;
        for block in &self.blocks {
            let branches: Vec<Tensor> = block.iter().map(|branch| branch.forward(&x)).collect();
            x = Tensor::cat(&branches, 1);
        }
        x.mean_dim([2, 3].as_slice(), false, Kind::Float)
    }
}

impl Branch {
    fn forward(&self, x: &Tensor) -> Tensor {
        let mut x = self.pool.map_or_else(|| x.shallow_clone(), |pool| pool.forward(x));
        for layer in &self.chain {
            x = layer.forward(&x);
        }
        if self.ends.is_empty() {
            return x;
        }
        let ends: Vec<Tensor> = self.ends.iter().map(|layer| layer.forward(&x)).collect();
        Tensor::cat(&ends, 1)
    }
}

impl Pool {
    fn forward(self, x: &Tensor) -> Tensor {
        match self {
            Self::Mean => x.avg_pool2d([3, 3], [1, 1], [1, 1], false, false, None),
            Self::Max => x.max_pool2d([3, 3], [1, 1], [1, 1], [1, 1], false),
            Self::Halving => x.max_pool2d([3, 3], [2, 2], [0, 0], [1, 1], false),
        }
    }
}

impl Layer {
    fn new(
        read: impl Fn(&str, &[i64]) -> Result<Tensor>,
        prefix: &str,
        plan: &LayerPlan,
        input: i64,
    ) -> Result<Self> {
        let &LayerPlan { name, output, kernel: [height, width], stride, padding } = plan;
        let read = |member: &str, shape: &[i64]| {
            Ok::<_, VqganError>(read(&format!("{prefix}{name}.{member}"), shape)?.to_kind(Kind::Double))
        };
        let norm = |member: &str| read(&format!("bn.{member}"), &[output]);
        let scale = norm("weight")? / (norm("running_var")? + NORM_EPS).sqrt();
        let bias = norm("bias")? - norm("running_mean")? * &scale;
        let weight = read("conv.weight", &[output, input, height, width])? * scale.view([-1, 1, 1, 1]);
        Ok(Self { weight: weight.to_kind(Kind::Float), bias: bias.to_kind(Kind::Float), stride, padding })
    }

    fn forward(&self, x: &Tensor) -> Tensor {
        let stride = [self.stride, self.stride];
        x.conv2d(&self.weight, Some(&self.bias), stride, self.padding, [1, 1], 1).relu()
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;

    /// Tensors that Python can make as well, by their names.
    fn made(name: &str, shape: &[i64]) -> Tensor {
        let start: i64 = name.bytes().map(i64::from).sum();
        let count: i64 = shape.iter().product();
        let places = Tensor::arange_start(start, start + count, (Kind::Double, Device::Cpu));
        let wave = ((&places * &places) * 0.7).sin().view(shape);
        let values = match name.rsplit('.').next() {
            _ if shape.len() == 4 => wave * (6.0 / (shape[1] * shape[2] * shape[3]) as f64).sqrt(),
            Some("weight" | "running_var") => wave * 0.3 + 1.0,
            _ => wave * 0.1,
        };
        values.to_kind(Kind::Float)
    }

    #[test]
    fn features_are_those_of_the_published_network() {
        let inception = Inception::new(|name, shape| Ok(made(name, shape))).unwrap();
        let bytes: Vec<u8> = (0..2 * 3 * 40 * 48i64).map(|i| ((i * i * 7 + i / 5) % 256) as u8).collect();
        let bytes = Tensor::from_slice(&bytes).view([2, 3, 40, 48]);
        let features = inception.features(&bytes);
        assert_eq!(features.size(), [2, 2048]);
        for ((row, column), golden) in GOLDEN {
            let value = features.double_value(&[row, column]);
            assert!((value / golden - 1.0).abs() < 1e-3, "{value} against {golden} at {row}, {column}");
        }
        let sum = features.sum(Kind::Double).double_value(&[]);
        assert!((sum / GOLDEN_SUM - 1.0).abs() < 1e-4, "{sum} against {GOLDEN_SUM}");
    }
    /// `scripts/golden_inception.py` prints these.
    const GOLDEN: [((i64, i64), f64); 4] = [
        ((0, 0), 582.374_389_648_437_5),
        ((0, 700), 71.516_921_997_070_31),
        ((1, 1300), 227.537_185_668_945_3),
        ((1, 2047), 469.437_683_105_468_75),
    ];
    const GOLDEN_SUM: f64 = 1_341_344.160_746_873_4;

    #[test]
    fn there_are_94_convolutions_and_what_is_missing_ends_the_reading() {
        let count = Cell::new(0);
        Inception::new(|name, shape| {
            count.set(count.get() + usize::from(name.ends_with(".conv.weight")));
            Ok(Tensor::zeros(shape, (Kind::Float, Device::Cpu)))
        })
        .unwrap();
        assert_eq!(count.get(), 94);

        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("inception.safetensors");
        let message = |tensors: &[(String, Tensor)]| {
            m6_runtime::write_tensors(&path, tensors).unwrap();
            Inception::load(&path, Device::Cpu).unwrap_err().to_string()
        };
        let one = |name: &str, shape: &[i64]| (format!("Conv2d_1a_3x3.bn.{name}"), made(name, shape));
        let (weight, variance) = (one("weight", &[32]), one("running_var", &[31]));
        let missing = message(&[(weight.0.clone(), weight.1.shallow_clone())]);
        assert!(missing.ends_with("Inception: `Conv2d_1a_3x3.bn.running_var` is missing"), "{missing}");
        let other = message(&[weight, variance]);
        assert!(other.ends_with("`Conv2d_1a_3x3.bn.running_var` is [31], expected [32]"), "{other}");
    }
}
