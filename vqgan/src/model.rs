//! The image tokenizer: pictures to codes and back, and its folder on disk.

mod large;

use std::fs;
use std::path::Path;

use m6_run::write_atomic;
use m6_runtime::fused::channels_last;
use m6_runtime::nn::Conv2d;
use m6_runtime::{Params, RuntimeError};
use serde::{Deserialize, Serialize};
use tch::{Device, Kind, Tensor};

use crate::bottleneck::{Bottleneck, Quantized};
use crate::config::{COLOURS, VqganConfig};
use crate::error::{Result, VqganError};
use crate::layers::{Decoder, Encoder};
use crate::quantize::Quantizer;
pub(crate) use large::Tiling;

pub(crate) const CONFIG_FILE: &str = "config.json";
const WEIGHT_FILE: &str = "model.safetensors";
/// The files of a model folder.
pub const FILES: [&str; 2] = [CONFIG_FILE, WEIGHT_FILE];
/// Hexadecimal digits of the weight file's BLAKE3 that name a tokenizer.
const HASH_DIGITS: usize = 16;

/// How weights are stored in a model folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Dtype {
    /// 16 bits: what a finished model is shipped in.
    Bfloat16,
    /// 32 bits: nothing is lost.
    Float32,
}

impl Dtype {
    fn kind(self) -> Kind {
        match self {
            Self::Bfloat16 => Kind::BFloat16,
            Self::Float32 => Kind::Float,
        }
    }
}

/// `config.json` of a model folder.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct ModelFile {
    dtype: Dtype,
    model: VqganConfig,
}

/// What training needs of one pass.
#[derive(Debug)]
pub struct VqganOutput {
    /// Pictures `[b, 3, h, w]`, float32, about -1 to 1.
    pub reconstruction: Tensor,
    /// The encoder's rows `[n, code_dim]` as they are compared with codes, float32; `n` runs over pictures, rows,
    /// columns.
    pub rows_nd: Tensor,
    /// Their codes, unless the pass was continuous.
    pub quantized: Option<Quantized>,
}

/// An image tokenizer. Computes in bf16 on a GPU and in float32 on the CPU; codes are always chosen in float32.
#[derive(Debug)]
pub struct Vqgan {
    config: VqganConfig,
    params: Params,
    compute: Kind,
    hash: Option<String>,
    encoder: Encoder,
    quant_conv: Conv2d,
    quantizer: Quantizer,
    post_quant_conv: Conv2d,
    decoder: Decoder,
}

impl Vqgan {
    /// A fresh model under `params`; `config` has passed [`VqganConfig::validate`].
    #[must_use]
    pub fn new(params: &Params, config: &VqganConfig) -> Self {
        Self {
            config: config.clone(),
            params: params.clone(),
            compute: compute_kind(params.device()),
            hash: None,
            encoder: Encoder::new(&(params / "encoder"), config),
            quant_conv: Conv2d::new(&(params / "quant_conv"), config.z_channels, config.code_dim, 1, 1, 0),
            quantizer: Quantizer::new(&(params / "quantize"), config),
            post_quant_conv: Conv2d::new(
                &(params / "post_quant_conv"),
                config.code_dim,
                config.z_channels,
                1,
                1,
                0,
            ),
            decoder: Decoder::new(&(params / "decoder"), config),
        }
    }

