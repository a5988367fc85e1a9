//! Scores of a tokenizer on pictures: how near its reconstructions are and how much of the codebook they use.

use std::num::NonZero;
use std::path::Path;
use std::thread::available_parallelism;

use m6_data::{Rgb8, ShardSet, SkipLimits, Transform, grid};
use m6_run::{Task, fetching};
use m6_runtime::device::device;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::error::{Result, VqganError};
use crate::fidelity::{Comparison, Fidelity};
use crate::metrics::{MsSsim, Ssim, perplexity, psnr};
use crate::model::Vqgan;
use crate::pictures::{pictures_to_tensor, to_bytes, to_pictures, to_unit};
use crate::revive::counts;
use crate::stream::{PictureStream, with_picture};

/// Pictures in one pass.
const BATCH: usize = 32;
/// Pictures of the reconstruction grid of [`run`].
const GRID_PICTURES: usize = 12;
const GRID_GAP: u32 = 2;
/// Nothing is random in the pipeline of [`run`].
const UNUSED_SEED: u64 = 0;

/// Scores over a set of pictures.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VqganReport {
    /// Pictures.
    pub samples: u64,
    /// Mean over pictures of the peak signal-to-noise ratio in decibels, of pictures rounded to bytes.
    pub psnr: f64,
    /// Mean structural similarity ([`Ssim`]), of pictures rounded to bytes.
    pub ssim: f64,
    /// Mean structural similarity over five scales ([`MsSsim`]), of pictures rounded to bytes; none where a side is
    /// below [`MsSsim::MIN_SIDE`] pixels.
    pub ms_ssim: Option<f64>,
    /// Part of the codebook that occurs in the codes of the pictures.
    pub codebook_usage: f64,
    /// Exponential of the entropy of the codes; at most the size of the codebook.
    pub perplexity: f64,
    /// Bits of codes for a pixel, by the entropy of the codes: what an ideal coder that knows only how often each code
    /// occurs would need.
    pub bits_per_pixel: f64,
    /// Bits of codes for a pixel where each code takes the logarithm of the size of the codebook.
    pub nominal_bits_per_pixel: f64,
}

/// What [`run`] found.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct EvalReport {
    /// Picture by picture.
    #[serde(flatten)]
    pub scores: VqganReport,
    /// As sets, of pictures rounded to bytes; none of a single picture.
    pub fidelity: Option<Fidelity>,
}

/// Scores `model` on pictures, bytes `[n, 3, h, w]` on the CPU.
///
/// # Errors
/// When there is no picture or the model cannot take their size.
pub fn evaluate(model: &Vqgan, pictures: &Tensor) -> Result<VqganReport> {
    let mut sums = Sums::new(model);
    for batch in pictures.split(BATCH as i64, 0) {
        sums.add(&Pass::new(model, &batch)?);
    }
    sums.report(model)
}

/// Originals in the first row, reconstructions below; `pictures` are bytes `[n, 3, h, w]`.
///
/// # Errors
/// When the model cannot take their size.
pub fn reconstruction_grid(model: &Vqgan, pictures: &Tensor) -> Result<Rgb8> {
    let x = to_unit(pictures, model.device())?;
    let mut tiles = to_pictures(&x);
    let columns = tiles.len() as u32;
    tiles.extend(to_pictures(&reconstruct(model, &x)?.0));
    Ok(grid(&tiles, columns, GRID_GAP))
}

/// What to score, and how.
#[derive(Debug, Clone, Copy, Default)]
pub struct EvalRequest<'a> {
    /// At most so many pictures.
    pub limit: Option<usize>,
    /// Where to write originals above reconstructions as a PNG.
    pub grid: Option<&'a Path>,
    /// Weights of the Inception network that FID is measured with, in pytorch-fid's layout; without them, sets are
    /// compared by [`crate::fidelity::FidelitySpace::RandomNetwork`].
    pub inception: Option<&'a Path>,
}

