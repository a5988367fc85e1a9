//! Shares of a run, and values that are in their range.

/// The nearest step to `part` of `steps`.
pub(super) fn fraction(steps: u64, part: f64) -> u64 {
    (steps as f64 * part).round() as u64
}

/// What is wrong with `value`, which is to be from 0 to `high`, or 0 or more where `high` is the largest number.
pub(super) fn out_of_range(value: f64, high: f64) -> Option<String> {
    let expected = if high == 1.0 { "0 to 1" } else { "0 or more" };
    (!(0.0..=high).contains(&value)).then(|| format!("{value}, expected {expected}"))
}
