//! How fast an image tokenizer encodes and decodes.

use std::path::Path;
use std::time::Instant;

use m6_runtime::Params;
use m6_runtime::device::{device, memory};
use serde::Serialize;
use tch::{Device, Kind, Tensor};

use crate::config::COLOURS;
use crate::error::{Result, VqganError};
use crate::model::Vqgan;
use crate::train::TrainConfig;

/// Passes before time is taken, while libraries choose their algorithms.
const WARM_UP: usize = 3;
/// Passes that are timed.
const PASSES: usize = 20;

/// What [`run`] measured.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct VqganBenchReport {
    /// Pictures a pass.
    pub batch: i64,
    /// Side of the pictures.
    pub resolution: i64,
    /// Pictures to codes.
    pub encode_images_per_s: f64,
    /// Codes to pictures.
    pub decode_images_per_s: f64,
    /// Most memory of the device that was in use; of the process on a CPU.
    pub memory_peak_bytes: u64,
}

/// Times a tokenizer on random pictures: that of a model folder, or of a training config (a `.toml`) with random weights.
///
/// # Errors
/// When the model cannot be read or the device is not there.
pub fn run(source: &Path, device_name: &str, batch: i64) -> Result<VqganBenchReport> {
    let device = device(device_name)?;
    if device.is_cuda() {
        tch::Cuda::cudnn_set_benchmark(true);
    }
    let model = open(source, device)?;
    let config = model.config();
    let (side, grid) = (config.resolution, config.grid());
    let pictures = Tensor::rand([batch, COLOURS, side, side], (Kind::Float, device)) * 2.0 - 1.0;
    let codes = Tensor::randint(config.codebook_size, [batch, grid * grid], (Kind::Int64, device));
    Ok(VqganBenchReport {
        batch,
        resolution: side,
        encode_images_per_s: rate(device, batch, || model.encode(&pictures).map(drop))?,
        decode_images_per_s: rate(device, batch, || model.decode_codes(&codes, grid, grid).map(drop))?,
        memory_peak_bytes: memory(device)?.peak,
    })
}

fn open(source: &Path, device: Device) -> Result<Vqgan> {
    if source.extension().is_none_or(|extension| extension != "toml") {
        return Vqgan::load(source, device);
    }
    let config = m6_run::config::load::<TrainConfig>(source, &[])?.config;
    config.model.validate().map_err(|problem| {
        let key = format!("model.{}", problem.key);
        VqganError::Config { path: source.to_owned(), key, message: problem.message }
    })?;
    let params = Params::new(device, config.seed);
    let model = Vqgan::new(&params, &config.model);
    params.set_trainable(false);
    Ok(model)
}

/// Waits until a GPU has done what it was given.
fn synchronize(device: Device) {
    if let Device::Cuda(index) = device {
        tch::Cuda::synchronize(index as i64);
    }
}

/// Pictures a second of `pass`, which computes a batch.
fn rate(device: Device, batch: i64, pass: impl Fn() -> Result<()>) -> Result<f64> {
    (0..WARM_UP).try_for_each(|_| pass())?;
    synchronize(device);
    let start = Instant::now();
    (0..PASSES).try_for_each(|_| pass())?;
    synchronize(device);
    Ok((PASSES as i64 * batch) as f64 / start.elapsed().as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::tiny;
    use crate::model::Dtype;

    #[test]
    fn folders_and_configs_are_timed() {
        let dir = tempfile::tempdir().unwrap();
        let model = Vqgan::new(&Params::new(Device::Cpu, 1), &tiny());
        model.save(dir.path(), Dtype::Float32).unwrap();
        let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/vqgan/tiny.toml");
        for (source, resolution) in [(dir.path(), 16), (config.as_path(), 32)] {
            let report = run(source, "cpu", 2).unwrap();
            assert_eq!((report.batch, report.resolution), (2, resolution));
            assert!(report.encode_images_per_s > 0.0 && report.decode_images_per_s > 0.0);
            assert!(report.memory_peak_bytes > 0);
        }
    }
}