    /// The model in folder `dir`, for inference on `device`.
    ///
    /// # Errors
    /// When a file is missing or malformed, or the weights are not exactly those that the config asks for.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        // Every weight is overwritten, so the seed does not matter.
        let params = Params::new(device, 0);
        let mut model = Self::new(&params, &read_model_file(dir)?.model);
        model.load_weights(dir)?;
        params.set_trainable(false);
        let weights = dir.join(WEIGHT_FILE);
        let bytes = fs::read(&weights).map_err(|error| VqganError::model(&weights, error))?;
        model.hash = Some(hash_of(&bytes));
        Ok(model)
    }

    /// The shape of the model in folder `dir`.
    ///
    /// # Errors
    /// When its config is missing or malformed.
    pub fn read_config(dir: &Path) -> Result<VqganConfig> {
        Ok(read_model_file(dir)?.model)
    }

    /// Takes the weights of folder `dir`, which must hold a model of the same config.
    ///
    /// # Errors
    /// As for [`Vqgan::load`], and when the config is another.
    pub fn load_weights(&self, dir: &Path) -> Result<()> {
        let file = read_model_file(dir)?;
        if file.model != self.config {
            let reason = "describes another model than the config of this run";
            return Err(VqganError::model(&dir.join(CONFIG_FILE), reason));
        }
        Ok(self.params.load(&dir.join(WEIGHT_FILE), file.dtype.kind())?)
    }

    /// Writes `config.json` and `model.safetensors` into folder `dir`, which is made if it is not there.
    ///
    /// # Errors
    /// When a file cannot be written.
    pub fn save(&self, dir: &Path, dtype: Dtype) -> Result<()> {
        fs::create_dir_all(dir).map_err(|error| VqganError::model(dir, error))?;
        let path = dir.join(CONFIG_FILE);
        let json = serde_json::to_vec_pretty(&ModelFile { dtype, model: self.config.clone() })
            .map_err(|error| VqganError::model(&path, error))?;
        self.params.save(&dir.join(WEIGHT_FILE), dtype.kind())?;
        Ok(write_atomic(path, &json)?)
    }

    /// All weights by their names in taming-transformers' state dict.
    pub(crate) fn tensors(&self) -> Vec<(String, Tensor)> {
        self.params.entries().into_iter().map(|(name, param)| (name, param.tensor.detach())).collect()
    }

    /// The shape of the model.
    #[must_use]
    pub fn config(&self) -> &VqganConfig {
        &self.config
    }

    /// Where the model computes.
    #[must_use]
    pub fn device(&self) -> Device {
        self.params.device()
    }

    /// The first 16 hexadecimal digits of the BLAKE3 of the weight file that the model was loaded from. Models trained
    /// on its codes record it. `None` for a model that was not loaded.
    #[must_use]
    pub fn hash(&self) -> Option<&str> {
        self.hash.as_deref()
    }

    /// The codebook `[codebook_size, code_dim]`, not normalised.
    pub fn codebook(&self) -> Tensor {
        self.quantizer.codebook()
    }

    /// The kernel of the decoder's last convolution, at which losses are balanced.
    pub(crate) fn last_kernel(&self) -> &Tensor {
        self.decoder.last_kernel()
    }

    /// One training pass over pictures `[b, 3, h, w]` from -1 to 1, with gradients.
    #[must_use]
    pub fn forward(&self, x: &Tensor, bottleneck: Bottleneck) -> VqganOutput {
        let grid = self.quantizer.rows(&self.latent(x).permute([0, 2, 3, 1]));
        let rows_nd = grid.reshape([-1, self.config.code_dim]);
        let quantized = match bottleneck {
            Bottleneck::Continuous => None,
            Bottleneck::Codes(passage) => Some(self.quantizer.quantize(&rows_nd, passage)),
        };
        let decoded = match &quantized {
            Some(quantized) => quantized.passed_nd.reshape_as(&grid),
            None => grid,
        };
        VqganOutput { reconstruction: self.decode_grid(&decoded), rows_nd, quantized }
    }

    /// Codes `[b, h / f * w / f]` of pictures `[b, 3, h, w]` from -1 to 1, int64, row by row; `f` is the downsampling
    /// factor.
    ///
    /// # Errors
    /// When the shape is another or a side is no multiple of `f`.
    pub fn encode(&self, x: &Tensor) -> Result<Tensor> {
        let latent = self.encode_latent(x)?;
        let _guard = tch::no_grad_guard();
        Ok(self.quantizer.choose(&self.rows(&latent)).view([latent.size()[0], -1]))
    }

    /// A latent as rows `[n, code_dim]` that are compared with codes.
    fn rows(&self, latent: &Tensor) -> Tensor {
        self.quantizer.rows(&latent.permute([0, 2, 3, 1])).reshape([-1, self.config.code_dim])
    }

    /// What the quantiser sees, `[b, code_dim, h / f, w / f]`, float32, before any normalisation: a feature space for
    /// evaluation.
    ///
    /// # Errors
    /// As for [`Vqgan::encode`].
    pub fn encode_latent(&self, x: &Tensor) -> Result<Tensor> {
        let factor = self.config.downsample();
        match x.size()[..] {
            [_, COLOURS, h, w] if h % factor == 0 && w % factor == 0 && h > 0 && w > 0 => {}
            ref other => {
                let reason = format!(
                    "{other:?}, expected [batch, 3, height, width] with sides in multiples of {factor}"
                );
                return Err(VqganError::Pictures(reason));
            }
        }
        let _guard = tch::no_grad_guard();
        Ok(self.latent(x).to_kind(Kind::Float))
    }

    /// Pictures `[b, 3, grid_h * f, grid_w * f]`, float32, -1 to 1, of codes `[b, grid_h * grid_w]`, int64. Waits for
    /// the device, to check the codes.
    ///
    /// # Errors
    /// When there are more or fewer codes than the grid has places, or one is not in the codebook.
    pub fn decode_codes(&self, codes: &Tensor, grid_h: i64, grid_w: i64) -> Result<Tensor> {
        let _guard = tch::no_grad_guard();
        let grid = self.checked_grid(codes, grid_h, grid_w)?;
        Ok(self.decode_grid(&grid).clamp(-1.0, 1.0))
    }

    /// Codes `[b, grid_h * grid_w]` as rows `[b, grid_h, grid_w, code_dim]`.
    fn checked_grid(&self, codes: &Tensor, grid_h: i64, grid_w: i64) -> Result<Tensor> {
        match codes.size()[..] {
            [b, places] if b > 0 && places > 0 && grid_h > 0 && places == grid_h * grid_w => {}
            ref other => {
                let places = grid_h * grid_w;
                return Err(VqganError::Codes(format!(
                    "shape {other:?}, expected [batch, {places}] ({grid_h}x{grid_w})"
                )));
            }
        }
        let (low, high) = (codes.min().int64_value(&[]), codes.max().int64_value(&[]));
        let last = self.config.codebook_size - 1;
        if low < 0 || high > last {
            return Err(VqganError::Codes(format!("{low} to {high}, expected 0 to {last}")));
        }
        let rows = self.quantizer.lookup(&codes.to_device(self.device()));
        Ok(rows.view([-1, grid_h, grid_w, self.config.code_dim]))
    }

    fn latent(&self, x: &Tensor) -> Tensor {
        let x = channels_last(&x.to_device(self.device()).to_kind(self.compute));
        self.quant_conv.forward(&self.encoder.forward(&x))
    }

    /// Rows `[b, h, w, code_dim]` to pictures.
    fn decode_grid(&self, grid: &Tensor) -> Tensor {
        self.decoder.forward(&self.decoder_input(grid)).to_kind(Kind::Float)
    }

    /// Rows `[b, h, w, code_dim]` to `[b, z_channels, h, w]`.
    fn decoder_input(&self, grid: &Tensor) -> Tensor {
        self.post_quant_conv.forward(&channels_last(&grid.permute([0, 3, 1, 2]).to_kind(self.compute)))
    }
}

