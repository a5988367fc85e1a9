//! The loss of an output head.

use std::ptr::null_mut;

use tch::Tensor;

use crate::ffi;

/// Mean cross-entropy, a scalar, and that of each row, `[m]` float32 without a gradient, of the logits
/// `hidden weight^T` for `labels`; `hidden` `[m, d]`, `weight` `[v, d]`, `labels` `[m]` int64 from 0 to `v - 1`.
///
/// The logits of some rows at a time are made and become their gradients (as in Hsu et al. 2024, Liger Kernel), so that
/// memory does not grow with `m v`; the graph can be gone through once. On a GPU in bf16 they do where they lie.
///
/// Panics where tch's own operations would: when shapes do not fit, the device fails or has no memory.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    crate::fused::kernels::load();
    let (mut mean, mut each) = (null_mut(), null_mut());
    let (h, w, l) = (hidden.as_ptr(), weight.as_ptr(), labels.as_ptr());
    // SAFETY: live tensors that libtorch reads; both results are new.
    let result = ffi::check(unsafe { ffi::m6_linear_cross_entropy(h, w, l, &mut mean, &mut each) });
    result.unwrap_or_else(|error| panic!("{error}"));
    (ffi::take(mean), ffi::take(each))
}

#[cfg(test)]
mod tests {
    use tch::{Device, Kind, Reduction};

    use super::*;

    /// The last with several chunks of rows, of which the last is not full.
    #[test]
    fn losses_and_gradients_match_those_of_all_logits_at_once() {
        tch::manual_seed(6);
        for (rows, width, vocab) in [(1, 3, 2), (300, 12, 103), (1800, 4, 20_011)] {
            let labels = Tensor::randint(vocab, [rows], (Kind::Int64, Device::Cpu));
            let draw = |rows: i64| Tensor::randn([rows, width], (Kind::Double, Device::Cpu));
            let values = [draw(rows), draw(vocab)];
            let run = |kind: Kind, loss: &dyn Fn(&Tensor, &Tensor) -> Tensor| {
                let leaves = values.each_ref().map(|t| t.to_kind(kind).set_requires_grad(true));
                let mean = loss(&leaves[0], &leaves[1]);
                (&mean * 3.0).backward();
                [mean, leaves[0].grad(), leaves[1].grad()].map(|t| t.detach().to_kind(Kind::Double))
            };
            let ours = run(Kind::Float, &|h, w| linear_cross_entropy(h, w, &labels).0);
            let exact = run(Kind::Double, &|h, w| {
                let logits = h.matmul(&w.tr());
                logits.cross_entropy_loss::<Tensor>(&labels, None, Reduction::Mean, -100, 0.0)
            });
            for (index, (ours, exact)) in ours.iter().zip(&exact).enumerate() {
                let gap = ((ours - exact).norm() / exact.norm()).double_value(&[]);
                assert!(gap < 2e-5, "{rows} {vocab} {index}: {gap}");
            }
            let [hidden, weight] = values.map(|t| t.to_kind(Kind::Float));
            let (mean, each) = linear_cross_entropy(&hidden, &weight, &labels);
            assert!((each.mean(Kind::Float) - mean).abs().double_value(&[]) < 1e-6);
        }
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod gpu_tests {
    use tch::{Kind, Reduction};

    use super::*;
    use crate::fused::testing::{CUDA, check_within, draw};

    /// An error of a logit is one of the probability, and logits are a few times larger than one.
    const LOGITS_ERROR: f64 = 2e-2;

    /// Several chunks of logits, and a vocabulary that does not fill its last word.
    #[test]
    fn linear_cross_entropy_and_its_gradients_match_float64() {
        tch::manual_seed(5);
        for (rows, width, vocab) in [(7, 16, 5), (300, 64, 1003), (4000, 32, 151_647)] {
            let labels = Tensor::randint(vocab, [rows], (Kind::Int64, CUDA));
            let hidden = draw(&[rows, width]);
            let weight = Tensor::randn([vocab, width], (Kind::Float, CUDA))
                .to_kind(Kind::BFloat16)
                .to_kind(Kind::Float);
            check_within(
                LOGITS_ERROR,
                &[hidden.shallow_clone(), weight.shallow_clone()],
                |t| linear_cross_entropy(&t[0], &t[1], &labels).0,
                |t| {
                    t[0].matmul(&t[1].tr()).cross_entropy_loss::<Tensor>(
                        &labels,
                        None,
                        Reduction::Mean,
                        -100,
                        0.0,
                    )
                },
            );
            let (mean, each) = linear_cross_entropy(&hidden, &weight, &labels);
            assert_eq!(each.size(), [rows]);
            assert!((each.mean(Kind::Float) - mean).abs().double_value(&[]) < 1e-4);
        }
    }
}
