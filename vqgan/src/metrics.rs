//! How near reconstructions are to their originals, and how well the codebook is used.

use tch::{Device, Kind, Tensor};

/// Window of SSIM: 11 pixels, a Gaussian of this deviation (Wang et al. 2004).
const WINDOW: usize = 11;
const SIGMA: f64 = 1.5;
/// Stabilisers `(K1 L)²` and `(K2 L)²` for values of range `L` = 1.
const C1: f64 = 0.01 * 0.01;
const C2: f64 = 0.03 * 0.03;
/// Peak signal-to-noise ratio that equal pictures are given, in decibels.
const PSNR_OF_EQUALS: f64 = 100.0;
const BYTE_RANGE: f64 = 255.0;
/// Weights of the scales of MS-SSIM, the full size first (Wang et al. 2003).
const SCALE_WEIGHTS: [f64; 5] = [0.0448, 0.2856, 0.3001, 0.2363, 0.1333];

/// Peak signal-to-noise ratio of each picture in decibels, float32 `[b]`; `x` and `y` are bytes `[b, 3, h, w]`, the
/// squared error is the mean over pixels and colours, and equal pictures have 100 dB.
pub fn psnr(x: &Tensor, y: &Tensor) -> Tensor {
    let gap = x.to_kind(Kind::Float) - y.to_kind(Kind::Float);
    let error = gap.square().mean_dim([1, 2, 3].as_slice(), false, Kind::Float);
    ((BYTE_RANGE * BYTE_RANGE / error).log10() * 10.0).clamp_max(PSNR_OF_EQUALS)
}

/// Structural similarity (Wang et al. 2004) of pictures of one size: Gaussian window of 11x11, windows inside of the
/// picture only, population statistics, mean over windows and over R, G and B. The settings of scikit-image's
/// `gaussian_weights=True, use_sample_covariance=False` without its border.
#[derive(Debug)]
pub struct Ssim {
    /// The window as banded matrices, so that blurring is two products: `[h - 10, h]`, and transposed `[w, w - 10]`.
    rows: Tensor,
    columns: Tensor,
}

impl Ssim {
    /// For pictures of `height` by `width`, each at least 11.
    #[must_use]
    pub fn new(height: i64, width: i64, device: Device) -> Self {
        Self { rows: band(height).to_device(device), columns: band(width).tr().to_device(device) }
    }

    /// `[b]` from `x` and `y` of shape `[b, 3, h, w]`, float32 with values from 0 to 1. Differentiable.
    pub fn forward(&self, x: &Tensor, y: &Tensor) -> Tensor {
        let (luminance, structure) = self.maps(x, y);
        (luminance * structure).mean_dim([1, 2, 3].as_slice(), false, Kind::Float)
    }

    /// Both factors of the similarity at every window, `[b, 3, h - 10, w - 10]`: of the means, and of contrast and
    /// structure together.
    fn maps(&self, x: &Tensor, y: &Tensor) -> (Tensor, Tensor) {
        let blur = |t: &Tensor| self.rows.matmul(t).matmul(&self.columns);
        let (mean_x, mean_y) = (blur(x), blur(y));
        let (square_x, square_y, product) = (mean_x.square(), mean_y.square(), &mean_x * &mean_y);
        let variances = blur(&(x.square() + y.square())) - &square_x - &square_y;
        let covariance = blur(&(x * y)) - &product;
        let luminance = (product * 2.0 + C1) / (square_x + square_y + C1);
        let structure = (covariance * 2.0 + C2) / (variances + C2);
        (luminance, structure)
    }
}

/// Structural similarity over five scales (Wang et al. 2003), with the window and the statistics of [`Ssim`]: the
/// product over scales of the mean of contrast and structure, at the last scale of the whole similarity, each to the
/// power of its weight; mean over R, G and B. Between scales 2x2 pixels become their mean, an odd last row or column
/// is dropped, and a negative factor counts as 0, as in pytorch-msssim.
#[derive(Debug)]
pub struct MsSsim {
    scales: Vec<Ssim>,
}

