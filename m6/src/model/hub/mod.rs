//! Language models as they are published: folders of Hugging Face's layout with Qwen, Qwen2 or Qwen2-MoE.

mod config;
mod names;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use m6_data::tokenizer::Tokenizer;
use m6_runtime::{Params, TensorFile, first_problems};
use serde::Deserialize;
use tch::{Device, Kind, Tensor};

use super::{ModelConfig, Transformer, Vocab};
use crate::error::{Error, Result};
use config::{Described, describe};
use names::{Part, parts};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Text tokenizers, the first that is there counts.
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "qwen.tiktoken"];

/// A transformer that knows nothing but text.
pub struct LanguageModel {
    /// The weights by name.
    pub params: Params,
    /// The stack.
    pub transformer: Transformer,
    /// Text to ids and back; absent where the folder holds none.
    pub tokenizer: Option<Tokenizer>,
    parts: Vec<Part>,
}

/// Whether a folder holds a model of Hugging Face's layout, by its config.
pub fn is_published(dir: &Path) -> bool {
    let text = fs::read_to_string(dir.join(CONFIG)).unwrap_or_default();
    serde_json::from_str::<serde_json::Value>(&text).is_ok_and(|config| config.get("model_type").is_some())
}

/// What the config of a folder describes.
///
/// # Errors
/// When it cannot be read, or describes something that we do not compute.
pub fn read_config(dir: &Path) -> Result<Described> {
    let path = dir.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    let described = describe(&text).map_err(|problem| Error::file(&path, problem))?;
    described.model.validate().map_err(|problem| Error::file(&path, problem))?;
    Ok(described)
}

impl LanguageModel {
    /// Opens a folder, its weights as float32 on `device`. They are read by memory map, a tensor at a time.
    ///
    /// # Errors
    /// When the config describes something that we do not compute, or a file or tensor is missing, damaged, of another
    /// shape, or holds what is no number.
    pub fn load(dir: &Path, device: Device) -> Result<Self> {
        let described = read_config(dir)?;
        let params = Params::unfilled(device);
        let vocab = Vocab::language(described.vocab_size);
        let transformer = Transformer::new(&params, &described.model, vocab, 0);
        let parts = parts(described.family, &described.model);
        fill(&params, &parts, &Shards::open(dir)?)?;
        let tokenizer = TOKENIZERS.iter().map(|name| dir.join(name)).find(|path| path.is_file());
        let tokenizer = tokenizer.map(|path| Tokenizer::load(&path)).transpose()?;
        Ok(Self { params, transformer, tokenizer, parts })
    }

    /// The settings of the stack.
    pub fn config(&self) -> &ModelConfig {
        self.transformer.config()
    }

    /// What each tensor of the published layout holds of `ours`, which has our tensors by name: weights or their gradients.
    pub fn published(&self, ours: &BTreeMap<String, Tensor>) -> Vec<(String, Tensor)> {
        let part = |part: &Part| Some((part.theirs.clone(), part.of(ours.get(&part.ours)?)));
        self.parts.iter().filter_map(part).collect()
    }
}

/// The weight files of a folder.
struct Shards {
    dir: PathBuf,
    files: BTreeMap<String, TensorFile>,
    /// Which file holds a tensor.
    homes: BTreeMap<String, String>,
}

/// `model.safetensors.index.json`.
#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

