//! Tiny random models for the tests of this module.

use m6_data::picture::Rgb8;
use m6_data::tokenizer::train_bpe;
use m6_runtime::{FloatDtype, Params};
use m6_vision::PatchConfig;
use m6_vqgan::{Dtype, QuantizerKind, Vqgan, VqganConfig};
use tch::Device;

use crate::model::{CodeOrder, Model, ModelConfig, RotaryConfig, Transformer, Vocab, WindowConfig};

/// Side of the tiny models' pictures.
pub const SIDE: u32 = 16;
const SEED: u64 = 1;
const CODES: i64 = 8;
/// Fresh weights are so narrow that every output looks alike; wider ones make the tests see what differs.
const WIDER: f64 = 8.0;

/// A picture of noise.
pub fn picture(seed: u8) -> Rgb8 {
    let bytes = (0..SIDE * SIDE * 3).map(|i| (i as u8).wrapping_mul(37).wrapping_add(seed.wrapping_mul(91)));
    Rgb8 { width: SIDE, height: SIDE, pixels: bytes.collect() }
}

/// A transformer with a vocabulary of 12 texts and 8 codes.
pub fn tiny() -> (Params, Transformer) {
    tiny_of(&config())
}

/// The same with rotary positions, one key head for two query heads, and a window in each block.
pub fn tiny_rotary() -> (Params, Transformer) {
    tiny_of(&ModelConfig {
        heads: 4,
        kv_heads: Some(2),
        rotary: Some(RotaryConfig { logn: Some(3), ..RotaryConfig::new(1e4) }),
        window: Some(WindowConfig { last: Some(3), ..WindowConfig::new(5, 0) }),
        ..config()
    })
}

fn tiny_of(config: &ModelConfig) -> (Params, Transformer) {
    let params = Params::new(Device::Cpu, SEED);
    let transformer = Transformer::new(&params, config, Vocab { text: 12, codes: CODES }, 4);
    widen(&params);
    (params, transformer)
}

/// A whole model with byte-level tokens.
pub fn tiny_model() -> Model {
    tiny_model_in(FloatDtype::Fp32)
}

/// The same with its matrices held in `matrices`.
pub fn tiny_model_in(matrices: FloatDtype) -> Model {
    let tokenizer = train_bpe(["a red heart", "红心"].into_iter().map(str::to_owned), 256).unwrap();
    let vqgan = VqganConfig {
        resolution: i64::from(SIDE),
        ch: 32,
        ch_mult: vec![1, 1, 1],
        num_res_blocks: 1,
        attn_resolutions: Vec::new(),
        mid_attention: true,
        z_channels: 32,
        codebook_size: CODES,
        code_dim: 4,
        quantizer: QuantizerKind::Normalized,
    };
    // A model takes a tokenizer that has been saved, because it records the hash of its weights.
    let dir = tempfile::tempdir().unwrap();
    Vqgan::new(&Params::new(Device::Cpu, SEED), &vqgan).save(dir.path(), Dtype::Float32).unwrap();
    let vqgan = Vqgan::load(dir.path(), Device::Cpu).unwrap();
    let model =
        Model::new(&config(), tokenizer, vqgan, Params::new(Device::Cpu, SEED).with_matrices(matrices))
            .unwrap();
    widen(&model.params);
    model
}

fn config() -> ModelConfig {
    ModelConfig {
        any_order: true,
        code_order: CodeOrder::CoarseToFine,
        patches: Some(PatchConfig::convolutions(i64::from(SIDE), &[16, 16])),
        ..ModelConfig::new(32, 2, 2, 48, 16)
    }
}

fn widen(params: &Params) {
    let _guard = tch::no_grad_guard();
    for (name, mut param) in params.entries() {
        if !name.contains("norm") {
            let _ = param.tensor.g_mul_scalar_(WIDER);
        }
    }
}
