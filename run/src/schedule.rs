//! Learning rate over the course of a run.

use std::f64::consts::PI;

/// Linear warm-up, then half a cosine down to a floor (Loshchilov & Hutter 2017, "SGDR", without restarts).
///
/// With `W = warmup_steps`, `T = total_steps` and `s` the step, counted from 0:
///
/// ```text
/// s < W:   lr * (s + 1) / W
/// s >= W:  lr * (min_ratio + (1 - min_ratio) * (1 + cos(pi * p)) / 2),   p = min(1, (s - W) / (T - W))
/// ```
///
/// The full rate is reached on the last step of the warm-up, and step 0 already learns.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up; 0 for none.
    pub warmup_steps: u64,
    /// Step from which on the rate is `lr * min_ratio`.
    pub total_steps: u64,
    /// Final rate as a part of the peak, 0 to 1.
    pub min_ratio: f64,
}

impl Schedule {
    /// Learning rate of the update made at `step`, counted from 0.
    #[must_use]
    pub fn at(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return self.lr * (step + 1) as f64 / self.warmup_steps as f64;
        }
        if step >= self.total_steps {
            return self.lr * self.min_ratio;
        }
        let decay_steps = (self.total_steps - self.warmup_steps) as f64;
        let progress = (step - self.warmup_steps) as f64 / decay_steps;
        self.lr * (self.min_ratio + (1.0 - self.min_ratio) * 0.5 * (1.0 + (PI * progress).cos()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SCHEDULE: Schedule = Schedule { lr: 1e-3, warmup_steps: 10, total_steps: 110, min_ratio: 0.1 };

    fn assert_near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found} is not {expected}");
    }

    #[test]
    fn follows_the_formula() {
        assert_near(SCHEDULE.at(0), 1e-4);
        assert_near(SCHEDULE.at(9), 1e-3);
        assert_near(SCHEDULE.at(10), 1e-3);
        assert_near(SCHEDULE.at(60), 0.55e-3);
        assert_near(SCHEDULE.at(110), 1e-4);
        assert_near(SCHEDULE.at(u64::MAX), 1e-4);
    }

    #[test]
    fn never_rises_after_the_warm_up() {
        let rates: Vec<f64> = (9..130).map(|step| SCHEDULE.at(step)).collect();
        assert!(rates.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn works_without_warm_up_and_without_decay() {
        assert_near(Schedule { warmup_steps: 0, ..SCHEDULE }.at(0), 1e-3);
        assert_near(Schedule { warmup_steps: 110, ..SCHEDULE }.at(109), 1e-3);
        assert_near(Schedule { warmup_steps: 200, ..SCHEDULE }.at(199), 1e-3);
    }
}
