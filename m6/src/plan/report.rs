//! A plan for people.

use std::fmt;

use super::{Plan, Precision, Setup};
use crate::table::table;

const GIB: f64 = (1u64 << 30) as f64;
const KIB: f64 = 1024.0;

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = vec![row(["", "parameters", "active"])];
        for (name, count) in self.parts.named().into_iter().filter(|(_, count)| count.parameters > 0) {
            parts.push(row([name, &short(count.parameters as f64), &short(count.active as f64)]));
        }
        let (all, active) = (self.parameters as f64, self.active_parameters as f64);
        parts.push(row(["all", &short(all), &short(active)]));
        writeln!(f, "{}", table(&parts))?;

        let flops = &self.flops;
        let mut operations = vec![
            row(["operations", "forward", "and backward"]),
            row([
                &format!("a token of {}", flops.length),
                &short(flops.forward_per_token),
                &short(flops.training_per_token),
            ]),
        ];
        if flops.training_per_picture > 0.0 {
            let (forward, training) = (flops.forward_per_picture, flops.training_per_picture);
            operations.push(row(["a picture", &short(forward), &short(training)]));
        }
        writeln!(f, "{}", table(&operations))?;

        let mut memory = vec![row([
            "GiB a GPU",
            "GPUs",
            "weights",
            "copies",
            "gradients",
            "optimizer",
            "averages",
            "states",
            "KiB a token",
        ])];
        let knows_memory = self.memory.iter().any(|setup| setup.fits.is_some());
        if knows_memory {
            memory[0].push("tokens that fit".into());
        }
        memory.extend(self.memory.iter().map(Setup::row));
        f.write_str(&table(&memory))
    }
}

impl Setup {
    fn row(&self) -> Vec<String> {
        let precision = match self.precision {
            Precision::Fp32Bf16 => "fp32, bf16 copies",
            Precision::Bf16 => "bf16",
        };
        let name = if self.recompute { format!("{precision}, recomputed") } else { precision.to_owned() };
        let states = [self.weights, self.copies, self.gradients, self.optimizer, self.averages, self.states];
        let mut cells = vec![name, self.gpus.to_string()];
        cells.extend(states.map(|bytes| gibibytes(bytes as f64 / GIB)));
        cells.push(format!("{:.1}", self.activations_per_token / KIB));
        match (self.fits, self.largest_batch) {
            (Some(true), Some(tokens)) => cells.push(tokens.to_string()),
            (Some(false), _) => cells.push("none".into()),
            _ => {}
        }
        cells
    }
}

fn row<const N: usize>(cells: [&str; N]) -> Vec<String> {
    cells.map(str::to_owned).into()
}

/// With more digits where they are few.
fn gibibytes(size: f64) -> String {
    if size < 10.0 { format!("{size:.2}") } else { format!("{size:.1}") }
}

/// A large number by its thousands.
pub(super) fn short(number: f64) -> String {
    let units = [(1e15, " P"), (1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " k")];
    match units.iter().find(|(size, _)| number >= *size) {
        Some((size, unit)) => format!("{:.2}{unit}", number / size),
        None => format!("{number:.0}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Machine, tests::preset};
    use super::*;

    #[test]
    fn numbers_have_three_digits_at_least() {
        assert_eq!(
            ["0", "999", "1.00 k", "17.21 M"],
            [0.0, 999.0, 1e3, 17_206_000.0].map(short).each_ref().map(String::as_str)
        );
    }

    #[test]
    fn what_is_not_there_has_no_row() {
        let machine = Machine { gpus: 8, memory: Some(80 << 30) };
        let text = Plan::of(&preset("qwen2-7b"), machine, None).to_string();
        assert!(!text.contains("experts") && !text.contains("picture"), "{text}");
        assert!(text.contains("\nall               7.62 B    7.62 B\n"), "{text}");
        assert!(
            text.lines().any(|line| line.starts_with("fp32, bf16 copies  ") && line.ends_with("  none")),
            "{text}"
        );
    }
}
