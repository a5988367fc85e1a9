//! Weights of other projects, against what those compute with them: `weights/make.py` makes the golden files.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use m6_runtime::{Params, read_tensors, write_tensors};
use m6_vqgan::weights::{Imported, Layout, export, import};
use m6_vqgan::{Dtype, QuantizerKind, Vqgan, VqganConfig};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};
use tempfile::TempDir;
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipWriter};

const SIDE: i64 = 24;
const GRID: i64 = SIDE / 4;
/// Largest difference of a reconstruction's values, which lie between -1 and 1.
const TOLERANCE: f64 = 1e-4;
const CODEBOOK: &str = "quantize.embedding.weight";

type Named = Vec<(String, Tensor)>;

#[derive(Deserialize)]
struct Golden {
    /// Names and shapes, in the order of the state dict.
    tensors: Vec<(String, Vec<i64>)>,
    codes: Vec<i64>,
    reconstruction: Vec<f32>,
    config: Option<serde_json::Value>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/weights")
}

fn golden(case: &str) -> Golden {
    serde_json::from_slice(&fs::read(folder().join(format!("{case}.json"))).unwrap()).unwrap()
}

/// `noise` of `make.py`.
fn noise(name: &str, shape: &[i64]) -> Vec<f64> {
    let seed =
        name.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let number = |place: i64| {
        let mut x = (place as u32).wrapping_mul(0x9e37_79b9).wrapping_add(seed);
        x = (x ^ (x >> 16)).wrapping_mul(0x85eb_ca6b);
        x = (x ^ (x >> 13)).wrapping_mul(0xc2b2_ae35);
        f64::from(x ^ (x >> 16)) / 2f64.powi(31) - 1.0
    };
    (0..shape.iter().product()).map(number).collect()
}

/// `weight` of `make.py`.
fn weight(name: &str, shape: &[i64]) -> Tensor {
    let (scale, shift) = match shape {
        [_, inputs @ ..] if !inputs.is_empty() => ((3.0 / inputs.iter().product::<i64>() as f64).sqrt(), 0.0),
        _ if name.ends_with("weight") => (0.1, 1.0),
        _ => (0.1, 0.0),
    };
    let values: Vec<f32> =
        noise(name, shape).into_iter().map(|value| (value * scale + shift) as f32).collect();
    Tensor::from_slice(&values).reshape(shape)
}

/// `of_length_3` of `make.py`.
fn of_length_3(codes: &Tensor) -> Tensor {
    codes * 3.0 / codes.square().sum_dim_intlist([-1].as_slice(), true, Kind::Float).sqrt()
}

fn weights(golden: &Golden, change: impl Fn(&str, Tensor) -> Tensor) -> Named {
    let of = |(name, shape): &(String, Vec<i64>)| (name.clone(), change(name, weight(name, shape)));
    golden.tensors.iter().map(of).collect()
}

fn janus_codebook(name: &str, tensor: Tensor) -> Tensor {
    if name.ends_with(CODEBOOK) { of_length_3(&tensor) } else { tensor }
}

fn picture() -> Tensor {
    let values: Vec<f32> =
        noise("picture", &[1, 3, SIDE, SIDE]).into_iter().map(|value| value as f32).collect();
    Tensor::from_slice(&values).reshape([1, 3, SIDE, SIDE])
}

/// Codes of the picture and the reconstruction from them.
fn pass(model: &Path) -> (Tensor, Tensor) {
    let model = Vqgan::load(model, Device::Cpu).unwrap();
    let codes = model.encode(&picture()).unwrap();
    let reconstruction = model.decode_codes(&codes, GRID, GRID).unwrap();
    (codes, reconstruction)
}

fn largest(difference: Tensor) -> f64 {
    difference.abs().max().double_value(&[])
}

/// Imports `source` and holds what the model computes to `golden`.
fn check(source: &Path, out: &Path, golden: &Golden) -> Imported {
    let imported = import(source, out, SIDE, Dtype::Float32).unwrap();
    let (codes, reconstruction) = pass(out);
    assert_eq!(Vec::<i64>::try_from(codes.flatten(0, -1)).unwrap(), golden.codes);
    let expected = Tensor::from_slice(&golden.reconstruction).reshape_as(&reconstruction);
    let gap = largest(reconstruction - expected);
    assert!(gap < TOLERANCE, "{gap}");
    imported
}

