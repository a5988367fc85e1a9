//! The parameter registry: every weight by its name in the state dict.
//!
//! It takes the place of `tch::nn::VarStore`, whose `load` changes dtypes, broadcasts shapes and ignores
//! unknown tensors. Here a name is used once, initial values depend on the seed and the name alone (a new layer
//! does not change the others), and a file must hold exactly the tensors of the model.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt::Display;
use std::path::Path as FilePath;
use std::rc::Rc;

use tch::{Device, Kind, Tensor};

use crate::dtype::FloatDtype;
use crate::error::{Result, RuntimeError};
use crate::ffi;
use crate::weights::{TensorFile, is_finite, write_tensors_as};

/// How a parameter starts. Drawn on the CPU from a generator seeded by the registry's seed and the name.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Init {
    /// All zero.
    Zeros,
    /// All one.
    Ones,
    /// Normal with mean 0 and this standard deviation.
    Normal(f64),
    /// Uniform in `[-bound, bound]`.
    Uniform(f64),
}

/// What the optimizer does with a parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Trained with weight decay: convolution kernels and output heads.
    Decay,
    /// Trained with weight decay, and by Muon where that is chosen: matrices between hidden layers, `[out, in]` or
    /// `[experts, out, in]`.
    Hidden,
    /// Trained without weight decay: biases, norms, embeddings.
    NoDecay,
    /// Saved and loaded, never trained: counters and running statistics.
    Buffer,
}

/// One entry of the registry. `tensor` shares storage with the layer that registered it.
#[derive(Debug)]
pub struct Param {
    /// The tensor on the registry's device; float32, unless it is one of [`Params::with_matrices`].
    pub tensor: Tensor,
    /// Its decay group.
    pub group: Group,
}

#[derive(Debug)]
struct Registry {
    device: Device,
    /// None where the values come from a file.
    seed: Option<u64>,
    matrices: FloatDtype,
    entries: BTreeMap<String, Param>,
}

/// A cursor into the registry; cheap to clone. `path / "h" / 3` is the scope `h.3`.
#[derive(Debug, Clone)]
pub struct Params {
    registry: Rc<RefCell<Registry>>,
    prefix: String,
}

impl<T: Display> std::ops::Div<T> for &Params {
    type Output = Params;

    fn div(self, name: T) -> Params {
        Params { registry: self.registry.clone(), prefix: join(&self.prefix, &name.to_string()) }
    }
}

impl<T: Display> std::ops::Div<T> for Params {
    type Output = Params;

    fn div(self, name: T) -> Params {
        &self / name
    }
}

fn join(prefix: &str, name: &str) -> String {
    if prefix.is_empty() { name.to_string() } else { format!("{prefix}.{name}") }
}

/// The seed of a named stream: the first eight bytes of BLAKE3 over the seed and the name.
pub fn named_seed(seed: u64, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&seed.to_le_bytes());
    hasher.update(name.as_bytes());
    let mut bytes = [0; 8];
    hasher.finalize_xof().fill(&mut bytes);
    u64::from_le_bytes(bytes)
}

impl Params {
    /// An empty registry whose parameters live on `device` and start from `seed`.
    pub fn new(device: Device, seed: u64) -> Self {
        Self::empty(device, Some(seed))
    }

    /// An empty registry whose parameters hold nothing in particular until they are loaded, which saves drawing them.
    pub fn unfilled(device: Device) -> Self {
        Self::empty(device, None)
    }

    fn empty(device: Device, seed: Option<u64>) -> Self {
        let registry = Registry { device, seed, matrices: FloatDtype::Fp32, entries: BTreeMap::new() };
        Self { registry: Rc::new(RefCell::new(registry)), prefix: String::new() }
    }

    /// The same where what is trained and has more than one axis is kept in `dtype` alone: tables, matrices, kernels of
    /// convolutions. Vectors, which take no memory beside them, and what is not trained stay float32.
    ///
    /// # Panics
    /// When something is registered already.
    #[must_use]
    pub fn with_matrices(self, dtype: FloatDtype) -> Self {
        {
            let mut registry = self.registry.borrow_mut();
            assert!(registry.entries.is_empty(), "parameters are registered already, in another dtype");
            registry.matrices = dtype;
        }
        self
    }

    /// The device that the parameters live on.
    pub fn device(&self) -> Device {
        self.registry.borrow().device
    }

    /// Registers a parameter and returns it.
    ///
    /// # Panics
    /// When the name is taken: two layers of one model claim the same weight.
    pub fn add(&self, name: &str, shape: &[i64], init: Init, group: Group) -> Tensor {
        let name = join(&self.prefix, name);
        let mut registry = self.registry.borrow_mut();
        let device = registry.device;
        let is_matrix = group != Group::Buffer && shape.len() > 1;
        let kind = if is_matrix { registry.matrices.kind() } else { Kind::Float };
        let tensor = match registry.seed {
            Some(seed) => initial(&name, shape, init, seed).to_kind(kind).to_device(device),
            None => Tensor::empty(shape, (kind, device)),
        };
        let tensor = tensor.set_requires_grad(group != Group::Buffer);
        let shared = tensor.shallow_clone();
        let taken = registry.entries.insert(name.clone(), Param { tensor, group });
        assert!(taken.is_none(), "the parameter name `{name}` is used twice");
        shared
    }

