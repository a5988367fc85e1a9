//! Language models, in folders of our own and as they are published: Hugging Face's layout with Qwen, Qwen2 or Qwen2-MoE.

mod config;
mod names;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use m6_data::tokenizer::Tokenizer;
use m6_runtime::{FloatDtype, Params, TensorShards, first_problems, is_finite};
use m6_vqgan::Vqgan;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

use super::folder::same;
use super::{Extension, Model, ModelConfig, Transformer, Upcycling, Vocab, extend};
use crate::error::{Error, Result};
use config::{Described, Family, TokenIds, describe};
use names::{Part, parts};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Text tokenizers, the first that is there counts.
const TOKENIZERS: [&str; 2] = ["tokenizer.json", "qwen.tiktoken"];

/// Rows of the input table that a damaged or absurd config may ask for; far above any vocabulary.
const MAX_VOCAB: i64 = 1 << 24;

/// A transformer that knows nothing but text.
pub struct LanguageModel {
    /// The weights by name.
    pub params: Params,
    /// The stack.
    pub transformer: Transformer,
    /// Text to ids and back; absent where the folder holds none.
    pub tokenizer: Option<Tokenizer>,
    /// How the folder stores the weights: as float32 unless all are bf16.
    pub stored: FloatDtype,
    folder: PathBuf,
    described: Described,
    parts: Vec<Part>,
}

/// What `config.json` of a folder of our own holds.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct LanguageInfo {
    model: ModelConfig,
    vocab: Vocab,
    dtype: FloatDtype,
    /// Hash of the text tokenizer, where there is one.
    tokenizer: Option<String>,
    /// Under whose names it is published.
    family: Family,
    ids: TokenIds,
}

/// Whether a folder holds a model of Hugging Face's layout, by its config.
pub fn is_published(dir: &Path) -> bool {
    read_config(dir).is_ok_and(|config| config.get("model_type").is_some())
}

/// Whether a folder holds a model of this program that sees and draws pictures, by its config.
pub fn has_pictures(dir: &Path) -> bool {
    read_config(dir).is_ok_and(|config| config.get("vqgan").is_some())
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(|error| Error::file(&path, error))?;
    serde_json::from_str(&text).map_err(|error| Error::file(&path, error))
}

/// The stack and the vocabulary that a folder's config describes; `None` where it is not that of a language model.
///
/// # Errors
/// When it cannot be read, or describes something that we do not compute.
pub fn language_shape(dir: &Path) -> Result<Option<(ModelConfig, Vocab)>> {
    let (config, path) = (read_config(dir)?, dir.join(CONFIG));
    let fail = |problem: String| Error::file(&path, problem);
    let (model, vocab) = if config.get("model_type").is_some() {
        let described = describe(&config).map_err(fail)?;
        (described.model, Vocab::language(described.vocab_size))
    } else if config.get("family").is_some() {
        let info = read_own(config).map_err(fail)?;
        (info.model, info.vocab)
    } else {
        return Ok(None);
    };
    model.validate().map_err(fail)?;
    Ok(Some((model, vocab)))
}

impl LanguageModel {
    /// Opens a folder, its matrices in `matrices` on `device`, or as they are stored. Those that are published are read by
    /// memory map, a tensor at a time.
    ///
    /// # Errors
    /// When the config describes something that we do not compute, or a file or tensor is missing, damaged, of another
    /// shape, or, where it is published, holds what is no number.
    pub fn load(dir: &Path, device: Device, matrices: Option<FloatDtype>) -> Result<Self> {
        let (config, path) = (read_config(dir)?, dir.join(CONFIG));
        let tokenizer = TOKENIZERS.iter().map(|name| dir.join(name)).find(|path| path.is_file());
        let tokenizer = tokenizer.map(|path| Tokenizer::load(&path)).transpose()?;
        if config.get("model_type").is_some() {
            let described =
                describe(&config).and_then(checked).map_err(|problem| Error::file(&path, problem))?;
            let shards = weights(dir)?;
            let stored = stored(&shards)?;
            let params = Params::unfilled(device).with_matrices(matrices.unwrap_or(stored));
            let model = Self::unfilled(dir, described, tokenizer, stored, params);
            fill(dir, &shards, &model.params, &model.parts)?;
            return Ok(model);
        }
        let info = read_own(config).map_err(|problem| Error::file(&path, problem))?;
        if let (Some(tokenizer), Some(hash)) = (&tokenizer, &info.tokenizer) {
            same(dir, "text tokenizer", &tokenizer.hash()?, hash)?;
        }
        let LanguageInfo { model, vocab, dtype, family, ids, .. } = info;
        let described = checked(Described { family, model, vocab_size: vocab.text, ids });
        let described = described.map_err(|problem| Error::file(&path, problem))?;
        let params = Params::unfilled(device).with_matrices(matrices.unwrap_or(dtype));
        let model = Self::unfilled(dir, described, tokenizer, dtype, params);
        model.params.load(&dir.join(WEIGHTS), dtype.kind())?;
        Ok(model)
    }

