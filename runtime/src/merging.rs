//! Online merging (Lu et al. 2024, "Online merging optimizers for boosting rewards and mitigating tax in alignment"),
//! with which Qwen2 was aligned (section 4.2): each update is merged with what tuning had made of a model before, so that
//! learning more does not cost what it could already.

use std::collections::BTreeMap;

use tch::Tensor;

use crate::error::{Result, RuntimeError};
use crate::params::Params;

/// Beyond it a weight of what tuning had changed is cut (as in the authors' code).
const LARGEST_CHANGE: f64 = 1.0;

/// Settings of online merging by dropout (the paper's OnDARE).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MergingConfig {
    /// Weight of what tuning had changed, beside `1 - alpha` of the update.
    pub alpha: f64,
    /// Share of the weights that an update reaches, drawn anew each time; what is left of it grows to the same sum.
    pub reserve: f64,
}

impl Default for MergingConfig {
    /// What the authors' scripts have.
    fn default() -> Self {
        Self { alpha: 1e-7, reserve: 0.01 }
    }
}

impl MergingConfig {
    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When a value is out of its range.
    pub fn validate(&self) -> std::result::Result<(), String> {
        let Self { alpha, reserve } = self;
        if !(0.0..=1.0).contains(alpha) {
            return Err(format!("alpha = {alpha}: expected 0 to 1"));
        }
        if !(*reserve > 0.0 && *reserve <= 1.0) {
            return Err(format!("reserve = {reserve}: expected above 0 and at most 1"));
        }
        Ok(())
    }
}

/// What updates are merged with.
#[derive(Debug)]
pub(crate) struct Merging {
    config: MergingConfig,
    slots: Vec<Slot>,
}

#[derive(Debug)]
struct Slot {
    name: String,
    param: Tensor,
    /// What tuning had changed, as far as it was kept.
    tuned: Tensor,
}

impl Merging {
    /// Of everything trained under `params`, with no change so far.
    pub(crate) fn new(params: &Params, config: MergingConfig) -> Self {
        let slots = params.trainable().into_iter().map(|(name, param)| {
            let param = param.tensor;
            Slot { name, tuned: param.detach().zeros_like(), param }
        });
        Self { config, slots: slots.collect() }
    }

    /// Takes the present values as what tuning has made of `base`, theirs by name.
    ///
    /// # Errors
    /// When one is missing there, or of another shape.
    pub(crate) fn set_base(&mut self, base: &BTreeMap<String, Tensor>) -> Result<()> {
        let _guard = tch::no_grad_guard();
        for Slot { name, param, tuned } in &mut self.slots {
            let base = base.get(name).filter(|base| base.size() == param.size()).ok_or_else(|| {
                RuntimeError::Torch(format!(
                    "online merging: `{name}` is not in the base, or of another shape"
                ))
            })?;
            *tuned = reserved(&(&*param - base), self.config.reserve).clamp(-LARGEST_CHANGE, LARGEST_CHANGE);
        }
        Ok(())
    }

    /// What tuning had changed, by parameter name.
    pub(crate) fn state(&self) -> impl Iterator<Item = (&str, &Tensor)> {
        self.slots.iter().map(|slot| (slot.name.as_str(), &slot.tuned))
    }

    /// Merges an update that is made already: `before` holds, by name, what the parameters with a gradient were before
    /// it but for weight decay, of which nothing is dropped. Where the gradients' `norm` is not finite, there was none.
    ///
    /// # Errors
    /// When libtorch refuses.
    pub(crate) fn merge(&self, before: &BTreeMap<String, Tensor>, norm: &Tensor) -> Result<()> {
        let MergingConfig { alpha, reserve } = self.config;
        let _guard = tch::no_grad_guard();
        let is_good = norm.isfinite();
        for Slot { name, param, tuned } in &self.slots {
            let Some(before) = before.get(name) else { continue };
            let update = param - before;
            let kept = reserved(&update, reserve);
            // Written so that it is nothing where nothing is dropped and alpha is 0.
            let change = (&kept - update) + (tuned - kept) * alpha;
            let _ = param.shallow_clone().f_add_(&change.where_self(&is_good, &change.zeros_like()))?;
        }
        Ok(())
    }
}

