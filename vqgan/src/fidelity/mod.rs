//! How far reconstructions as a set are from the originals as a set: what FID and KID measure, in a space of features
//! that the figures are named after.

mod inception;
mod random;

use std::path::Path;

use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::error::Result;
use inception::Inception;
use random::RandomNetwork;

/// Rows whose kernels are taken at a time, to bound the memory.
const KERNEL_ROWS: i64 = 1024;
/// The polynomial kernel of KID: `(x y / d + 1)` to this power.
const KERNEL_DEGREE: i64 = 3;

/// A space of features. Figures of different spaces do not compare.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FidelitySpace {
    /// Mean activations of a convolutional network of four layers that was never trained: sensitive to colour, edges
    /// and blur, and with no notion of content.
    #[serde(rename = "random-conv-480")]
    RandomNetwork,
    /// InceptionV3 after its third pooling, with weights from a file. With those that pytorch-fid publishes, the
    /// Frechet distance is FID and the kernel distance KID.
    #[serde(rename = "inception-v3-pool3")]
    Inception,
}

impl FidelitySpace {
    /// Name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::RandomNetwork => "random-conv-480",
            Self::Inception => "inception-v3-pool3",
        }
    }
}

/// Distances between two sets of pictures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fidelity {
    /// The space of the features.
    pub space: FidelitySpace,
    /// [`frechet_distance`] of the features. Falls with the number of pictures.
    pub frechet_distance: f64,
    /// [`kernel_distance`] of the features. Does not depend on the number of pictures but for chance.
    pub kernel_distance: f64,
}

/// Makes features of pictures.
#[derive(Debug)]
enum Network {
    Random(RandomNetwork),
    Inception(Inception),
}

impl Network {
    fn space(&self) -> FidelitySpace {
        match self {
            Self::Random(_) => FidelitySpace::RandomNetwork,
            Self::Inception(_) => FidelitySpace::Inception,
        }
    }

    /// `[b, d]` float32 of bytes `[b, 3, h, w]`.
    fn features(&self, bytes: &Tensor) -> Tensor {
        match self {
            Self::Random(network) => network.features(bytes),
            Self::Inception(network) => network.features(bytes),
        }
    }
}

/// Collects the features of originals and reconstructions.
#[derive(Debug)]
pub(crate) struct Comparison {
    network: Network,
    originals: Vec<Tensor>,
    reconstructions: Vec<Tensor>,
}

impl Comparison {
    /// For pictures on `device`, by Inception with the weights at `inception` or else by the network without training.
    ///
    /// # Errors
    /// When the weights cannot be read or are those of another network.
    pub(crate) fn new(inception: Option<&Path>, device: Device) -> Result<Self> {
        let network = match inception {
            Some(path) => Network::Inception(Inception::load(path, device)?),
            None => Network::Random(RandomNetwork::new(device)),
        };
        Ok(Self { network, originals: Vec::new(), reconstructions: Vec::new() })
    }

    /// Takes in originals `x` and their reconstructions `y`, bytes `[b, 3, h, w]`.
    pub(crate) fn add(&mut self, x: &Tensor, y: &Tensor) {
        self.originals.push(self.network.features(x));
        self.reconstructions.push(self.network.features(y));
    }

    /// The distances; none of a single picture, which has no spread.
    pub(crate) fn report(self) -> Result<Option<Fidelity>> {
        let [x, y] = [self.originals, self.reconstructions].map(|parts| Tensor::cat(&parts, 0));
        if x.size()[0] < 2 {
            return Ok(None);
        }
        Ok(Some(Fidelity {
            space: self.network.space(),
            frechet_distance: frechet_distance(&x, &y)?,
            kernel_distance: kernel_distance(&x, &y),
        }))
    }
}