    fn unfilled(
        dir: &Path,
        described: Described,
        tokenizer: Option<Tokenizer>,
        stored: FloatDtype,
        params: Params,
    ) -> Self {
        let vocab = Vocab::language(described.vocab_size);
        let transformer = Transformer::new(&params, &described.model, vocab, 0);
        let parts = parts(described.family, &described.model);
        Self { params, transformer, tokenizer, stored, folder: dir.to_owned(), described, parts }
    }

    /// The same with experts, to be published as Qwen2-MoE.
    ///
    /// # Errors
    /// When this is not the dense model that `upcycling` is for.
    pub fn upcycled(self, upcycling: &Upcycling) -> Result<Self> {
        upcycling.check(self.config())?;
        let (model, family) = (upcycling.model.clone(), Family::Qwen2);
        let params = Params::new(self.params.device(), upcycling.seed);
        let transformer = Transformer::new(&params, &model, self.transformer.vocab(), 0);
        upcycling.fill(&self.params, &params);
        let parts = parts(family, &model);
        Ok(Self {
            params,
            transformer,
            parts,
            described: Described { family, model, ..self.described },
            ..self
        })
    }

    fn info(&self, dtype: FloatDtype) -> Result<LanguageInfo> {
        Ok(LanguageInfo {
            model: self.config().clone(),
            vocab: self.transformer.vocab(),
            dtype,
            tokenizer: self.tokenizer.as_ref().map(Tokenizer::hash).transpose()?,
            family: self.described.family,
            ids: self.described.ids.clone(),
        })
    }

