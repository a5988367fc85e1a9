//! Settings of the optimizers.

use serde::{Deserialize, Serialize};

use crate::dtype::FloatDtype;

/// The largest `beta1` and `beta2` with moments in bf16. A mean that keeps more of itself in a step changes by less than bf16
/// resolves, and then stands still.
const LARGEST_BF16_BETA: f64 = 0.99;

/// Settings of AdamW (Loshchilov and Hutter, "Decoupled weight decay regularization"), and of Muon beside it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OptimizerConfig {
    /// Decay of the gradient's running mean.
    pub beta1: f64,
    /// Decay of the squared gradient's running mean.
    pub beta2: f64,
    /// Added to the denominator.
    pub eps: f64,
    /// Decoupled weight decay of the matrices; biases, norms and embeddings have none.
    pub weight_decay: f64,
    /// The numbers of both running means; Muon's momentum is float32. In bf16 (DeepSeek-AI 2024, "DeepSeek-V3 Technical
    /// Report", 3.3.3) there are four bytes less to keep for each weight and eight less to move.
    pub moments: FloatDtype,
    /// Where given, hidden matrices are updated by Muon (Jordan et al. 2024) with this momentum, at the same learning
    /// rate and weight decay; all else, and everything where it is absent, by AdamW.
    pub muon_momentum: Option<f64>,
}

impl OptimizerConfig {
    /// What is wrong with these settings, in one line naming the key.
    ///
    /// # Errors
    /// When a value is out of its range.
    pub fn validate(&self) -> std::result::Result<(), String> {
        let momentum = self.muon_momentum.map(|value| ("muon_momentum", value));
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)].into_iter().chain(momentum) {
            if !(0.0..1.0).contains(&value) {
                return Err(format!("{key} = {value}: expected 0 <= {key} < 1"));
            }
        }
        for (key, value) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            let most = LARGEST_BF16_BETA;
            if self.moments == FloatDtype::Bf16 && value > most {
                return Err(format!(
                    "{key} = {value}: expected {most} at most with moments = \"bf16\", which cannot follow a slower mean"
                ));
            }
        }
        if self.eps == 0.0 {
            return Err("eps = 0: expected above 0, or weights without a gradient become no numbers".into());
        }
        for (key, value) in [("eps", self.eps), ("weight_decay", self.weight_decay)] {
            if !(value >= 0.0 && value.is_finite()) {
                return Err(format!("{key} = {value}: expected 0 or more"));
            }
        }
        Ok(())
    }
}

impl Default for OptimizerConfig {
    fn default() -> Self {
        Self {
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.05,
            moments: FloatDtype::Fp32,
            muon_momentum: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_too_slow_for_bf16_is_refused() {
        let config = OptimizerConfig { moments: FloatDtype::Bf16, ..OptimizerConfig::default() };
        assert_eq!(config.validate(), Ok(()));
        let message = OptimizerConfig { beta2: 0.999, ..config }.validate().unwrap_err();
        assert!(message.contains("beta2 = 0.999") && message.contains("0.99 at most"), "{message}");
    }
}