/// The dtype that activations have on a device.
pub(crate) fn compute_kind(device: Device) -> Kind {
    if device.is_cuda() { Kind::BFloat16 } else { Kind::Float }
}

fn read_model_file(dir: &Path) -> Result<ModelFile> {
    let path = dir.join(CONFIG_FILE);
    let bytes = fs::read(&path).map_err(|error| VqganError::model(&path, error))?;
    let file: ModelFile = serde_json::from_slice(&bytes).map_err(|error| VqganError::model(&path, error))?;
    file.model.validate().map_err(|problem| VqganError::Config {
        path,
        key: format!("model.{}", problem.key),
        message: problem.message,
    })?;
    Ok(file)
}

fn hash_of(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..HASH_DIGITS].to_owned()
}

impl From<tch::TchError> for VqganError {
    fn from(error: tch::TchError) -> Self {
        RuntimeError::from(error).into()
    }
}

#[cfg(test)]
mod tests {
    use m6_runtime::{Group, Init};

    use super::*;
    use crate::bottleneck::{Passage, divergence_from_uniform};
    use crate::config::QuantizerKind;
    use crate::config::tests::tiny;

    const KINDS: [QuantizerKind; 4] =
        [QuantizerKind::Normalized, QuantizerKind::Nearest, QuantizerKind::SimVq, QuantizerKind::Gumbel];

    fn model(seed: u64) -> Vqgan {
        with_quantizer(seed, QuantizerKind::Normalized)
    }

    fn with_quantizer(seed: u64, quantizer: QuantizerKind) -> Vqgan {
        Vqgan::new(&Params::new(Device::Cpu, seed), &VqganConfig { quantizer, ..tiny() })
    }

    fn pictures() -> Tensor {
        Params::new(Device::Cpu, 9).add("x", &[2, 3, 16, 24], Init::Uniform(1.0), Group::Buffer)
    }

    #[test]
    fn forward_agrees_with_encode_then_decode() {
        for quantizer in KINDS {
            let model = with_quantizer(1, quantizer);
            let x = pictures();
            let codes = model.encode(&x).unwrap();
            assert_eq!((codes.size(), codes.kind()), (vec![2, 8 * 12], Kind::Int64));
            let decoded = model.decode_codes(&codes, 8, 12).unwrap();
            assert_eq!(decoded.size(), x.size());
            let output = model.forward(&x, Bottleneck::Codes(Passage::StraightThrough));
            assert_eq!(output.quantized.unwrap().codes_n, codes.flatten(0, 1));
            let gap = (output.reconstruction.clamp(-1.0, 1.0) - decoded).abs().max().double_value(&[]);
            assert!(gap < 1e-5, "{quantizer:?}: {gap}");
        }
    }