    /// The same with all that a run needs to begin from it and learn pictures.
    ///
    /// # Errors
    /// When this is not the model that `extension` is for, has no text tokenizer or one with more ids than the table
    /// has rows, or the image tokenizer cannot be read.
    pub fn extended(self, extension: &Extension) -> Result<Model> {
        extension.check(self.config())?;
        let fail = |problem: String| Error::file(&self.folder, problem);
        let (device, rows) = (self.params.device(), self.transformer.vocab().text);
        let tokenizer =
            self.tokenizer.ok_or_else(|| fail(format!("holds none of {}", TOKENIZERS.join(", "))))?;
        let ids = tokenizer.vocab_size() as i64;
        if ids > rows {
            return Err(fail(format!(
                "its tokenizer has {ids} ids: expected at most {rows}, the rows of its table"
            )));
        }
        let vqgan = Vqgan::load(&extension.vqgan, device)?;
        let mut model = Model::new(&extension.model, tokenizer, vqgan, Params::new(device, extension.seed))?;
        model.info.dtype = self.stored;
        if let Some(file) = &extension.extractor {
            model.load_extractor(file)?;
        }
        extend::fill(&self.params, &model.params, model.info.vocab);
        Ok(model)
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

/// A model that can be built.
fn checked(described: Described) -> std::result::Result<Described, String> {
    let rows = described.vocab_size;
    if !(1..=MAX_VOCAB).contains(&rows) {
        return Err(format!("vocabulary of {rows}: expected 1 to {MAX_VOCAB} ids"));
    }
    described.model.validate()?;
    Ok(described)
}

fn read_own(config: Value) -> std::result::Result<LanguageInfo, String> {
    // The pictures of a model with codes are read by `Model`.
    if config.get("vqgan").is_some() {
        return Err("is of a model with pictures; expected a language model".to_owned());
    }
    if config.get("family").is_none() {
        return Err("has neither model_type, as Hugging Face has it, nor family; expected a language model"
            .to_owned());
    }
    let info = LanguageInfo::deserialize(config).map_err(|error| error.to_string())?;
    if info.model.share_layers {
        return Err("model.share_layers = true: expected false in a language model".to_owned());
    }
    let codes = info.vocab.codes;
    if codes == 0 { Ok(info) } else { Err(format!("vocab.codes = {codes}: expected 0 in a language model")) }
}

/// The weight files of a folder.
fn weights(dir: &Path) -> Result<TensorShards> {
    let index = dir.join(INDEX);
    let path = if index.is_file() { index } else { dir.join(WEIGHTS) };
    Ok(TensorShards::open(&path)?)
}

/// Names that files of these families hold beside the weights: frequencies that follow from the config, and the copy of
/// a table that is shared.
fn is_derived(name: &str) -> bool {
    name.ends_with(".rotary_emb.inv_freq") || name == "lm_head.weight"
}

/// How the weights are stored: as float32 unless all are bf16.
fn stored(shards: &TensorShards) -> Result<FloatDtype> {
    for name in shards.shapes().keys().filter(|name| !is_derived(name)) {
        if shards.file_of(name)?.kind(name)? != Kind::BFloat16 {
            return Ok(FloatDtype::Fp32);
        }
    }
    Ok(FloatDtype::Bf16)
}

/// Copies every tensor of the folder's files to its place.
fn fill(dir: &Path, shards: &TensorShards, params: &Params, parts: &[Part]) -> Result<()> {
    let ours = params.tensors();
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
        return Err(Error::file(dir, first_problems(&problems)));
    }
    for (part, target) in targets {
        shards.file_of(&part.theirs)?.copy_to(&part.theirs, &target)?;
        if !is_finite(&target) {
            return Err(Error::file(dir, format!("`{}` holds what is no number", part.theirs)));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use m6_runtime::attention::{Layout, Span};
    use m6_runtime::fused::linear_cross_entropy;
    use m6_runtime::{read_tensors, write_tensors};

    use super::super::difference::difference;
    use super::super::{Mode, Sequence};
    use super::*;

    /// `tests/parity/make.py` made these, with transformers, and that of Qwen's own layout with a forward pass of its own.
    const MODELS: [&str; 12] = [
        "qwen",
        "qwen2",
        "qwen2-heads",
        "qwen2-tied",
        "qwen2-window",
        "qwen2-linear",
        "qwen2-dynamic",
        "qwen2-yarn",
        "qwen2-moe",
        "qwen2-moe-dense-layer",
        "qwen2-moe-sparse",
        "qwen2-moe-window",
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

    /// What is stored in bf16 is scored alike whether matrices are held in bf16 or float32, and so are gradients but for their
    /// last bits.
    #[test]
    fn matrices_held_in_bf16_compute_what_they_do_in_float32() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["qwen", "qwen2", "qwen2-moe"] {
            let source = LanguageModel::load(&folder(name), Device::Cpu, None).unwrap();
            let half = dir.path().join(name);
            source.publish(&half, FloatDtype::Bf16).unwrap();
            let ids = Vec::<i64>::try_from(&golden(name)["ids"]).unwrap();
            let run = |matrices: FloatDtype| {
                let model = LanguageModel::load(&half, Device::Cpu, Some(matrices)).unwrap();
                let (x_nd, router_loss) = hidden(&model, &ids);
                let labels = Tensor::from_slice(&ids).roll([-1], [0]);
                let (mean, _) = linear_cross_entropy(&x_nd, &model.transformer.text_head(), &labels);
                router_loss.map_or(mean.shallow_clone(), |router| &mean + router).backward();
                let trained = model.params.trainable().into_iter();
                (model.transformer.text_logits(&x_nd), trained.map(|(_, p)| p.tensor).collect::<Vec<_>>())
            };
            let ((logits, wide), (same_logits, narrow)) = (run(FloatDtype::Fp32), run(FloatDtype::Bf16));
            assert_eq!(logits, same_logits, "{name}");
            for (wide, narrow) in wide.iter().zip(&narrow) {
                assert_eq!(narrow.kind() == Kind::BFloat16, narrow.dim() > 1, "{name}");
                let gap = (wide.grad() - narrow.grad().to_kind(Kind::Float)).norm() / wide.grad().norm();
                assert!(gap.double_value(&[]) < 4e-3, "{name}: {gap:?}");
            }
        }
    }

    #[test]
    fn logits_loss_and_every_gradient_are_those_of_other_implementations() {
        for name in MODELS {
            let model = LanguageModel::load(&folder(name), Device::Cpu, None).unwrap();
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

    /// A copy of a parity model whose tensors `change` may alter.
    fn altered(change: impl Fn(&mut Vec<(String, Tensor)>)) -> String {
        let dir = tempfile::tempdir().unwrap();
        let source = folder("qwen2");
        fs::copy(source.join(CONFIG), dir.path().join(CONFIG)).unwrap();
        let mut tensors = read_tensors(&source.join(WEIGHTS)).unwrap();
        change(&mut tensors);
        write_tensors(&dir.path().join(WEIGHTS), &tensors).unwrap();
        LanguageModel::load(dir.path(), Device::Cpu, None).map(drop).unwrap_err().to_string()
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
        let message =
            || LanguageModel::load(dir.path(), Device::Cpu, None).map(drop).unwrap_err().to_string();
        index("b.safetensors");
        assert!(message().contains("b.safetensors"), "{}", message());
        write_tensors(&dir.path().join("b.safetensors"), second).unwrap();
        LanguageModel::load(dir.path(), Device::Cpu, None).unwrap();
        write_tensors(&dir.path().join("b.safetensors"), &tensors).unwrap();
        assert!(message().contains("is in both a.safetensors and b.safetensors"), "{}", message());
        index("../b.safetensors");
        assert!(message().contains("is not the name of a file beside it"), "{}", message());
    }

    fn tensors(dir: &Path) -> BTreeMap<String, Tensor> {
        read_tensors(&dir.join(WEIGHTS)).unwrap().into_iter().collect()
    }

    #[test]
    fn published_to_ours_to_published_changes_nothing() {
        for name in MODELS {
            let dir = tempfile::tempdir().unwrap();
            let (own, back) = (dir.path().join("own"), dir.path().join("back"));
            let source = LanguageModel::load(&folder(name), Device::Cpu, None).unwrap();
            source.save(&own, source.stored).unwrap();
            let ours = LanguageModel::load(&own, Device::Cpu, None).unwrap();
            assert!(!is_published(&own) && ours.config() == source.config(), "{name}");
            ours.publish(&back, ours.stored).unwrap();
            assert!(is_published(&back), "{name}");
            let read = LanguageModel::load(&back, Device::Cpu, None).unwrap();
            // The width of heads is written even where it was left to the others.
            assert_eq!(difference(source.config(), read.config()), None, "{name}");
            assert_eq!(tensors(&back), tensors(&folder(name)), "{name}");
        }
    }

    #[test]
    fn bf16_stays_bf16() {
        let dir = tempfile::tempdir().unwrap();
        let (half, own, back) = (dir.path().join("half"), dir.path().join("own"), dir.path().join("back"));
        let load = |dir: &Path| LanguageModel::load(dir, Device::Cpu, None).unwrap();
        load(&folder("qwen2")).publish(&half, FloatDtype::Bf16).unwrap();
        // Frequencies that older files hold in float32 follow from the config, and say nothing of the weights.
        let mut with_derived: Vec<_> = tensors(&half).into_iter().collect();
        let frequencies = Tensor::ones([4], (Kind::Float, Device::Cpu));
        with_derived.push(("model.layers.0.self_attn.rotary_emb.inv_freq".to_owned(), frequencies));
        write_tensors(&half.join(WEIGHTS), &with_derived).unwrap();
        assert_eq!(load(&half).stored, FloatDtype::Bf16);
        load(&folder("qwen2")).publish(&half, FloatDtype::Bf16).unwrap();
        load(&half).save(&own, load(&half).stored).unwrap();
        load(&own).publish(&back, load(&own).stored).unwrap();
        assert!(tensors(&half).values().all(|tensor| tensor.kind() == Kind::BFloat16));
        assert_eq!(tensors(&half), tensors(&back));
    }

    #[test]
    fn many_files_hold_the_same_and_leave_nothing_out() {
        let dir = tempfile::tempdir().unwrap();
        let (source, most) = (folder("qwen2-moe"), 4096);
        LanguageModel::load(&source, Device::Cpu, None)
            .unwrap()
            .publish_in_shards(dir.path(), FloatDtype::Fp32, most)
            .unwrap();
        let index = fs::read_to_string(dir.path().join(INDEX)).unwrap();
        let index: Value = serde_json::from_str(&index).unwrap();
        let homes: BTreeSet<&str> =
            index["weight_map"].as_object().unwrap().values().filter_map(Value::as_str).collect();
        assert!(homes.len() > 2 && !dir.path().join(WEIGHTS).exists());
        let mut all = BTreeMap::new();
        for home in &homes {
            assert!(home.ends_with(&format!("-of-{:05}.safetensors", homes.len())), "{home}");
            let held = read_tensors(&dir.path().join(home)).unwrap();
            let bytes: usize = held.iter().map(|(_, tensor)| tensor.numel() * size_of::<f32>()).sum();
            assert!(bytes <= most, "{home}: {bytes}");
            all.extend(held);
        }
        assert_eq!(all, tensors(&source));
        let bytes: usize = all.values().map(|tensor| tensor.numel() * size_of::<f32>()).sum();
        assert_eq!(index["metadata"]["total_size"], bytes);
        LanguageModel::load(dir.path(), Device::Cpu, None).unwrap();
        let cut = dir.path().join(homes.first().unwrap());
        fs::write(&cut, &fs::read(&cut).unwrap()[..100]).unwrap();
        let message = LanguageModel::load(dir.path(), Device::Cpu, None).map(drop).unwrap_err().to_string();
        assert!(message.contains("is not a whole safetensors file"), "{message}");
        fs::remove_file(&cut).unwrap();
        let message = LanguageModel::load(dir.path(), Device::Cpu, None).map(drop).unwrap_err().to_string();
        assert!(message.contains("No such file"), "{message}");
    }

    #[test]
    fn files_of_text_and_generation_come_along() {
        let dir = tempfile::tempdir().unwrap();
        let (source, own) = (dir.path().join("source"), dir.path().join("own"));
        LanguageModel::load(&folder("qwen2"), Device::Cpu, None)
            .unwrap()
            .publish(&source, FloatDtype::Fp32)
            .unwrap();
        for name in ["merges.txt", "generation_config.json"] {
            fs::write(source.join(name), name).unwrap();
        }
        fs::write(source.join("notes.txt"), "").unwrap();
        LanguageModel::load(&source, Device::Cpu, None).unwrap().save(&own, FloatDtype::Fp32).unwrap();
        assert_eq!(fs::read_to_string(own.join("merges.txt")).unwrap(), "merges.txt");
        assert!(own.join("generation_config.json").is_file() && !own.join("notes.txt").exists());
    }

    #[test]
    fn configs_of_other_models_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let message = |config: &str| {
            fs::write(dir.path().join(CONFIG), config).unwrap();
            LanguageModel::load(dir.path(), Device::Cpu, None).map(drop).unwrap_err().to_string()
        };
        assert!(
            message(r#"{"vqgan": "0"}"#).ends_with("is of a model with pictures; expected a language model")
        );
        assert!(message("{}").contains("has neither model_type, as Hugging Face has it, nor family"));
        let published = fs::read_to_string(folder("qwen2").join(CONFIG)).unwrap();
        let absurd = published.replace("\"vocab_size\": 32", "\"vocab_size\": -1");
        assert!(message(&absurd).ends_with("vocabulary of -1: expected 1 to 16777216 ids"));
        let odd = published.replace("\"num_key_value_heads\": 2", "\"num_key_value_heads\": 3");
        assert!(
            message(&odd).ends_with("kv_heads = 3: expected a divisor of heads = 4"),
            "{}",
            message(&odd)
        );
    }
}