/// A share of the values, drawn by lot, that comes to the same sum on average.
fn reserved(x: &Tensor, share: f64) -> Tensor {
    if share < 1.0 { x.dropout(1.0 - share, true) } else { x.shallow_clone() }
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind};

    use super::*;
    use crate::optim::{Optimizer, OptimizerConfig};
    use crate::params::{Group, Init};

    const FLOAT: (Kind, Device) = (Kind::Float, Device::Cpu);
    const LR: f64 = 0.02;
    const WEIGHT_DECAY: f64 = 0.1;

    fn config(alpha: f64, reserve: f64) -> MergingConfig {
        MergingConfig { alpha, reserve }
    }

    /// Trains a matrix of a base of zeros, and a vector, for some steps; returns both.
    fn trained(merging: Option<MergingConfig>, steps: usize, loss: fn(&Tensor) -> Tensor) -> [Tensor; 2] {
        tch::manual_seed(8);
        let x = Tensor::randn([30, 7], FLOAT);
        let params = Params::new(Device::Cpu, 5);
        let w = params.add("w", &[40, 30], Init::Normal(0.5), Group::Decay);
        let b = params.add("b", &[40], Init::Normal(0.5), Group::NoDecay);
        let optimizer = OptimizerConfig { weight_decay: WEIGHT_DECAY, ..OptimizerConfig::default() };
        let mut optimizer = Optimizer::new(&params, optimizer);
        if let Some(config) = merging {
            let base = params.tensors().into_iter().map(|(name, value)| (name, value.zeros_like())).collect();
            optimizer = optimizer.merging(&params, config, Some(&base)).unwrap();
        }
        optimizer.set_lr(LR);
        for _ in 0..steps {
            optimizer.zero_grad().unwrap();
            loss(&(w.matmul(&x) + b.unsqueeze(-1))).backward();
            let _ = optimizer.step(1.0).unwrap();
        }
        [w.detach().copy(), b.detach().copy()]
    }

    fn squares(y: &Tensor) -> Tensor {
        y.square().sum(Kind::Float)
    }

    #[test]
    fn with_nothing_dropped_and_an_alpha_of_zero_it_is_adamw() {
        let [plain, merged] = [None, Some(config(0.0, 1.0))].map(|merging| trained(merging, 6, squares));
        assert_eq!(plain, merged);
    }

    /// The formula, with what AdamW alone would have made.
    #[test]
    fn an_update_and_what_tuning_had_changed_are_weighed() {
        let [start, plain, merged] = [(None, 0), (None, 1), (Some(config(0.25, 1.0)), 1)]
            .map(|(merging, n)| trained(merging, n, squares));
        for (i, decay) in [(0, WEIGHT_DECAY), (1, 0.0)] {
            let decayed = &start[i] * (1.0 - LR * decay);
            let tuned = start[i].clamp(-LARGEST_CHANGE, LARGEST_CHANGE);
            let expected = &decayed + tuned * 0.25 + (&plain[i] - &decayed) * 0.75;
            let gap = (&merged[i] - expected).abs().max().double_value(&[]);
            assert!(gap < 1e-6, "{gap}");
        }
    }

    #[test]
    fn a_share_of_the_weights_is_reached_and_grows_to_the_same_sum() {
        const SHARE: f64 = 0.2;
        let [start, plain, merged] = [(None, 0), (None, 1), (Some(config(0.0, SHARE)), 1)]
            .map(|(merging, n)| trained(merging, n, squares));
        let decayed = &start[0] * (1.0 - LR * WEIGHT_DECAY);
        let [full, kept] = [&plain[0], &merged[0]].map(|after| after - &decayed);
        let is_kept = kept.abs().gt(1e-6);
        let share = is_kept.to_kind(Kind::Double).mean(Kind::Double).double_value(&[]);
        assert!((share - SHARE).abs() < 0.05, "{share}");
        let gap = ((kept - full / SHARE) * is_kept).abs().max().double_value(&[]);
        assert!(gap < 1e-5, "{gap}");
    }

    #[test]
    fn a_bad_gradient_changes_nothing() {
        let [start, merged] =
            [0, 1].map(|steps| trained(Some(config(0.5, 0.5)), steps, |y| squares(y) * f64::INFINITY));
        assert_eq!(start, merged);
    }

    #[test]
    fn what_does_not_fit_is_named() {
        let message = |alpha, reserve| config(alpha, reserve).validate().unwrap_err();
        assert!(message(1.5, 0.5).starts_with("alpha = 1.5: expected 0 to 1"));
        assert!(message(0.5, 0.0).starts_with("reserve = 0: expected above 0"));
        let params = Params::new(Device::Cpu, 5);
        let _ = params.add("w", &[2], Init::Normal(0.5), Group::Decay);
        let mut merging = Merging::new(&params, MergingConfig::default());
        let problem = merging.set_base(&BTreeMap::new()).unwrap_err().to_string();
        assert!(problem.contains("`w` is not in the base"), "{problem}");
    }
}