/// Scores the tokenizer in folder `dir` on the pictures of `shards`, each resized and cropped to the model's
/// resolution.
///
/// # Errors
/// When the model, a shard, a picture or Inception's weights cannot be read, or the grid cannot be written.
pub fn run(dir: &Path, shards: &[String], device_name: &str, request: EvalRequest) -> Result<EvalReport> {
    let EvalRequest { limit, grid, inception } = request;
    let model = Vqgan::load(dir, device(device_name)?)?;
    let mut comparison = Comparison::new(inception, model.device())?;
    let side = model.config().resolution;
    let transform = Transform::centered(side as u32);
    // Some of a set may well be without a picture.
    let any_share = SkipLimits { share: 1.0, ..SkipLimits::default() };
    let shards = ShardSet::open_with(shards, SkipLimits::default(), fetching())?;
    for flaw in shards.flaws() {
        eprintln!("{flaw}");
    }
    let (pictures, _) = with_picture(&shards, &any_share)?;
    let total = limit.unwrap_or(usize::MAX).min(pictures.len()) as u64;
    let workers = available_parallelism().map_or(1, NonZero::get);
    let index = move |ordinal| pictures[ordinal as usize % pictures.len()];
    let mut stream = PictureStream::start(shards, transform, UNUSED_SEED, index, (0, workers, 2 * BATCH))?;

    let mut sums = Sums::new(&model);
    let mut task = Task::new("score reconstructions", total, "images");
    while stream.next_ordinal() < total {
        let done = stream.next_ordinal();
        let batch = stream.batch(BATCH, total, |note| eprintln!("{note}"))?;
        if batch.is_empty() {
            break;
        }
        let bytes = pictures_to_tensor(&batch)?;
        if let Some(path) = grid.filter(|_| sums.samples == 0) {
            let shown = bytes.narrow(0, 0, batch.len().min(GRID_PICTURES) as i64);
            reconstruction_grid(&model, &shown)?.save_png(path)?;
        }
        let pass = Pass::new(&model, &bytes)?;
        sums.add(&pass);
        comparison.add(&pass.originals, &pass.reconstructions);
        task.advance(stream.next_ordinal() - done);
    }
    task.finish();
    Ok(EvalReport { scores: sums.report(&model)?, fidelity: comparison.report()? })
}

/// Reconstructions of `x` and their codes.
fn reconstruct(model: &Vqgan, x: &Tensor) -> Result<(Tensor, Tensor)> {
    let factor = model.config().downsample();
    let codes = model.encode(x)?;
    let (height, width) = (x.size()[2], x.size()[3]);
    Ok((model.decode_codes(&codes, height / factor, width / factor)?, codes))
}

/// Some pictures through the model, on its device.
struct Pass {
    /// Bytes `[b, 3, h, w]`.
    originals: Tensor,
    /// Bytes as well.
    reconstructions: Tensor,
    /// `[b, places]`.
    codes: Tensor,
}

impl Pass {
    fn new(model: &Vqgan, bytes: &Tensor) -> Result<Self> {
        let x = to_unit(bytes, model.device())?;
        let (y, codes) = reconstruct(model, &x)?;
        Ok(Self { originals: to_bytes(&x), reconstructions: to_bytes(&y), codes })
    }
}

/// Running sums, on the model's device.
struct Sums {
    samples: u64,
    psnr: Tensor,
    ssim: Tensor,
    ms_ssim: Option<Tensor>,
    counts_k: Tensor,
}

impl Sums {
    fn new(model: &Vqgan) -> Self {
        let options = (Kind::Double, model.device());
        let zero = || Tensor::zeros([], options);
        let counts_k = Tensor::zeros([model.config().codebook_size], options);
        Self { samples: 0, psnr: zero(), ssim: zero(), ms_ssim: None, counts_k }
    }

