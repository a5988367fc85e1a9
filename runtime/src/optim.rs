//! AdamW in one fused launch a group with Muon for hidden matrices, both merged online where that is asked for, gradient
//! clipping without host synchronisation, and averaged weights.

use std::collections::BTreeMap;

use tch::{Kind, Tensor};

use crate::adamw;
use crate::error::{Result, RuntimeError};
use crate::ffi;
use crate::merging::{Merging, MergingConfig};
use crate::muon;
pub use crate::optim_config::OptimizerConfig;
use crate::params::{Group, Params, named_seed};

#[derive(Debug)]
struct Slot {
    name: String,
    group: Group,
    param: Tensor,
    first: Tensor,
    rule: Rule,
}

/// How a parameter is updated, with what that needs beside its running mean. The lots by which AdamW rounds a parameter in
/// bf16 are those of its stream.
#[derive(Debug)]
enum Rule {
    AdamW { second: Tensor, step: Tensor, stream: u32 },
    Muon,
}

/// The optimizer of the trained parameters of a registry; its state belongs to the checkpoint.
#[derive(Debug)]
pub struct Optimizer {
    config: OptimizerConfig,
    slots: Vec<Slot>,
    /// The learning rate, a float64 scalar on the device, where a recorded step reads it anew.
    lr: Tensor,
    merging: Option<Merging>,
}

impl Optimizer {
    /// An optimizer of everything trained under `params`, with zero moments and a learning rate of zero.
    pub fn new(params: &Params, config: OptimizerConfig) -> Self {
        let slots = params.trainable().into_iter().map(|(name, p)| {
            let zeros = |kind| p.tensor.detach().to_kind(kind).zeros_like();
            let moments = config.moments.kind();
            let (first, rule) = if p.group == Group::Hidden && config.muon_momentum.is_some() {
                (zeros(Kind::Float), Rule::Muon)
            } else {
                let step = Tensor::zeros([], (Kind::Float, p.tensor.device()));
                let stream = named_seed(0, &name) as u32;
                (zeros(moments), Rule::AdamW { second: zeros(moments), step, stream })
            };
            Slot { name, group: p.group, first, rule, param: p.tensor }
        });
        let lr = Tensor::zeros([], (Kind::Double, params.device()));
        Self { config, slots: slots.collect(), lr, merging: None }
    }

    /// The same with updates that are merged with what tuning has made of `base`, the parameters under `params` before it by
    /// name. Without a base it is left to a checkpoint to say with what.
    ///
    /// # Errors
    /// When a parameter is missing in the base, or of another shape.
    pub fn merging(
        self,
        params: &Params,
        config: MergingConfig,
        base: Option<&BTreeMap<String, Tensor>>,
    ) -> Result<Self> {
        let mut merging = Merging::new(params, config);
        if let Some(base) = base {
            merging.set_base(base)?;
        }
        Ok(Self { merging: Some(merging), ..self })
    }

    /// Sets the learning rate of the steps to come.
    pub fn set_lr(&mut self, lr: f64) {
        let _ = self.lr.fill_(lr);
    }

