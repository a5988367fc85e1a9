//! Online merging (Lu et al. 2024, "Online merging optimizers for boosting rewards and mitigating tax in alignment"),
//! with which Qwen2 was aligned (section 4.2): each update is merged with what tuning had made of a model before, so that
//! learning more does not cost what it could already.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::error::{Result, RuntimeError};
use crate::optim::{Optimizer, copy_named};
use crate::params::Params;

/// Beyond it a weight of what tuning had changed is cut (as in the authors' code).
const LARGEST_CHANGE: f64 = 1.0;

/// Settings of online merging by dropout (the paper's OnDARE).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
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

/// Updates of an optimizer that are merged. Its state belongs to the checkpoint.
#[derive(Debug)]
pub struct Merging {
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
    /// Of the trained parameters under `params`, as tuning has left them; `base` holds what they were before, by name.
    ///
    /// # Errors
    /// When one is missing there, or of another shape.
    pub fn new(params: &Params, base: &BTreeMap<String, Tensor>, config: MergingConfig) -> Result<Self> {
        let _guard = tch::no_grad_guard();
        let slot = |(name, param): (String, crate::params::Param)| {
            let param = param.tensor;
            let base = base.get(&name).filter(|base| base.size() == param.size()).ok_or_else(|| {
                RuntimeError::Torch(format!("online merging: `{name}` is missing in the base or of another shape"))
            })?;
            let tuned = reserved(&(&param - base), config.reserve).clamp(-LARGEST_CHANGE, LARGEST_CHANGE);
            Ok(Slot { name, param, tuned })
        };
        Ok(Self { config, slots: params.trainable().into_iter().map(slot).collect::<Result<_>>()? })
    }

    /// What [`Merging::state`] gave, for the same parameters.
    ///
    /// # Errors
    /// When a tensor is missing, unknown, or of another shape or dtype.
    pub fn resumed(params: &Params, state: Vec<(String, Tensor)>, config: MergingConfig) -> Result<Self> {
        let slots = params.trainable().into_iter().map(|(name, param)| {
            let param = param.tensor;
            Slot { name, tuned: param.detach().zeros_like(), param }
        });
        let merging = Self { config, slots: slots.collect() };
        copy_named(merging.state(), state, "online merging")?;
        Ok(merging)
    }

    /// What tuning had changed, by parameter name, for a checkpoint.
    pub fn state(&self) -> Vec<(String, Tensor)> {
        self.slots.iter().map(|slot| (slot.name.clone(), slot.tuned.shallow_clone())).collect()
    }

    /// [`Optimizer::step`], merged: `p + alpha tuned + (1 - alpha) update`, where some of the update is dropped and
    /// weight decay, which is all of `p` that both leave, is not.
    ///
    /// # Errors
    /// Those of the optimizer.
    pub fn step(&self, optimizer: &mut Optimizer, max_norm: f64) -> Result<Tensor> {
        let MergingConfig { alpha, reserve } = self.config;
        let _guard = tch::no_grad_guard();
        let before = optimizer.decayed();
        let norm = optimizer.step(max_norm)?;
        let is_good = norm.isfinite();
        for Slot { name, param, tuned } in &self.slots {
            let Some(before) = before.get(name) else { continue };
            let update = param - before;
            let kept = reserved(&update, reserve);
            // With nothing dropped and an alpha of 0, this adds zeros.
            let change = (&kept - update) + (tuned - kept) * alpha;
            param.shallow_clone().f_add_(&change.where_self(&is_good, &change.zeros_like()))?;
        }
        Ok(norm)
    }
}

/// A share of the values, drawn by lot, that comes to the same sum on average.
fn reserved(x: &Tensor, share: f64) -> Tensor {
    if share < 1.0 { x.dropout(1.0 - share, true) } else { x.shallow_clone() }
}