    fn add(&mut self, Pass { originals: x, reconstructions: y, codes }: &Pass) {
        let unit = |bytes: &Tensor| bytes.to_kind(Kind::Float) / 255.0;
        let (height, width) = (x.size()[2], x.size()[3]);
        let (unit_x, unit_y) = (unit(x), unit(y));
        let ssim = Ssim::new(height, width, x.device()).forward(&unit_x, &unit_y);
        if let Some(ms_ssim) = MsSsim::new(height, width, x.device()) {
            let sum = ms_ssim.forward(&unit_x, &unit_y).sum(Kind::Double);
            self.ms_ssim =
                Some(self.ms_ssim.take().map_or_else(|| sum.shallow_clone(), |before| before + &sum));
        }
        self.samples += x.size()[0] as u64;
        self.psnr += psnr(x, y).sum(Kind::Double);
        self.ssim += ssim.sum(Kind::Double);
        self.counts_k += counts(&codes.flatten(0, 1), self.counts_k.size()[0]);
    }

    fn report(self, model: &Vqgan) -> Result<VqganReport> {
        if self.samples == 0 {
            return Err(VqganError::Pictures("none, expected at least one".into()));
        }
        let samples = self.samples as f64;
        let used = self.counts_k.gt(0.0).to_kind(Kind::Double).mean(Kind::Double);
        let perplexity = perplexity(&self.counts_k).double_value(&[]);
        let pixels_a_code = (model.config().downsample() as f64).powi(2);
        Ok(VqganReport {
            samples: self.samples,
            psnr: self.psnr.double_value(&[]) / samples,
            ssim: self.ssim.double_value(&[]) / samples,
            ms_ssim: self.ms_ssim.map(|sum| sum.double_value(&[]) / samples),
            codebook_usage: used.double_value(&[]),
            perplexity,
            bits_per_pixel: perplexity.log2() / pixels_a_code,
            nominal_bits_per_pixel: (model.config().codebook_size as f64).log2() / pixels_a_code,
        })
    }
}

#[cfg(test)]
mod tests {
    use m6_data::ShardWriter;
    use m6_runtime::Params;
    use tch::Device;

    use super::*;
    use crate::config::tests::tiny;
    use crate::model::Dtype;

    #[test]
    fn a_folder_is_scored_and_shown() {
        let dir = tempfile::tempdir().unwrap();
        let mut writer = ShardWriter::create(dir.path(), "val", u64::MAX).unwrap();
        for n in 0..3u8 {
            let picture = Rgb8::filled(20, 20, [n * 50, 128, 255 - n * 50]);
            writer.write(&n.to_string(), &[("png", &picture.encode_png().unwrap())]).unwrap();
        }
        let shards = [writer.finish().unwrap()[0].display().to_string()];
        let model = Vqgan::new(&Params::new(Device::Cpu, 1), &tiny());
        model.save(dir.path(), Dtype::Float32).unwrap();
        let png = dir.path().join("grid.png");
        let EvalReport { scores: report, fidelity } =
            run(dir.path(), &shards, "cpu", EvalRequest { grid: Some(&png), ..EvalRequest::default() })
                .unwrap();
        assert_eq!(report.samples, 3);
        // An untrained decoder makes grey of everything.
        let Fidelity { frechet_distance, kernel_distance, .. } = fidelity.unwrap();
        assert!(frechet_distance > 0.1 && kernel_distance.is_finite(), "{fidelity:?}");
        assert!(report.psnr > 0.0 && report.ssim < 1.0, "{report:?}");
        // A used code is at least one of 32, and the perplexity is at most the number of used ones.
        assert!(
            report.codebook_usage >= 1.0 / 32.0 && report.perplexity <= report.codebook_usage * 32.0 + 1e-9
        );
        // 5 bits for a code of 32, which stands for 2 x 2 pixels.
        assert_eq!(report.nominal_bits_per_pixel, 5.0 / 4.0);
        assert!((report.bits_per_pixel - report.perplexity.log2() / 4.0).abs() < 1e-9);
        assert_eq!(report.ms_ssim, None, "pictures of 16 pixels have no five scales");
        let grid = Rgb8::decode(&std::fs::read(png).unwrap()).unwrap();
        assert!(grid.width >= 3 * 16 && grid.height >= 2 * 16);
        let of = |limit| {
            let request = EvalRequest { limit: Some(limit), ..EvalRequest::default() };
            run(dir.path(), &shards, "cpu", request).unwrap()
        };
        assert_eq!(of(2).scores.samples, 2);
        assert_eq!(of(1).fidelity, None);
    }
}