    /// Forgets all gradients: they are undefined until the next backward pass, which then writes them without
    /// reading zeros first.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn zero_grad(&self) -> Result<()> {
        let params: Vec<_> = self.slots.iter().map(|slot| slot.param.as_ptr()).collect();
        // SAFETY: live tensors; only their gradient slots are written.
        ffi::check(unsafe { ffi::m6_clear_grads(params.len(), params.as_ptr()) })
    }

    /// One update by the gradients, scaled so that their global L2 norm is at most `max_norm`; returns the norm before,
    /// a scalar on the device. Where it is not finite the parameters stay as they are; that is decided on the device, so
    /// a step never waits for the host. Parameters without a gradient are left alone. Gradients may or may not be scaled
    /// themselves.
    ///
    /// # Errors
    /// When no parameter has a gradient or libtorch refuses.
    pub fn step(&mut self, max_norm: f64) -> Result<Tensor> {
        /// Keeps the ratio finite for a zero norm, as in `torch.nn.utils.clip_grad_norm_`.
        const NORM_EPS: f64 = 1e-6;
        let norm = self.grad_norm()?;
        let factor = ((&norm + NORM_EPS).reciprocal() * max_norm).clamp_max(1.0);
        let before = self.merging.as_ref().map(|_| self.decayed());
        self.step_adamw(&norm, &factor)?;
        self.step_muon(&norm, &factor)?;
        if let (Some(merging), Some(before)) = (&self.merging, before) {
            merging.merge(&before, &norm)?;
        }
        Ok(norm)
    }

    /// What weight decay alone would make of the parameters with a gradient, by name.
    fn decayed(&self) -> BTreeMap<String, Tensor> {
        let _guard = tch::no_grad_guard();
        let decayed = |slot: &Slot| match slot.group {
            Group::NoDecay => slot.param.copy(),
            _ => &slot.param * (1.0 - &self.lr * self.config.weight_decay),
        };
        self.with_grad().map(|(slot, _)| (slot.name.clone(), decayed(slot))).collect()
    }

    fn grad_norm(&self) -> Result<Tensor> {
        let grads: Vec<Tensor> = self.with_grad().map(|(_, grad)| grad).collect();
        if grads.is_empty() {
            return Err(RuntimeError::Torch("no parameter has a gradient".into()));
        }
        let mut out = std::ptr::null_mut();
        let list = ffi::pointers(&grads);
        // SAFETY: `list` points to live tensors; `out` receives a new one on success.
        ffi::check(unsafe { ffi::m6_foreach_l2_norm(list.len(), list.as_ptr(), &mut out) })?;
        Ok(ffi::take(out))
    }

    fn step_muon(&mut self, norm: &Tensor, factor: &Tensor) -> Result<()> {
        let Some(momentum) = self.config.muon_momentum else { return Ok(()) };
        let is_bad = norm.isfinite().logical_not();
        let rates = muon::Rates { lr: &self.lr, momentum, weight_decay: self.config.weight_decay };
        let mut by_shape: BTreeMap<Vec<i64>, Vec<muon::Matrix>> = BTreeMap::new();
        for (slot, grad) in self.with_grad().filter(|(slot, _)| matches!(slot.rule, Rule::Muon)) {
            let (param, momentum) = (slot.param.shallow_clone(), slot.first.shallow_clone());
            let grad = grad.to_kind(Kind::Float) * factor;
            by_shape.entry(grad.size()).or_default().push(muon::Matrix { param, grad, momentum });
        }
        for matrices in by_shape.values_mut() {
            muon::step(matrices, &rates, &is_bad)?;
        }
        Ok(())
    }

    fn step_adamw(&self, norm: &Tensor, factor: &Tensor) -> Result<()> {
        for is_decayed in [true, false] {
            let mut batch = adamw::Batch::default();
            for (slot, grad) in self.with_grad().filter(|(s, _)| (s.group != Group::NoDecay) == is_decayed) {
                if let Rule::AdamW { second, step, stream } = &slot.rule {
                    batch.push(&slot.param, grad, &slot.first, second, step, *stream);
                }
            }
            let weight_decay = if is_decayed { self.config.weight_decay } else { 0.0 };
            let rates =
                adamw::Rates { lr: &self.lr, config: OptimizerConfig { weight_decay, ..self.config } };
            batch.step(&rates, norm, factor)?;
        }
        Ok(())
    }

    fn with_grad(&self) -> impl Iterator<Item = (&Slot, Tensor)> {
        self.slots.iter().map(|slot| (slot, slot.param.grad())).filter(|(_, grad)| grad.defined())
    }

    /// Moments, step counts and what updates are merged with, by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        let entries = self.slots.iter().flat_map(|slot| {
            let mut parts = vec![("first", &slot.first)];
            if let Rule::AdamW { second, step, .. } = &slot.rule {
                parts.extend([("second", second), ("step", step)]);
            }
            parts.into_iter().map(|(part, tensor)| (format!("{}.{part}", slot.name), tensor.shallow_clone()))
        });
        let merged = self.merging.iter().flat_map(Merging::state);
        let merged = merged.map(|(name, tuned)| (format!("{name}.tuned"), tuned.shallow_clone()));
        entries.chain(merged).collect()
    }

    /// Takes back what [`Optimizer::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, unknown, or of another shape or dtype.
    pub fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        copy_named(self.state(), state, "optimizer state")
    }
}

/// Exponential moving average of the trained parameters: `average = decay * average + (1 - decay) * value`.
#[derive(Debug)]
pub struct Ema {
    decay: f64,
    names: Vec<String>,
    values: Vec<Tensor>,
    averages: Vec<Tensor>,
}

impl Ema {
    /// Starts from the present values. With a decay of 0 the average is the value itself, and nothing is kept.
    pub fn new(params: &Params, decay: f64) -> Self {
        let averaged = params.trainable().into_iter().filter(|_| decay > 0.0);
        let (names, values): (Vec<_>, Vec<_>) = averaged.map(|(name, p)| (name, p.tensor)).unzip();
        let averages = values.iter().map(|v| v.detach().copy()).collect();
        Self { decay, names, values, averages }
    }