    /// The parameters under this cursor by full name, in the order of their names.
    pub fn entries(&self) -> Vec<(String, Param)> {
        let registry = self.registry.borrow();
        let inside = |name: &str| {
            self.prefix.is_empty()
                || name.strip_prefix(&self.prefix).is_some_and(|rest| rest.starts_with('.'))
        };
        let entries = registry.entries.iter().filter(|(name, _)| inside(name));
        entries
            .map(|(name, p)| (name.clone(), Param { tensor: p.tensor.shallow_clone(), group: p.group }))
            .collect()
    }

    /// The tensors under this cursor by full name, without gradients.
    pub fn tensors(&self) -> BTreeMap<String, Tensor> {
        self.entries().into_iter().map(|(name, p)| (name, p.tensor.detach())).collect()
    }

    /// The parameters under this cursor that are trained, in the order of their names.
    pub fn trainable(&self) -> Vec<(String, Param)> {
        self.entries().into_iter().filter(|(_, p)| p.group != Group::Buffer).collect()
    }

    /// Number of trained values under this cursor.
    pub fn count(&self) -> usize {
        self.trainable().iter().map(|(_, p)| p.tensor.numel()).sum()
    }

    /// Turns gradients on or off for everything trained under this cursor.
    pub fn set_trainable(&self, on: bool) {
        for (_, param) in self.trainable() {
            let _ = param.tensor.set_requires_grad(on);
        }
    }

    /// Writes everything under this cursor as safetensors, floats stored as `kind`.
    /// The file appears by rename; names are relative to the cursor.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &FilePath, kind: Kind) -> Result<()> {
        let tensors: Vec<(String, Tensor)> =
            self.entries().into_iter().map(|(name, p)| (self.relative(&name), p.tensor)).collect();
        write_tensors_as(path, &tensors, kind)
    }

    /// Reads everything under this cursor from a safetensors file, strictly: the same names, the same shapes,
    /// and every tensor stored as `stored`. Parameters keep their own dtype and device.
    ///
    /// # Errors
    /// When the file cannot be read or differs: the first three differences are named and nothing is changed. When a tensor
    /// holds what is no number.
    pub fn load(&self, path: &FilePath, stored: Kind) -> Result<()> {
        let file = TensorFile::open(path)?;
        let mut shapes = file.shapes();
        let mut problems = Vec::new();
        let mut pairs = Vec::new();
        for (name, param) in self.entries() {
            let name = self.relative(&name);
            match shapes.remove(&name) {
                None => problems.push(format!("`{name}` is missing")),
                Some(shape) if shape != param.tensor.size() => problems
                    .push(format!("`{name}` has shape {shape:?}, the model needs {:?}", param.tensor.size())),
                Some(_) => match file.kind(&name)? {
                    kind if kind == stored => pairs.push((param.tensor, name)),
                    kind => problems.push(format!("`{name}` is {kind:?}, expected {stored:?}")),
                },
            }
        }
        problems.extend(shapes.keys().map(|name| format!("`{name}` is not part of the model")));
        if !problems.is_empty() {
            return Err(RuntimeError::Mismatch {
                path: path.to_path_buf(),
                problem: first_problems(&problems),
            });
        }
        pairs.iter().try_for_each(|(target, name)| {
            file.copy_to(name, target)?;
            if is_finite(target) {
                return Ok(());
            }
            Err(RuntimeError::file(path, format!("`{name}` holds what is no number")))
        })
    }

    /// The name of a parameter under this cursor, without what all of them begin with.
    ///
    /// # Panics
    /// `name` does not begin so.
    pub fn relative(&self, name: &str) -> String {
        if self.prefix.is_empty() { name.to_string() } else { name[self.prefix.len() + 1..].to_string() }
    }
}

const NAMED_PROBLEMS: usize = 3;

/// The first three of `problems` in one line, and how many more there are.
pub fn first_problems(problems: &[String]) -> String {
    let mut text = problems[..problems.len().min(NAMED_PROBLEMS)].join("; ");
    if problems.len() > NAMED_PROBLEMS {
        text += &format!("; and {} more", problems.len() - NAMED_PROBLEMS);
    }
    text
}