/// The squared Frechet distance between the normal distributions with the means and covariances of `x` `[n, d]` and `y`
/// `[m, d]`, at least two rows each (Heusel et al. 2017, who call it FID in Inception's space); in float64.
///
/// # Errors
/// When a feature is no number.
pub fn frechet_distance(x: &Tensor, y: &Tensor) -> Result<f64> {
    let ((mean_x, covariance_x), (mean_y, covariance_y)) = (moments(x), moments(y));
    // The root of the product of two covariances is not symmetric. Its trace is that of the root of a product that is.
    let root = square_root(&covariance_x)?;
    let values = eigenvalues(&root.matmul(&covariance_y).matmul(&root))?;
    let common = values.clamp_min(0.0).sqrt().sum(Kind::Double);
    let spread = covariance_x.trace() + covariance_y.trace() - common * 2.0;
    Ok(((mean_x - mean_y).square().sum(Kind::Double) + spread).double_value(&[]))
}

/// The unbiased squared maximum mean discrepancy between `x` and `y`, both `[n, d]` with at least two rows, under the
/// kernel `(x y / d + 1)³` (Binkowski et al. 2018, who call it KID in Inception's space); over all rows and in float64.
/// Row `i` of `y` is the reconstruction of row `i` of `x`: the two are not independent, and their kernel is left out.
/// About 0 where the sets are alike, at times below.
pub fn kernel_distance(x: &Tensor, y: &Tensor) -> f64 {
    let (x, y) = (x.to_kind(Kind::Double), y.to_kind(Kind::Double));
    let rows = x.size()[0] as f64;
    let mean = |a: &Tensor, b: &Tensor| other_kernels(a, b) / (rows * (rows - 1.0));
    (mean(&x, &x) + mean(&y, &y) - mean(&x, &y) * 2.0).double_value(&[])
}

/// The sum of the kernels of all rows of `a` with all rows of `b` but those at the same place.
fn other_kernels(a: &Tensor, b: &Tensor) -> Tensor {
    let width = a.size()[1] as f64;
    let kernel =
        |products: Tensor| (products / width + 1.0).pow_tensor_scalar(KERNEL_DEGREE).sum(Kind::Double);
    let all: Tensor = a.split(KERNEL_ROWS, 0).iter().map(|block| kernel(block.matmul(&b.tr()))).sum();
    all - kernel((a * b).sum_dim_intlist(1, false, Kind::Double))
}

/// Mean `[d]` and covariance `[d, d]` of `rows` `[n, d]`, float64.
fn moments(rows: &Tensor) -> (Tensor, Tensor) {
    let rows = rows.to_kind(Kind::Double);
    let mean = rows.mean_dim(0, false, Kind::Double);
    let centred = &rows - &mean;
    let covariance = centred.tr().matmul(&centred) / (rows.size()[0] - 1) as f64;
    (mean, covariance)
}

/// The root of a symmetric matrix whose eigenvalues are 0 or more but for rounding.
fn square_root(matrix: &Tensor) -> Result<Tensor> {
    let (values, vectors) = matrix.f_linalg_eigh("L").map_err(m6_runtime::RuntimeError::from)?;
    Ok((&vectors * values.clamp_min(0.0).sqrt()).matmul(&vectors.tr()))
}