impl Shards {
    /// # Errors
    /// When a file is missing or damaged, or two files hold the same tensor.
    fn open(dir: &Path) -> Result<Self> {
        let index = dir.join(INDEX);
        let names: Vec<String> = if index.is_file() {
            let text = fs::read_to_string(&index).map_err(|error| Error::file(&index, error))?;
            let Index { weight_map } =
                serde_json::from_str(&text).map_err(|error| Error::file(&index, error))?;
            let mut names: Vec<String> = weight_map.into_values().collect();
            names.sort();
            names.dedup();
            names
        } else {
            vec![WEIGHTS.to_owned()]
        };
        let mut files = BTreeMap::new();
        let mut homes = BTreeMap::new();
        for name in names {
            // An index must not lead out of its folder.
            if Path::new(&name).components().count() != 1 {
                return Err(Error::file(&index, format!("{name:?} is not the name of a file beside it")));
            }
            let file = TensorFile::open(&dir.join(&name))?;
            for tensor in file.shapes().into_keys() {
                if let Some(other) = homes.insert(tensor.clone(), name.clone()) {
                    return Err(Error::file(dir, format!("`{tensor}` is in both {other} and {name}")));
                }
            }
            files.insert(name, file);
        }
        Ok(Self { dir: dir.to_owned(), files, homes })
    }

    fn shapes(&self) -> BTreeMap<String, Vec<i64>> {
        self.files.values().flat_map(TensorFile::shapes).collect()
    }

    fn read(&self, name: &str) -> Result<Tensor> {
        let file = self.homes.get(name).and_then(|home| self.files.get(home));
        let file = file.ok_or_else(|| Error::file(&self.dir, format!("`{name}` is missing")))?;
        Ok(file.read(name)?)
    }
}

/// Names that files of these families hold beside the weights: frequencies that follow from the config, and the copy of
/// a table that is shared.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight"
}