    /// Takes the present values into the averages. Early on the decay is smaller, `(1 + step) / (10 + step)`,
    /// so that the start is forgotten.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub fn update(&mut self, step: u64) -> Result<()> {
        if self.averages.is_empty() {
            return Ok(());
        }
        let early = (1.0 + step as f64) / (10.0 + step as f64);
        let weight = 1.0 - self.decay.min(early);
        let (averages, values) = (ffi::pointers(&self.averages), ffi::pointers(&self.values));
        // SAFETY: two lists of equal length of live tensors of equal shapes.
        ffi::check(unsafe {
            ffi::m6_foreach_lerp(averages.len(), averages.as_ptr(), values.as_ptr(), weight)
        })
    }

    /// Exchanges averages and parameters: called once before sampling or saving with the averages, and once
    /// after.
    pub fn swap(&mut self) {
        let _guard = tch::no_grad_guard();
        for (average, value) in self.averages.iter_mut().zip(&mut self.values) {
            let kept = value.copy();
            value.copy_(average);
            average.copy_(&kept);
        }
    }

    /// The averages by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.names.iter().cloned().zip(self.averages.iter().map(Tensor::shallow_clone)).collect()
    }

    /// Takes back what [`Ema::state`] gave.
    ///
    /// # Errors
    /// When a tensor is missing, unknown, or of another shape or dtype.
    pub fn load_state(&mut self, state: Vec<(String, Tensor)>) -> Result<()> {
        copy_named(self.state(), state, "averaged weights")
    }
}

fn copy_named(targets: Vec<(String, Tensor)>, state: Vec<(String, Tensor)>, what: &str) -> Result<()> {
    let mut state: BTreeMap<String, Tensor> = state.into_iter().collect();
    let _guard = tch::no_grad_guard();
    for (name, mut target) in targets {
        let source = state
            .remove(&name)
            .filter(|t| t.size() == target.size() && t.kind() == target.kind())
            .ok_or_else(|| {
            RuntimeError::Torch(format!("{what}: `{name}` is missing or of another shape or dtype"))
        })?;
        target.f_copy_(&source)?;
    }
    match state.keys().next() {
        None => Ok(()),
        Some(name) => Err(RuntimeError::Torch(format!("{what}: `{name}` is not part of the model"))),
    }
}

#[cfg(test)]
mod tests {
    use tch::Device;