impl MsSsim {
    /// Least height and width of a picture: the window must fit into the last scale.
    pub const MIN_SIDE: i64 = (WINDOW as i64) << (SCALE_WEIGHTS.len() - 1);

    /// For pictures of `height` by `width`; none where a side is below [`Self::MIN_SIDE`].
    #[must_use]
    pub fn new(height: i64, width: i64, device: Device) -> Option<Self> {
        let scale = |level| Ssim::new(height >> level, width >> level, device);
        (height.min(width) >= Self::MIN_SIDE)
            .then(|| Self { scales: (0..SCALE_WEIGHTS.len()).map(scale).collect() })
    }

    /// `[b]` from `x` and `y` of shape `[b, 3, h, w]`, float32 with values from 0 to 1.
    pub fn forward(&self, x: &Tensor, y: &Tensor) -> Tensor {
        let (mut x, mut y) = (x.shallow_clone(), y.shallow_clone());
        let mut product = Tensor::ones([], (Kind::Float, x.device()));
        for (level, (ssim, weight)) in self.scales.iter().zip(SCALE_WEIGHTS).enumerate() {
            if level > 0 {
                (x, y) = (halved(&x), halved(&y));
            }
            let (luminance, structure) = ssim.maps(&x, &y);
            let last = level + 1 == self.scales.len();
            let similarity = if last { luminance * structure } else { structure };
            let mean = similarity.mean_dim([2, 3].as_slice(), false, Kind::Float);
            product = mean.clamp_min(0.0).pow_tensor_scalar(weight) * product;
        }
        product.mean_dim(1, false, Kind::Float)
    }
}

/// `[b, 3, h, w]` at half the height and width.
fn halved(x: &Tensor) -> Tensor {
    x.avg_pool2d([2, 2], [2, 2], [0, 0], false, true, None)
}

/// Row `i` holds the window at columns `i` to `i + 10`; `[size - 10, size]`.
fn band(size: i64) -> Tensor {
    let weight = |offset: usize| {
        let x = offset as f64 - (WINDOW / 2) as f64;
        (-x * x / (2.0 * SIGMA * SIGMA)).exp()
    };
    let total: f64 = (0..WINDOW).map(weight).sum();
    let rows = size as usize - (WINDOW - 1);
    let mut band = vec![0f32; rows * size as usize];
    for row in 0..rows {
        for offset in 0..WINDOW {
            band[row * size as usize + row + offset] = (weight(offset) / total) as f32;
        }
    }
    Tensor::from_slice(&band).view([rows as i64, size])
}