fn initial(name: &str, shape: &[i64], init: Init, seed: u64) -> Tensor {
    let options = (Kind::Float, Device::Cpu);
    let stream = named_seed(seed, name);
    match init {
        Init::Zeros => Tensor::zeros(shape, options),
        Init::Ones => Tensor::ones(shape, options),
        Init::Normal(std) => {
            let tensor = Tensor::empty(shape, options);
            // SAFETY: the pointer is a live tensor; the shim only fills it.
            ffi::check(unsafe { ffi::m6_init_normal(tensor.as_ptr(), std, stream) })
                .expect("a float tensor takes normal values");
            tensor
        }
        Init::Uniform(bound) => {
            let tensor = Tensor::empty(shape, options);
            // SAFETY: the pointer is a live tensor; the shim only fills it.
            ffi::check(unsafe { ffi::m6_init_uniform(tensor.as_ptr(), bound, stream) })
                .expect("a float tensor takes uniform values");
            tensor
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(seed: u64) -> Params {
        let params = Params::new(Device::Cpu, seed);
        let layer = &params / "h" / 0;
        let _ = layer.add("weight", &[3, 4], Init::Normal(0.02), Group::Decay);
        let _ = layer.add("bias", &[3], Init::Zeros, Group::NoDecay);
        params
    }

    #[test]
    fn initial_values_depend_on_seed_and_name_alone() {
        let plain = sample(1);
        let grown = Params::new(Device::Cpu, 1);
        let _ = (&grown / "a_new_layer").add("weight", &[8], Init::Normal(1.0), Group::Decay);
        let _ = (&grown / "h" / 0).add("weight", &[3, 4], Init::Normal(0.02), Group::Decay);
        let value = |p: &Params| p.entries().into_iter().find(|(n, _)| n == "h.0.weight").unwrap().1.tensor;
        assert_eq!(value(&plain), value(&grown));
        assert_ne!(value(&plain), value(&sample(2)));
    }

    #[test]
    #[should_panic(expected = "used twice")]
    fn a_name_is_used_once() {
        let params = sample(1);
        let _ = (&params / "h" / 0).add("bias", &[3], Init::Zeros, Group::NoDecay);
    }

    #[test]
    fn matrices_in_bf16_are_those_of_float32_rounded_and_nothing_else_is() {
        let made = |dtype| {
            let params = Params::new(Device::Cpu, 3).with_matrices(dtype);
            let shapes: [(_, &[i64], _); 4] = [
                ("w", &[4, 3], Group::Hidden),
                ("table", &[5, 2], Group::NoDecay),
                ("bias", &[4], Group::NoDecay),
                ("counts", &[4, 3], Group::Buffer),
            ];
            shapes.map(|(name, shape, group)| params.add(name, shape, Init::Normal(1.0), group))
        };
        let (narrow, wide) = (made(FloatDtype::Bf16), made(FloatDtype::Fp32));
        let bf16 = Kind::BFloat16;
        assert_eq!(narrow.each_ref().map(Tensor::kind), [bf16, bf16, Kind::Float, Kind::Float]);
        for (narrow, wide) in narrow.iter().zip(wide) {
            assert_eq!(*narrow, wide.to_kind(narrow.kind()));
        }
    }

    #[test]
    fn save_and_load_give_the_same_values_and_bf16_is_explicit() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let params = sample(1);
        params.save(&file, Kind::Float).unwrap();
        let other = sample(2);
        other.load(&file, Kind::Float).unwrap();
        for ((_, a), (_, b)) in params.entries().iter().zip(other.entries()) {
            assert_eq!(a.tensor, b.tensor);
        }
        params.save(&file, Kind::BFloat16).unwrap();
        let refused = sample(2).load(&file, Kind::Float).unwrap_err().to_string();
        assert!(refused.contains("`h.0.bias` is BFloat16, expected Float"), "{refused}");
        other.load(&file, Kind::BFloat16).unwrap();
        assert_eq!(other.entries()[0].1.tensor.kind(), Kind::Float);
    }

    #[test]
    fn load_names_what_differs_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let broadcastable = Params::new(Device::Cpu, 1);
        let layer = &broadcastable / "h" / 0;
        let _ = layer.add("weight", &[1], Init::Ones, Group::Decay);
        let _ = layer.add("stray", &[1], Init::Ones, Group::Decay);
        broadcastable.save(&file, Kind::Float).unwrap();
        let params = sample(1);
        let before = params.entries()[1].1.tensor.copy();
        let message = params.load(&file, Kind::Float).unwrap_err().to_string();
        assert!(message.contains("`h.0.bias` is missing"), "{message}");
        assert!(message.contains("`h.0.weight` has shape [1], the model needs [3, 4]"), "{message}");
        assert!(message.contains("`h.0.stray` is not part of the model"), "{message}");
        assert_eq!(before, params.entries()[1].1.tensor);
    }

    #[test]
    fn what_is_no_number_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("model.safetensors");
        let params = sample(1);
        let weight = params.tensors().remove("h.0.weight").unwrap();
        let _ = weight.get(1).fill_(f64::NAN);
        params.save(&file, Kind::Float).unwrap();
        let message = sample(2).load(&file, Kind::Float).unwrap_err().to_string();
        assert!(message.contains("model.safetensors: `h.0.weight` holds what is no number"), "{message}");
    }

    #[test]
    fn a_cursor_covers_whole_components_only() {
        let params = Params::new(Device::Cpu, 1);
        let _ = (&params / "enc").add("weight", &[1], Init::Ones, Group::Decay);
        let _ = (&params / "encoder").add("weight", &[1], Init::Ones, Group::Decay);
        assert_eq!((&params / "enc").entries().len(), 1);
    }
}