    use super::*;
    use crate::dtype::FloatDtype;
    use crate::params::Init;

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);

    fn model() -> (Params, Tensor, Tensor) {
        model_in(FloatDtype::Fp32)
    }

    fn model_in(matrices: FloatDtype) -> (Params, Tensor, Tensor) {
        let params = Params::new(Device::Cpu, 3).with_matrices(matrices);
        let w = params.add("w", &[4, 3], Init::Normal(1.0), Group::Decay);
        let b = params.add("b", &[4], Init::Normal(1.0), Group::NoDecay);
        (params, w, b)
    }

    fn loss(w: &Tensor, b: &Tensor) -> Tensor {
        let x = Tensor::arange(6, FLOAT).reshape([2, 3]) / 5.0;
        (x.matmul(&w.tr().to_kind(Kind::Float)) + b).square().sum(Kind::Float)
    }

    #[test]
    fn float32_moments_match_the_formula() {
        assert_formula(FloatDtype::Fp32);
    }

    #[test]
    fn bf16_moments_match_the_formula() {
        assert_formula(FloatDtype::Bf16);
    }

    /// AdamW written out in f64, after the paper's algorithm 2.
    #[track_caller]
    fn assert_formula(kept: FloatDtype) {
        let (params, w, b) = model();
        let config = OptimizerConfig { weight_decay: 0.1, moments: kept, ..OptimizerConfig::default() };
        let mut optimizer = Optimizer::new(&params, config);
        let mut expected = [w.copy().to_kind(Kind::Double), b.copy().to_kind(Kind::Double)];
        let mut moments = [0, 1].map(|i| (expected[i].zeros_like(), expected[i].zeros_like()));
        for step in 1..=5 {
            optimizer.zero_grad().unwrap();
            loss(&w, &b).backward();
            let lr = 0.01 * step as f64;
            for (i, decay) in [(0, 0.1), (1, 0.0)] {
                let grad = [&w, &b][i].grad().to_kind(Kind::Double);
                moments[i].0 = &moments[i].0 * config.beta1 + &grad * (1.0 - config.beta1);
                moments[i].1 = &moments[i].1 * config.beta2 + grad.square() * (1.0 - config.beta2);
                let first = &moments[i].0 / (1.0 - config.beta1.powi(step));
                let second = &moments[i].1 / (1.0 - config.beta2.powi(step));
                expected[i] = &expected[i] * (1.0 - lr * decay) - first / (second.sqrt() + config.eps) * lr;
                if kept == FloatDtype::Bf16 {
                    let rounded = |x: &Tensor| x.to_kind(Kind::BFloat16).to_kind(Kind::Double);
                    moments[i] = (rounded(&moments[i].0), rounded(&moments[i].1));
                }
            }
            optimizer.set_lr(lr);
            let _ = optimizer.step(f64::INFINITY).unwrap();
        }
        for (actual, expected) in [&w, &b].into_iter().zip(&expected) {
            let gap = (actual.detach().to_kind(Kind::Double) - expected).abs().max().double_value(&[]);
            assert!(gap < 1e-5, "{gap}");
        }
        let kinds = optimizer.slots.iter().map(|slot| slot.first.kind()).collect::<Vec<_>>();
        assert_eq!(kinds, [kept.kind(); 2]);
    }

    /// One step's first moment is a share of the scaled gradient.
    #[test]
    fn clipping_bounds_the_norm_and_reports_the_one_before() {
        let (params, w, b) = model();
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        loss(&w, &b).backward();
        let before = (w.grad().square().sum(Kind::Float) + b.grad().square().sum(Kind::Float)).sqrt();
        let norm = optimizer.step(0.5).unwrap();
        assert!((norm - &before).abs().double_value(&[]) < 1e-4);
        let moments = optimizer.slots.iter().map(|slot| slot.first.square().sum(Kind::Float));
        let after = moments.sum::<Tensor>().sqrt().double_value(&[]) / (1.0 - optimizer.config.beta1);
        assert!((after - 0.5).abs() < 1e-4, "{after}");
    }

    #[test]
    fn gradients_are_undefined_after_zero_grad_and_such_parameters_are_left_alone() {
        let (params, w, b) = model();
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        loss(&w, &b).backward();
        optimizer.zero_grad().unwrap();
        assert!(optimizer.step(1.0).is_err());
        w.square().sum(Kind::Float).backward();
        let kept = b.copy();
        let _ = optimizer.step(1.0).unwrap();
        assert_eq!(kept, b);
    }

    #[test]
    fn a_step_with_infinite_gradients_changes_nothing() {
        let (params, w, b) = model();
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        (loss(&w, &b) * f64::INFINITY).backward();
        let kept = w.copy();
        let _ = optimizer.step(1.0).unwrap();
        assert_eq!(kept, w);
        let steps = optimizer.state().into_iter().find(|(n, _)| n == "w.step").unwrap().1;
        assert_eq!(steps.double_value(&[]), 0.0);
    }

    #[test]
    fn state_returns_and_training_goes_on_bit_for_bit() {
        let run = |moments: FloatDtype, weights: FloatDtype, interrupt: bool| {
            let config = OptimizerConfig { moments, ..OptimizerConfig::default() };
            let (params, w, b) = model_in(weights);
            let mut optimizer = Optimizer::new(&params, config);
            optimizer.set_lr(0.1);
            let mut ema = Ema::new(&params, 0.9);
            for step in 0..6 {
                if interrupt && step == 3 {
                    let (state, averages) = (optimizer.state(), ema.state());
                    let copied: Vec<_> = state.iter().map(|(n, t)| (n.clone(), t.copy())).collect();
                    let averages: Vec<_> = averages.iter().map(|(n, t)| (n.clone(), t.copy())).collect();
                    optimizer = Optimizer::new(&params, config);
                    optimizer.load_state(copied).unwrap();
                    ema = Ema::new(&params, 0.9);
                    ema.load_state(averages).unwrap();
                }
                optimizer.zero_grad().unwrap();
                loss(&w, &b).backward();
                optimizer.set_lr(0.05);
                let _ = optimizer.step(1.0).unwrap();
                ema.update(step).unwrap();
            }
            ema.swap();
            (w.copy(), b.copy())
        };
        let [fp32, bf16] = [FloatDtype::Fp32, FloatDtype::Bf16];
        for (moments, weights) in [(fp32, fp32), (bf16, fp32), (bf16, bf16)] {
            assert_eq!(run(moments, weights, false), run(moments, weights, true));
        }
    }

    #[test]
    fn averages_of_the_last_value_alone_are_not_kept() {
        let (params, w, b) = model();
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        let mut ema = Ema::new(&params, 0.0);
        loss(&w, &b).backward();
        let _ = optimizer.step(1.0).unwrap();
        ema.update(0).unwrap();
        let kept = w.copy();
        ema.swap();
        assert_eq!((kept, ema.state().len()), (w, 0));
    }

    /// The float32 result is between the two bf16 numbers of which one is kept, or is that one.
    #[test]
    fn bf16_weights_are_those_of_float32_rounded_up_or_down() {
        let stepped = |weights| {
            let (params, mut w, b) = model_in(weights);
            let start = model_in(FloatDtype::Bf16).1;
            tch::no_grad(|| w.copy_(&start));
            let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
            optimizer.set_lr(0.1);
            loss(&w, &b).backward();
            let gradient = w.grad().to_kind(Kind::BFloat16);
            tch::no_grad(|| w.grad().copy_(&gradient));
            let _ = optimizer.step(f64::INFINITY).unwrap();
            Vec::<f32>::try_from(w.detach().to_kind(Kind::Float).flatten(0, -1)).unwrap()
        };
        let mut ups = 0;
        for (exact, rounded) in stepped(FloatDtype::Fp32).into_iter().zip(stepped(FloatDtype::Bf16)) {
            const LOWER_HALF: u32 = 0xffff;
            let toward_zero = f32::from_bits(exact.to_bits() & !LOWER_HALF);
            let away = f32::from_bits((exact.to_bits() | LOWER_HALF) + 1);
            assert!([toward_zero, away].contains(&rounded), "{exact} {rounded}");
            ups += usize::from(rounded == away);
        }
        assert!((1..12).contains(&ups), "{ups} of 12 were rounded away from zero");
    }

    /// Twenty updates, each a fortieth of what bf16 resolves: by nearest rounding all would be lost.
    #[test]
    fn small_updates_of_bf16_weights_come_to_what_they_should_on_average() {
        const LR: f64 = 1e-4;
        const STEPS: i32 = 20;
        let params = Params::new(Device::Cpu, 3).with_matrices(FloatDtype::Bf16);
        let w = params.add("w", &[64, 64], Init::Ones, Group::NoDecay);
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(LR);
        for _ in 0..STEPS {
            optimizer.zero_grad().unwrap();
            w.sum(Kind::Float).backward();
            let _ = optimizer.step(f64::INFINITY).unwrap();
        }
        let moved = 1.0 - w.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((moved / (LR * f64::from(STEPS)) - 1.0).abs() < 0.1, "{moved}");
    }

    /// Hidden matrices by Muon, everything else by AdamW; a part without a gradient stays, and so does its momentum.
    #[test]
    fn muon_takes_the_hidden_matrices_and_comes_back_bit_for_bit() {
        let config = OptimizerConfig { muon_momentum: Some(0.9), ..OptimizerConfig::default() };
        let run = |interrupt: bool| {
            let params = Params::new(Device::Cpu, 3);
            let hidden = params.add("hidden", &[4, 3], Init::Normal(1.0), Group::Hidden);
            let unused = params.add("unused", &[4, 3], Init::Normal(1.0), Group::Hidden);
            let bias = params.add("bias", &[4], Init::Normal(1.0), Group::NoDecay);
            let start = [&hidden, &unused, &bias].map(|t| t.detach().copy());
            let mut optimizer = Optimizer::new(&params, config);
            for step in 0..6 {
                if interrupt && step == 3 {
                    let state = optimizer.state().iter().map(|(n, t)| (n.clone(), t.copy())).collect();
                    optimizer = Optimizer::new(&params, config);
                    optimizer.load_state(state).unwrap();
                }
                optimizer.zero_grad().unwrap();
                loss(&hidden, &bias).backward();
                optimizer.set_lr(0.05);
                let _ = optimizer.step(1.0).unwrap();
            }
            let names: Vec<String> = optimizer.state().into_iter().map(|(name, _)| name).collect();
            assert_eq!(names, ["bias.first", "bias.second", "bias.step", "hidden.first", "unused.first"]);
            assert_eq!(unused, start[1]);
            assert!(loss(&hidden, &bias).double_value(&[]) < loss(&start[0], &start[2]).double_value(&[]));
            (hidden.copy(), bias.copy())
        };
        assert_eq!(run(false), run(true));
    }

    #[test]
    fn foreign_state_is_refused_by_name() {
        let (params, ..) = model();
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        let mut state = optimizer.state();
        state.push(("x.first".into(), Tensor::zeros([1], FLOAT)));
        let message = optimizer.load_state(state).unwrap_err().to_string();
        assert!(message.contains("`x.first` is not part of the model"), "{message}");
    }
}