/// Exports and imports again: the same config, weights, codes and pictures.
fn check_way_back(model: &Path, layout: Layout) {
    let dir = TempDir::new().unwrap();
    let (out, again) = (dir.path().join("out.safetensors"), dir.path().join("again"));
    export(model, layout, &out).unwrap();
    let imported = import(&out, &again, SIDE, Dtype::Float32).unwrap();
    assert_eq!(imported.layout, layout);
    let config = Vqgan::load(model, Device::Cpu).unwrap().config().clone();
    let read = |dir: &Path| read_tensors(&dir.join("model.safetensors")).unwrap();
    if imported.config == config {
        assert_eq!(read(model), read(&again));
    } else {
        assert_eq!(
            (config.quantizer, imported.config.quantizer),
            (QuantizerKind::Normalized, QuantizerKind::Nearest)
        );
        let rest =
            |dir: &Path| read(dir).into_iter().filter(|(name, _)| name != CODEBOOK).collect::<Vec<_>>();
        assert_eq!(rest(model), rest(&again));
    }
    let ((codes, reconstruction), (codes_again, again)) = (pass(model), pass(&again));
    assert_eq!(codes, codes_again);
    assert!(largest(reconstruction - again) < 1e-6);
}

/// A folder of diffusers, and out again; the config that is written is diffusers' own but for keys without effect.
#[test]
fn diffusers() {
    let dir = TempDir::new().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let golden = golden("diffusers");
    fs::create_dir(&source).unwrap();
    let weight_file = source.join("diffusion_pytorch_model.safetensors");
    write_tensors(&weight_file, &weights(&golden, |_, tensor| tensor)).unwrap();
    let config = golden.config.as_ref().unwrap().as_object().unwrap();
    fs::write(source.join("config.json"), serde_json::to_vec(config).unwrap()).unwrap();
    let imported = check(&source, &out, &golden);
    assert_eq!((imported.layout, imported.config.ch_mult), (Layout::Diffusers, vec![1, 1, 2]));
    assert_eq!(imported.config.attn_resolutions, [GRID]);
    for layout in [Layout::Taming, Layout::Diffusers] {
        check_way_back(&out, layout);
    }
    let again = dir.path().join("again");
    export(&out, Layout::Diffusers, &again).unwrap();
    let written: serde_json::Value =
        serde_json::from_slice(&fs::read(again.join("config.json")).unwrap()).unwrap();
    for (key, value) in written.as_object().unwrap() {
        if key != "_class_name" {
            assert_eq!(Some(value), config.get(key), "{key}");
        }
    }
    let message = export(&out, Layout::LlamaGen, &again).unwrap_err().to_string();
    assert!(message.ends_with("llamagen has no network with the quantiser `nearest`"), "{message}");

    fs::write(source.join("config.json"), r#"{"_class_name": "VQModel", "norm_type": "spatial"}"#).unwrap();
    let message = import(&source, &out, SIDE, Dtype::Float32).unwrap_err().to_string();
    assert!(message.ends_with(r#"`norm_type` is "spatial", expected "group""#), "{message}");
}

/// Janus as transformers has it, within the whole model, which is stored in parts.
#[test]
fn janus() {
    let dir = TempDir::new().unwrap();
    let (source, out) = (dir.path().join("source"), dir.path().join("out"));
    let golden = golden("janus");
    let mut tensors = weights(&golden, janus_codebook);
    tensors.push(("lm_head.weight".into(), Tensor::zeros([2, 2], (Kind::Float, Device::Cpu))));
    write_shards(&source, &tensors);
    let imported = check(&source, &out, &golden);
    assert_eq!((imported.layout, imported.config.quantizer), (Layout::Janus, QuantizerKind::Normalized));
    assert_eq!(imported.left_out, ["lm_head.weight"]);
    for layout in [Layout::LlamaGen, Layout::Taming, Layout::Diffusers] {
        check_way_back(&out, layout);
    }
}

/// Two files and their index.
fn write_shards(dir: &Path, tensors: &[(String, Tensor)]) {
    fs::create_dir(dir).unwrap();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let mut homes = serde_json::Map::new();
    for (file, tensors) in [("a.safetensors", first), ("b.safetensors", second)] {
        write_tensors(&dir.join(file), tensors).unwrap();
        homes.extend(tensors.iter().map(|(name, _)| (name.clone(), file.into())));
    }
    let index = serde_json::json!({ "weight_map": homes }).to_string();
    fs::write(dir.join("model.safetensors.index.json"), index).unwrap();
}

/// A checkpoint of LlamaGen's training: the pickle is one that torch wrote, with an optimizer and a namespace in it.
#[test]
fn llamagen() {
    let dir = TempDir::new().unwrap();
    let (file, out) = (dir.path().join("vq.pt"), dir.path().join("out"));
    let golden = golden("llamagen");
    let tensors = weights(&golden, janus_codebook);
    let mut zip = ZipWriter::new(File::create(&file).unwrap());
    let options = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    zip.start_file("llamagen/data.pkl", options).unwrap();
    zip.write_all(&fs::read(folder().join("llamagen.pkl")).unwrap()).unwrap();
    for (index, (_, tensor)) in tensors.iter().enumerate() {
        let values = Vec::<f32>::try_from(tensor.flatten(0, -1)).unwrap();
        zip.start_file(format!("llamagen/data/{index}"), options).unwrap();
        zip.write_all(&values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<_>>()).unwrap();
    }
    zip.finish().unwrap();
    let imported = check(&file, &out, &golden);
    assert_eq!((imported.layout, imported.config.quantizer), (Layout::LlamaGen, QuantizerKind::Normalized));
    assert_eq!(imported.left_out, ["quantize.codebook_used"]);

    let own = import(&out, &dir.path().join("small"), SIDE, Dtype::Bfloat16).unwrap();
    assert_eq!((own.layout, own.config), (Layout::Own, imported.config));
}

/// taming's names, as latent diffusion puts them.
#[test]
fn taming() {
    let dir = TempDir::new().unwrap();
    let (file, out) = (dir.path().join("model.safetensors"), dir.path().join("out"));
    let golden = golden("taming");
    let mut tensors = weights(&golden, |_, tensor| tensor);
    let others = ["first_stage_model.loss.logvar", "model.out.0.weight"];
    tensors.extend(others.map(|name| (name.to_owned(), weight(name, &[2]))));
    write_tensors(&file, &tensors).unwrap();
    let imported = check(&file, &out, &golden);
    assert_eq!((imported.layout, imported.config.quantizer), (Layout::Taming, QuantizerKind::Nearest));
    assert_eq!(imported.left_out, others);
    check_way_back(&out, Layout::Taming);
}

/// taming's Gumbel quantiser, which is known by its tensors.
#[test]
fn gumbel() {
    let dir = TempDir::new().unwrap();
    let (file, out) = (dir.path().join("model.safetensors"), dir.path().join("out"));
    let golden = golden("gumbel");
    write_tensors(&file, &weights(&golden, |_, tensor| tensor)).unwrap();
    let imported = check(&file, &out, &golden);
    assert_eq!((imported.layout, imported.config.quantizer), (Layout::Taming, QuantizerKind::Gumbel));
    check_way_back(&out, Layout::Taming);
    for layout in [Layout::Diffusers, Layout::LlamaGen] {
        let message = export(&out, layout, &dir.path().join("other")).unwrap_err().to_string();
        assert!(message.ends_with("has no network with the quantiser `gumbel`"), "{message}");
    }
}

/// SimVQ's table and layer become a codebook of the same codes.
#[test]
fn simvq_is_folded() {
    let dir = TempDir::new().unwrap();
    let (source, file, out) =
        (dir.path().join("source"), dir.path().join("out.safetensors"), dir.path().join("out"));
    let config = VqganConfig {
        resolution: SIDE,
        ch: 32,
        ch_mult: vec![1, 1, 2],
        num_res_blocks: 1,
        attn_resolutions: vec![],
        mid_attention: true,
        z_channels: 16,
        codebook_size: 64,
        code_dim: 4,
        quantizer: QuantizerKind::SimVq,
    };
    Vqgan::new(&Params::new(Device::Cpu, 1), &config).save(&source, Dtype::Float32).unwrap();
    export(&source, Layout::Taming, &file).unwrap();
    let imported = import(&file, &out, SIDE, Dtype::Float32).unwrap();
    assert_eq!(imported.config, VqganConfig { quantizer: QuantizerKind::Nearest, ..config });
    let ((codes, picture), (codes_again, again)) = (pass(&source), pass(&out));
    assert_eq!(codes, codes_again);
    assert!(largest(picture - again) < 1e-6);
    let message = export(&source, Layout::Janus, &file).unwrap_err().to_string();
    assert!(message.ends_with("has no network with the quantiser `simvq`"), "{message}");
}

#[test]
fn what_does_not_fit_is_named() {
    let dir = TempDir::new().unwrap();
    let (file, out) = (dir.path().join("model.safetensors"), dir.path().join("out"));
    let golden = golden("taming");
    let message = |change: &dyn Fn(&mut Named), side: i64| {
        let mut tensors = weights(&golden, |_, tensor| tensor);
        for (name, _) in &mut tensors {
            *name = name.replace("first_stage_model.", "");
        }
        change(&mut tensors);
        write_tensors(&file, &tensors).unwrap();
        let message = import(&file, &out, side, Dtype::Float32).unwrap_err().to_string();
        assert!(!out.exists());
        message.replace(&format!("{}: ", file.display()), "")
    };
    let set = |name: &'static str, shape: &'static [i64]| {
        move |tensors: &mut Named| {
            tensors.retain(|(found, _)| found != name);
            tensors.push((name.into(), weight(name, shape)));
        }
    };
    assert_eq!(
        message(
            &|tensors| {
                tensors.retain(|(name, _)| name != "post_quant_conv.bias");
                set("decoder.conv_in.weight", &[64, 16, 1, 1])(tensors);
                set("quantize.proj.weight", &[64, 4])(tensors);
                set("temporal.weight", &[2])(tensors);
            },
            SIDE
        ),
        "`decoder.conv_in.weight` has shape [64, 16, 1, 1], the model needs [64, 16, 3, 3]; `post_quant_conv.bias` is \
         missing, the model needs [16]; `quantize.proj.weight` of shape [64, 4] is not part of the model; and 1 more"
    );
    assert_eq!(
        message(&|tensors| tensors[0].1 = &tensors[0].1 * f64::NAN, SIDE),
        format!("`{}` holds NaN or infinity", golden.tensors[0].0.replace("first_stage_model.", ""))
    );
    assert_eq!(
        message(&|tensors| tensors[0].1 = tensors[0].1.to_kind(Kind::Int64), SIDE),
        format!(
            "`{}` is Int64, expected floating point",
            golden.tensors[0].0.replace("first_stage_model.", "")
        )
    );
    assert_eq!(message(&|_| (), 30), "`resolution` is 30, expected a multiple of 4 (`ch_mult` has 3 levels)");
    assert_eq!(
        message(&set("encoder.down.1.block.0.conv2.weight", &[48, 48, 3, 3]), SIDE),
        "level 1 has 48 channels, expected a multiple of the first 32"
    );
    assert_eq!(message(&set(CODEBOOK, &[64]), SIDE), "`quantize.embedding.weight` has shape [64]");
    assert!(
        message(&|tensors| tensors.retain(|(name, _)| !name.starts_with("decoder.")), SIDE)
            .starts_with("holds no `decoder`, as Chameleon's files")
    );
}

#[test]
fn files_that_are_none_are_named() {
    let dir = TempDir::new().unwrap();
    let message = |name: &str, bytes: &[u8]| {
        let file = dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        import(&file, &dir.path().join("out"), SIDE, Dtype::Float32).unwrap_err().to_string()
    };
    assert!(
        message("old.pt", b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.")
            .contains("old.pt: is a torch file of the old")
    );
    assert!(message("cut.pt", b"PK\x03\x04 and no more").contains("cut.pt: "));
    assert!(message("text.pt", b"nothing of that kind").contains("is not a whole safetensors file"));
    assert!(message("empty.pt", b"").contains("empty.pt: "));
    let message = import(dir.path(), dir.path(), SIDE, Dtype::Float32).unwrap_err().to_string();
    assert!(
        message.contains("holds none of diffusion_pytorch_model.safetensors, model.safetensors"),
        "{message}"
    );
}