fn eigenvalues(matrix: &Tensor) -> Result<Tensor> {
    Ok(matrix.f_linalg_eigvalsh("L").map_err(m6_runtime::RuntimeError::from)?)
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init, Params};
    use tch::Device;

    use super::*;

    fn rows(seed: u64, rows: i64, width: i64) -> Tensor {
        Params::new(Device::Cpu, seed).add("rows", &[rows, width], Init::Normal(1.0), Group::Buffer)
    }

    /// Of two matrices of size 2 the trace of the root of the product `p` is `sqrt(tr p + 2 sqrt(det p))`.
    #[test]
    fn the_frechet_distance_matches_its_closed_form_in_two_dimensions() {
        let x = rows(1, 40, 2);
        let y = rows(2, 30, 2).matmul(&Tensor::from_slice(&[0.5f32, 0.4, 0.0, 2.0]).view([2, 2])) + 0.7;
        let moments = |rows: &Tensor| {
            let values = Vec::<Vec<f64>>::try_from(rows.to_kind(Kind::Double)).unwrap();
            let n = values.len() as f64;
            let mean = [0, 1].map(|j| values.iter().map(|row| row[j]).sum::<f64>() / n);
            let covariance = [0, 1].map(|i| {
                [0, 1].map(|j| {
                    values.iter().map(|row| (row[i] - mean[i]) * (row[j] - mean[j])).sum::<f64>() / (n - 1.0)
                })
            });
            (mean, covariance)
        };
        let ((mean_x, a), (mean_y, b)) = (moments(&x), moments(&y));
        let product =
            [0, 1].map(|i: usize| [0, 1].map(|j: usize| (0..2).map(|k| a[i][k] * b[k][j]).sum::<f64>()));
        let trace = |m: [[f64; 2]; 2]| m[0][0] + m[1][1];
        let determinant = product[0][0] * product[1][1] - product[0][1] * product[1][0];
        let common = (trace(product) + 2.0 * determinant.sqrt()).sqrt();
        let means: f64 = mean_x.iter().zip(mean_y).map(|(x, y)| (x - y).powi(2)).sum();
        let expected = means + trace(a) + trace(b) - 2.0 * common;
        let distance = frechet_distance(&x, &y).unwrap();
        assert!((distance - expected).abs() < 1e-9, "{distance} against {expected}");
    }

    #[test]
    fn equal_sets_have_no_frechet_distance_even_where_there_are_more_features_than_pictures() {
        let x = rows(1, 6, 20);
        assert!(frechet_distance(&x, &x).unwrap().abs() < 1e-6);
        // Moved by 0.5 in each of 20 dimensions.
        assert!((frechet_distance(&x, &(&x + 0.5)).unwrap() - 5.0).abs() < 1e-5);
    }

    #[test]
    fn features_that_are_no_numbers_have_no_distance() {
        let x = Tensor::full([4, 3], f64::NAN, (Kind::Float, Device::Cpu));
        assert!(!frechet_distance(&x, &x).is_ok_and(f64::is_finite));
    }

    #[test]
    fn the_kernel_distance_matches_a_plain_computation() {
        let (count, width) = (7, 5);
        let (x, y) = (rows(1, count, width), rows(2, count, width) * 1.3 + 0.2);
        let plain = |t: &Tensor| Vec::<Vec<f64>>::try_from(t.to_kind(Kind::Double)).unwrap();
        let (a, b) = (plain(&x), plain(&y));
        let kernel = |p: &[f64], q: &[f64]| {
            (p.iter().zip(q).map(|(p, q)| p * q).sum::<f64>() / width as f64 + 1.0).powi(3)
        };
        let mut sum = 0.0;
        for i in 0..count as usize {
            for j in (0..count as usize).filter(|&j| j != i) {
                sum +=
                    kernel(&a[i], &a[j]) + kernel(&b[i], &b[j]) - kernel(&a[i], &b[j]) - kernel(&b[i], &a[j]);
            }
        }
        let expected = sum / (count * (count - 1)) as f64;
        let distance = kernel_distance(&x, &y);
        assert!((distance - expected).abs() < 1e-9, "{distance} against {expected}");
    }

    #[test]
    fn kernels_in_blocks_are_those_of_the_whole() {
        let (x, y) = (rows(1, KERNEL_ROWS + 3, 2), rows(2, KERNEL_ROWS + 3, 2));
        let whole = ((x.matmul(&y.tr()) / 2.0 + 1.0).pow_tensor_scalar(3).fill_diagonal_(0.0, false))
            .sum(Kind::Double);
        let blocks = other_kernels(&x, &y);
        assert!(((blocks - &whole) / whole).double_value(&[]).abs() < 1e-5);
    }

    /// The mean over many draws from one distribution is 0 where the estimate is unbiased.
    #[test]
    fn the_kernel_distance_is_unbiased() {
        let draws = 400;
        let distances: Vec<f64> = (0..draws)
            .map(|draw| kernel_distance(&rows(2 * draw, 5, 3), &rows(2 * draw + 1, 5, 3)))
            .collect();
        let mean = distances.iter().sum::<f64>() / draws as f64;
        let variance = distances.iter().map(|d| (d - mean).powi(2)).sum::<f64>() / draws as f64;
        assert!(mean.abs() < 3.0 * (variance / draws as f64).sqrt(), "{mean} of variance {variance}");
    }
}