    #[test]
    fn gradients_reach_every_parameter() {
        for quantizer in KINDS {
            let model = with_quantizer(1, quantizer);
            let passage = match quantizer {
                QuantizerKind::Gumbel => Passage::Gumbel { temperature: 1.0, hard: true },
                _ => Passage::Rotation,
            };
            let output = model.forward(&pictures(), Bottleneck::Codes(passage));
            let quantized = output.quantized.as_ref().unwrap();
            let loss = output.reconstruction.square().mean(Kind::Float);
            let loss = match quantizer {
                QuantizerKind::Gumbel => {
                    loss + divergence_from_uniform(&quantized.compared.affinity(&output.rows_nd))
                }
                _ => {
                    loss + quantized.codebook_loss(&output.rows_nd)
                        + quantized.commitment_loss(&output.rows_nd)
                }
            };
            loss.backward();
            let untouched: Vec<_> =
                model.params.trainable().into_iter().filter(|(_, p)| !p.tensor.grad().defined()).collect();
            assert!(untouched.is_empty(), "{quantizer:?}: {untouched:?}");
        }
    }

    /// A bright corner must change codes near the same corner of the grid: the order is row by row.
    #[test]
    fn codes_are_row_major() {
        let model = model(1);
        let dark = Tensor::full([1, 3, 32, 64], -1.0, (Kind::Float, Device::Cpu));
        let lit = dark.copy();
        let _ = lit.narrow(2, 0, 4).narrow(3, 60, 4).fill_(1.0);
        let latent = |x: &Tensor| model.encode_latent(x).unwrap();
        let change =
            (latent(&lit) - latent(&dark)).square().sum_dim_intlist([1].as_slice(), false, Kind::Float);
        let place = change.flatten(0, 2).argmax(0, false).int64_value(&[]);
        let (row, column) = (place / 32, place % 32);
        assert!(row < 4 && column > 27, "row {row}, column {column}");
    }

    #[test]
    fn a_folder_gives_the_same_codes_again() {
        let dir = tempfile::tempdir().unwrap();
        let (x, model) = (pictures(), model(1));
        model.save(dir.path(), Dtype::Float32).unwrap();
        let loaded = Vqgan::load(dir.path(), Device::Cpu).unwrap();
        assert_eq!(loaded.config(), model.config());
        assert_eq!(loaded.encode(&x).unwrap(), model.encode(&x).unwrap());
        assert_eq!(model.hash(), None);
        let float_hash = loaded.hash().unwrap().to_owned();
        assert_eq!(float_hash.len(), 16);
        model.save(dir.path(), Dtype::Bfloat16).unwrap();
        let rounded = Vqgan::load(dir.path(), Device::Cpu).unwrap();
        assert_ne!(rounded.hash().unwrap(), float_hash);
        let gap = (rounded.encode_latent(&x).unwrap() - model.encode_latent(&x).unwrap()).abs().max();
        assert!(gap.double_value(&[]) < 0.05, "{gap}");
    }

    #[test]
    fn what_is_wrong_with_a_folder_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let message = || Vqgan::load(dir.path(), Device::Cpu).unwrap_err().to_string();
        assert!(message().contains("config.json: No such file"), "{}", message());
        model(1).save(dir.path(), Dtype::Float32).unwrap();
        let config = dir.path().join(CONFIG_FILE);
        let text = fs::read_to_string(&config).unwrap();
        fs::write(&config, text.replace("\"z_channels\": 16", "\"z_channels\": 8")).unwrap();
        assert!(message().contains("model.safetensors: `decoder.conv_in.weight` has shape"), "{}", message());
        fs::write(&config, text.replace("\"resolution\": 16", "\"resolution\": 19")).unwrap();
        assert!(message().contains("key `model.resolution`: 19, expected a multiple of 2"), "{}", message());
        fs::write(&config, text.replace("float32", "float16")).unwrap();
        assert!(message().contains("unknown variant `float16`"), "{}", message());
        fs::write(&config, text).unwrap();
        fs::remove_file(dir.path().join(WEIGHT_FILE)).unwrap();
        assert!(message().contains("model.safetensors: No such file"), "{}", message());
    }

    #[test]
    fn bad_codes_and_pictures_are_one_line() {
        let model = model(1);
        let codes = |codes: &[i64]| Tensor::from_slice(codes).view([1, -1]);
        let message = |c: &[i64], h, w| model.decode_codes(&codes(c), h, w).unwrap_err().to_string();
        assert_eq!(message(&[0, 32], 1, 2), "codes: 0 to 32, expected 0 to 31");
        assert_eq!(message(&[-1, 3], 1, 2), "codes: -1 to 3, expected 0 to 31");
        assert_eq!(message(&[0, 1], 2, 2), "codes: shape [1, 2], expected [batch, 4] (2x2)");
        let odd = Tensor::zeros([1, 3, 16, 17], (Kind::Float, Device::Cpu));
        assert_eq!(
            model.encode(&odd).unwrap_err().to_string(),
            "pictures: [1, 3, 16, 17], expected [batch, 3, height, width] with sides in multiples of 2"
        );
    }
}