/// Copies every tensor of `shards` to its place.
fn fill(params: &Params, parts: &[Part], shards: &Shards) -> Result<()> {
    let ours: BTreeMap<String, Tensor> =
        params.entries().into_iter().map(|(name, param)| (name, param.tensor)).collect();
    let targets: Vec<(&Part, Tensor)> =
        parts.iter().filter_map(|part| Some((part, part.of(ours.get(&part.ours)?)))).collect();
    let mut shapes = shards.shapes();
    let filled: BTreeSet<&str> = parts.iter().map(|part| part.ours.as_str()).collect();
    let unfilled = ours.keys().filter(|name| !filled.contains(name.as_str()));
    let mut problems: Vec<String> =
        unfilled.map(|name| format!("`{name}` has no counterpart in this layout")).collect();
    for (part, target) in &targets {
        match shapes.remove(&part.theirs) {
            None => problems.push(format!("`{}` is missing", part.theirs)),
            Some(shape) if shape != target.size() => problems.push(format!(
                "`{}` has shape {shape:?}, the config asks for {:?}",
                part.theirs,
                target.size()
            )),
            Some(_) => {}
        }
    }
    let unknown = shapes.keys().filter(|name| !is_derived(name));
    problems.extend(unknown.map(|name| format!("`{name}` is not part of this model")));
    if !problems.is_empty() {
        return Err(Error::file(&shards.dir, first_problems(&problems)));
    }
    let _guard = tch::no_grad_guard();
    for (part, mut target) in targets {
        let tensor = shards.read(&part.theirs)?.to_kind(Kind::Float);
        // A sum is no number where one of its parts is none, and takes no memory of the tensor's size.
        if !tensor.sum(Kind::Double).double_value(&[]).is_finite() {
            return Err(Error::file(&shards.dir, format!("`{}` holds what is no number", part.theirs)));
        }
        target.copy_(&tensor);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use m6_runtime::attention::{Layout, Span};
    use m6_runtime::fused::linear_cross_entropy;
    use m6_runtime::{read_tensors, write_tensors};

    use super::super::{Mode, Sequence};
    use super::*;

    /// `tests/parity/make.py` made these, with transformers.
    const MODELS: [&str; 8] = [
        "qwen2",
        "qwen2-tied",
        "qwen2-window",
        "qwen2-linear",
        "qwen2-dynamic",
        "qwen2-yarn",
        "qwen2-moe",
        "qwen2-moe-sparse",
    ];

    fn folder(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/parity").join(name)
    }

    fn golden(name: &str) -> BTreeMap<String, Tensor> {
        read_tensors(&folder(name).join("golden.safetensors")).unwrap().into_iter().collect()
    }

    /// `[n, d]` hidden rows and the routers' loss of one text.
    fn hidden(model: &LanguageModel, ids: &[i64]) -> (Tensor, Option<Tensor>) {
        let transformer = &model.transformer;
        let mut sequence = Sequence::new(transformer.vocab(), transformer.positions());
        sequence.begin();
        sequence.prefix_text(ids);
        let span = Span { prefix: 0, target: ids.len() as i64 };
        let layout = Layout::new(vec![span], Device::Cpu).unwrap();
        let tokens = sequence.to_device(Device::Cpu).unwrap();
        let hidden = transformer.forward(&tokens, None, &layout, span.target, Mode::Infer).unwrap();
        (hidden.x_nd, hidden.routers.map(|routers| routers.loss))
    }

    fn gap(a: &Tensor, b: &Tensor) -> f64 {
        (a - b).abs().max().double_value(&[])
    }

    #[test]
    fn logits_loss_and_every_gradient_are_transformers() {
        for name in MODELS {
            let model = LanguageModel::load(&folder(name), Device::Cpu).unwrap();
            let golden = golden(name);
            let ids = Vec::<i64>::try_from(&golden["ids"]).unwrap();
            let (x_nd, router_loss) = hidden(&model, &ids);
            let logits = model.transformer.text_logits(&x_nd);
            assert!(gap(&logits, &golden["logits"]) < 2e-5, "{name}: {}", gap(&logits, &golden["logits"]));

            let rows = x_nd.narrow(0, 0, ids.len() as i64 - 1);
            let labels = golden["ids"].narrow(0, 1, ids.len() as i64 - 1);
            let (mean, _) = linear_cross_entropy(&rows, &model.transformer.text_head(), &labels);
            let loss = router_loss.map_or(mean.shallow_clone(), |router| &mean + router);
            assert!(gap(&loss, &golden["loss"]) < 1e-5, "{name}: {loss:?} {:?}", golden["loss"]);

            loss.backward();
            let grads = model
                .params
                .trainable()
                .into_iter()
                .map(|(name, param)| (name, param.tensor.grad()))
                .collect();
            let grads = model.published(&grads);
            assert_eq!(grads.len(), golden.len() - 3, "{name}");
            for (tensor, grad) in grads {
                let exact = &golden[&format!("grad.{tensor}")];
                let scale = exact.norm().double_value(&[]).max(1e-3);
                let error = (&grad - exact).norm().double_value(&[]) / scale;
                assert!(error < 1e-4, "{name}: {tensor}: {error}");
            }
        }
    }

    /// Qwen's own layout: the weights of a Qwen2 model under its names.
    #[test]
    fn qwens_layout_holds_the_same_model() {
        let qwen2 = LanguageModel::load(&folder("qwen2"), Device::Cpu).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let config = ModelConfig { kv_heads: None, ..qwen2.config().clone() };
        let params = Params::new(Device::Cpu, 3);
        let vocab = qwen2.transformer.vocab();
        let transformer = Transformer::new(&params, &config, vocab, 0);
        let save = |family| {
            let model = LanguageModel {
                params: params.clone(),
                transformer: Transformer::new(&Params::unfilled(Device::Cpu), &config, vocab, 0),
                tokenizer: None,
                parts: parts(family, &config),
            };
            let ours = params.entries().into_iter().map(|(name, p)| (name, p.tensor.detach())).collect();
            write_tensors(&dir.path().join(WEIGHTS), &model.published(&ours)).unwrap();
        };
        save(config::Family::Qwen);
        let text = format!(
            r#"{{"model_type": "qwen", "vocab_size": {}, "hidden_size": {}, "intermediate_size": {},
                "num_hidden_layers": {}, "num_attention_heads": {}, "kv_channels": {}, "layer_norm_epsilon": 1e-6,
                "max_position_embeddings": 64, "seq_length": 64, "rotary_emb_base": 10000.0}}"#,
            vocab.text,
            config.width,
            2 * config.hidden,
            config.layers,
            config.heads,
            config.head_width()
        );
        fs::write(dir.path().join(CONFIG), text).unwrap();
        let read = LanguageModel::load(dir.path(), Device::Cpu).unwrap();
        let ids: Vec<i64> = (0..20).map(|i| (i * 7) % vocab.text).collect();
        let direct = LanguageModel { params, transformer, tokenizer: None, parts: Vec::new() };
        let logits = |model: &LanguageModel| model.transformer.text_logits(&hidden(model, &ids).0);
        assert_eq!(gap(&logits(&read), &logits(&direct)), 0.0);
        let w1 = read_tensors(&dir.path().join(WEIGHTS)).unwrap();
        let (_, w1) = w1.iter().find(|(name, _)| name == "transformer.h.0.mlp.w1.weight").unwrap();
        let up = read
            .params
            .entries()
            .into_iter()
            .find(|(name, _)| name == "blocks.0.mlp.gate_up.weight")
            .unwrap();
        assert_eq!(gap(&up.1.tensor.narrow(0, config.hidden, config.hidden), w1), 0.0);
    }

    /// A copy of a parity model whose tensors `change` may alter.
    fn altered(change: impl Fn(&mut Vec<(String, Tensor)>)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let source = folder("qwen2");
        fs::copy(source.join(CONFIG), dir.path().join(CONFIG)).unwrap();
        let mut tensors = read_tensors(&source.join(WEIGHTS)).unwrap();
        change(&mut tensors);
        write_tensors(&dir.path().join(WEIGHTS), &tensors).unwrap();
        LanguageModel::load(dir.path(), Device::Cpu).map(drop).unwrap_err().to_string()
    }

    #[test]
    fn what_does_not_fit_is_named_in_one_line() {
        let float = (Kind::Float, Device::Cpu);
        let messages = [
            (altered(|tensors| drop(tensors.pop())), "`model.norm.weight` is missing"),
            (
                altered(|tensors| tensors.push(("extra".into(), Tensor::ones([1], float)))),
                "`extra` is not part of this model",
            ),
            (
                altered(|tensors| tensors[0].1 = Tensor::ones([3, 4], float)),
                "`lm_head.weight` has shape [3, 4], the config asks for [32, 16]",
            ),
            (
                altered(|tensors| tensors[1].1 = &tensors[1].1 * f64::NAN),
                "`model.embed_tokens.weight` holds what is no number",
            ),
        ];
        for (message, expected) in messages {
            assert!(message.ends_with(expected) && message.lines().count() == 1, "{message}");
        }
    }

    #[test]
    fn shards_are_read_through_their_index() {
        let dir = tempfile::tempdir().unwrap();
        let source = folder("qwen2");
        fs::copy(source.join(CONFIG), dir.path().join(CONFIG)).unwrap();
        let tensors = read_tensors(&source.join(WEIGHTS)).unwrap();
        let (first, second) = tensors.split_at(tensors.len() / 2);
        write_tensors(&dir.path().join("a.safetensors"), first).unwrap();
        let index = |second: &str| {
            let home =
                |name: &str| if first.iter().any(|(n, _)| n == name) { "a.safetensors" } else { second };
            let map: BTreeMap<&str, &str> =
                tensors.iter().map(|(name, _)| (name.as_str(), home(name))).collect();
            fs::write(dir.path().join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
        };
        let message = || LanguageModel::load(dir.path(), Device::Cpu).map(drop).unwrap_err().to_string();
        index("b.safetensors");
        assert!(message().contains("b.safetensors"), "{}", message());
        write_tensors(&dir.path().join("b.safetensors"), second).unwrap();
        LanguageModel::load(dir.path(), Device::Cpu).unwrap();
        write_tensors(&dir.path().join("b.safetensors"), &tensors).unwrap();
        assert!(message().contains("is in both a.safetensors and b.safetensors"), "{}", message());
        index("../b.safetensors");
        assert!(message().contains("is not the name of a file beside it"), "{}", message());
    }
}