/// Exponential of the entropy of `counts_k`, a scalar: how many codes would be in use if all were used alike.
pub fn perplexity(counts_k: &Tensor) -> Tensor {
    let shares = counts_k / counts_k.sum(Kind::Float);
    // A code without a share adds nothing; its logarithm must not be taken.
    let terms = &shares * shares.clamp_min(f64::from(f32::MIN_POSITIVE)).log();
    (-terms.sum(Kind::Float)).exp()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two pictures of bytes that differ.
    fn pair() -> (Tensor, Tensor) {
        let size = 3 * 13 * 14;
        let x: Vec<u8> = (0..size).map(|i| (i * 7 % 256) as u8).collect();
        let y: Vec<u8> = (0..size).map(|i| ((i * 7 % 256 * 3 + i * i % 31 * 4) / 4 % 256) as u8).collect();
        let tensor = |bytes: &[u8]| Tensor::from_slice(bytes).view([1, 3, 13, 14]);
        (tensor(&x), tensor(&y))
    }

    /// The figures were computed in double precision by a plain Python loop over windows and pixels.
    #[test]
    fn psnr_and_ssim_match_a_plain_computation() {
        let (x, y) = pair();
        let psnr = psnr(&x, &y).double_value(&[0]);
        assert!((psnr - PSNR_EXPECTED).abs() < 1e-4, "{psnr}");
        let unit = |t: &Tensor| t.to_kind(Kind::Float) / 255.0;
        let ssim = Ssim::new(13, 14, Device::Cpu).forward(&unit(&x), &unit(&y)).double_value(&[0]);
        assert!((ssim - SSIM_EXPECTED).abs() < 1e-5, "{ssim}");
    }
    const PSNR_EXPECTED: f64 = 19.034088;
    const SSIM_EXPECTED: f64 = 0.9371320;

    /// The bytes of `scripts/golden_ms_ssim.py`, from 0 to 1.
    fn large_pair(height: i64, width: i64) -> (Tensor, Tensor) {
        let tensor = |byte: fn(i64) -> i64| {
            let values: Vec<f32> = (0..3 * height * width).map(|i| (byte(i) % 256) as f32 / 255.0).collect();
            Tensor::from_slice(&values).view([1, 3, height, width])
        };
        (tensor(|i| i / 5 * 7 % 256), tensor(|i| (i / 5 * 7 % 256 * 3 + i * i % 31 * 8) / 4))
    }

    #[test]
    fn ms_ssim_matches_pytorch_msssim() {
        let (x, y) = large_pair(176, 192);
        let of = |x: &Tensor, y: &Tensor| {
            MsSsim::new(176, 192, Device::Cpu).unwrap().forward(x, y).double_value(&[0])
        };
        assert!((of(&x, &y) - MS_SSIM_EXPECTED).abs() < 1e-5, "{}", of(&x, &y));
        assert!((of(&x, &x) - 1.0).abs() < 1e-6);
        // Negative factors: their power is no number.
        assert_eq!(of(&x, &(1.0 - &x)), 0.0);
    }
    const MS_SSIM_EXPECTED: f64 = 0.945_585_609;

    #[test]
    fn ms_ssim_wants_the_window_to_fit_into_the_last_scale() {
        assert_eq!(MsSsim::MIN_SIDE, 176);
        assert!(MsSsim::new(175, 192, Device::Cpu).is_none());
        let (x, _) = large_pair(177, 191);
        let odd = MsSsim::new(177, 191, Device::Cpu).unwrap();
        assert!((odd.forward(&x, &x).double_value(&[0]) - 1.0).abs() < 1e-6);
    }

    #[test]
    fn equal_pictures_have_the_best_figures() {
        let (x, _) = pair();
        assert_eq!(psnr(&x, &x).double_value(&[0]), PSNR_OF_EQUALS);
        let unit = x.to_kind(Kind::Float) / 255.0;
        let ssim = Ssim::new(13, 14, Device::Cpu).forward(&unit, &unit).double_value(&[0]);
        assert!((ssim - 1.0).abs() < 1e-6);
    }

    #[test]
    fn psnr_of_one_step_everywhere() {
        let x = Tensor::full([2, 3, 4, 4], 100, (Kind::Uint8, Device::Cpu));
        let values = Vec::<f32>::try_from(psnr(&x, &(&x + 1))).unwrap();
        // 20 log10 255
        assert!(values.iter().all(|v| (v - 48.1308).abs() < 1e-3), "{values:?}");
    }

    #[test]
    fn perplexity_counts_the_codes_in_use() {
        let of = |counts: &[f32]| perplexity(&Tensor::from_slice(counts)).double_value(&[]);
        assert!((of(&[5.0, 5.0, 5.0, 5.0, 0.0]) - 4.0).abs() < 1e-5);
        assert!((of(&[0.0, 9.0]) - 1.0).abs() < 1e-6);
        // exp(-(3/4 ln 3/4 + 1/4 ln 1/4))
        assert!((of(&[3.0, 1.0]) - 1.754_765).abs() < 1e-5);
    }
}
