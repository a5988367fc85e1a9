//! Gates.

use tch::Tensor;

/// SwiGLU (Shazeer 2020) of `[.., 2 f]`: the first half, through swish, gates the second. Returns `[.., f]`.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::swiglu_fits(gate_up) {
        return calls::swiglu(gate_up);
    }
    let halves = gate_up.chunk(2, -1);
    halves[0].silu() * &halves[1]
}

/// `sigmoid(gates) x + y`: rows `x` `[n, d]`, each through its gate of `gates` `[n, 1]`, and rows `y` `[n, d]`.
pub fn gated_sum(x: &Tensor, gates: &Tensor, y: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::gated_sum_fits(x) && gates.kind() == x.kind() && y.kind() == x.kind() {
        return calls::gated_sum(x, gates, y);
    }
    gates.sigmoid() * x + y
}

/// The calls of `csrc/gates.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use tch::Tensor;

    use crate::ffi;
    use crate::fused::kernels::{VECTOR, is_bf16_on_gpu, made};

    pub(super) fn swiglu_fits(gate_up: &Tensor) -> bool {
        let width = gate_up.size().last().copied().unwrap_or(0);
        is_bf16_on_gpu(gate_up) && width % (2 * VECTOR) == 0
    }

    pub(super) fn gated_sum_fits(x: &Tensor) -> bool {
        x.dim() == 2 && x.size()[1] % VECTOR == 0 && is_bf16_on_gpu(x)
    }

    pub(super) fn swiglu(gate_up: &Tensor) -> Tensor {
        // SAFETY: live tensors that libtorch reads; the result is new.
        made(|out| unsafe { ffi::m6_swiglu(gate_up.as_ptr(), out) })
    }

    pub(super) fn gated_sum(x: &Tensor, gates: &Tensor, y: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_gated_sum(x.as_ptr(), gates.as_ptr(), y.as_ptr(), out) })
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::fused::testing::{check, draw};

    #[test]
    fn gated_sum_and_its_gradients_match_float64() {
        tch::manual_seed(10);
        for shape in [[1, 8], [33, 264], [1000, 1024]] {
            check(
                &[draw(&shape), draw(&[shape[0], 1]), draw(&shape)],
                |t| gated_sum(&t[0], &t[1], &t[2]),
                |t| t[1].sigmoid() * &t[0] + &t[2],
            );
        }
    }

    #[test]
    fn swiglu_and_its_gradient_match_float64() {
        tch::manual_seed(4);
        for shape in [[3, 16], [1000, 2 * 1408], [129, 48]] {
            check(
                &[draw(&shape)],
                |t| swiglu(&t[0]),
                |t| {
                    let halves = t[0].chunk(2, -1);
                    halves[0].silu() * &halves[1]
                },
            );
        }
    }
}
