//! The loss of an output head.

use tch::{Kind, Reduction, Tensor};

/// Mean cross-entropy, a scalar, and that of each row, `[m]` float32 without a gradient, of the logits
/// `hidden weight^T` for `labels`; `hidden` `[m, d]`, `weight` `[v, d]`, `labels` `[m]` int64 from 0 to `v - 1`.
///
/// On a GPU in bf16 the logits of some rows at a time are made and become their gradients in place (as in Hsu et al. 2024,
/// Liger Kernel), so that memory does not grow with `m v`.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if calls::linear_cross_entropy_fits(hidden) {
        return calls::linear_cross_entropy(hidden, weight, labels);
    }
    let logits = hidden.linear(&weight.to_kind(hidden.kind()), None::<&Tensor>).to_kind(Kind::Float);
    let each = logits.cross_entropy_loss(labels, None::<Tensor>, Reduction::None, -100, 0.0);
    (each.mean(Kind::Float), each.detach())
}

/// The calls of `csrc/head.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use std::ptr::null_mut;

    use tch::{Kind, Tensor};

    use crate::ffi;
    use crate::fused::kernels::{VECTOR, is_bf16_on_gpu, made};

    pub(super) fn linear_cross_entropy_fits(hidden: &Tensor) -> bool {
        hidden.dim() == 2 && hidden.size()[1] % VECTOR == 0 && is_bf16_on_gpu(hidden)
    }

    pub(super) fn linear_cross_entropy(
        hidden: &Tensor,
        weight: &Tensor,
        labels: &Tensor,
    ) -> (Tensor, Tensor) {
        let rows = hidden.size()[0];
        let row_weights = Tensor::full([rows], 1.0 / rows as f64, (Kind::Float, hidden.device()));
        let mut losses = null_mut();
        // SAFETY: live tensors that libtorch reads; both results are new.
        let total = made(|total| unsafe {
            ffi::m6_linear_cross_entropy(
                hidden.as_ptr(),
                weight.as_ptr(),
                labels.as_ptr(),
                row_weights.as_ptr(),
                total,
                &mut losses,
            )
        });
        (total, ffi::take(losses))
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
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
