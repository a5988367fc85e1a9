//! Norms.

use tch::Tensor;

/// Group norm (Wu and He 2018) of `x` `[b, c, h, w]`, followed by swish where `swish` says so; moments in float32.
/// Same shape and dtype as `x`. On a GPU the result lies channels last.
pub fn group_norm(x: &Tensor, groups: i64, weight: &Tensor, bias: &Tensor, eps: f64, swish: bool) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::group_norm_fits(x, groups) {
        return calls::group_norm(x, groups, weight, bias, eps, swish);
    }
    let (weight, bias) = (weight.to_kind(x.kind()), bias.to_kind(x.kind()));
    let normed = x.group_norm(groups, Some(&weight), Some(&bias), eps, true);
    if swish { normed.silu() } else { normed }
}

/// Root-mean-square norm (Zhang and Sennrich 2019) over the last axis of `x`, computed in float32; same shape and dtype.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::row_norm_fits(x) {
        return calls::row_norm(x, weight, None, eps);
    }
    x.rms_norm(weight.size(), Some(&weight.to_kind(x.kind())), eps)
}

/// `x + residual`, and [`rms_norm`] of it.
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if calls::add_row_norm_fits(x, residual) {
        return calls::add_row_norm(x, residual, weight, None, eps);
    }
    let sum = x + residual;
    let normed = rms_norm(&sum, weight, eps);
    (sum, normed)
}

/// Layer norm (Ba et al. 2016) over the last axis of `x`, computed in float32; same shape and dtype.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::row_norm_fits(x) {
        return calls::row_norm(x, weight, Some(bias), eps);
    }
    x.layer_norm(weight.size(), Some(&weight.to_kind(x.kind())), Some(&bias.to_kind(x.kind())), eps, true)
}

/// `x + residual`, and [`layer_norm`] of it.
pub fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: &Tensor,
    eps: f64,
) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if calls::add_row_norm_fits(x, residual) {
        return calls::add_row_norm(x, residual, weight, Some(bias), eps);
    }
    let sum = x + residual;
    let normed = layer_norm(&sum, weight, bias, eps);
    (sum, normed)
}

/// The calls of `csrc/norms.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use std::ptr::{null, null_mut};

    use tch::Tensor;
    use torch_sys::C_tensor;

    use crate::ffi;
    use crate::fused::kernels::{VECTOR, is_bf16_on_gpu, made};

    /// What a block of threads can hold.
    const MAX_CHANNELS: i64 = 2048;
    const MAX_GROUPS: i64 = 32;
    const MAX_ROW: i64 = 8192;

    pub(super) fn group_norm_fits(x: &Tensor, groups: i64) -> bool {
        let channels = x.size().get(1).copied().unwrap_or(0);
        is_bf16_on_gpu(x)
            && x.dim() == 4
            && channels % VECTOR == 0
            && channels <= MAX_CHANNELS
            && groups <= MAX_GROUPS
    }

    pub(super) fn row_norm_fits(x: &Tensor) -> bool {
        let width = x.size().last().copied().unwrap_or(0);
        is_bf16_on_gpu(x) && width % VECTOR == 0 && width <= MAX_ROW
    }

    pub(super) fn add_row_norm_fits(x: &Tensor, residual: &Tensor) -> bool {
        row_norm_fits(x) && residual.kind() == x.kind() && residual.size() == x.size()
    }

    pub(super) fn group_norm(
        x: &Tensor,
        groups: i64,
        weight: &Tensor,
        bias: &Tensor,
        eps: f64,
        swish: bool,
    ) -> Tensor {
        // SAFETY: live tensors that libtorch reads; the result is new.
        made(|out| unsafe {
            ffi::m6_group_norm(x.as_ptr(), weight.as_ptr(), bias.as_ptr(), groups, eps, swish, out)
        })
    }

    pub(super) fn row_norm(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>, eps: f64) -> Tensor {
        // SAFETY: as above; there may be no bias.
        made(|out| unsafe { ffi::m6_row_norm(x.as_ptr(), weight.as_ptr(), pointer(bias), eps, out) })
    }

    pub(super) fn add_row_norm(
        x: &Tensor,
        residual: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f64,
    ) -> (Tensor, Tensor) {
        let mut sum = null_mut();
        // SAFETY: as above; both results are new.
        let normed = made(|out| unsafe {
            let (x, residual, weight) = (x.as_ptr(), residual.as_ptr(), weight.as_ptr());
            ffi::m6_add_row_norm(x, residual, weight, pointer(bias), eps, &mut sum, out)
        });
        (ffi::take(sum), normed)
    }

    fn pointer(bias: Option<&Tensor>) -> *const C_tensor {
        bias.map_or(null(), Tensor::as_ptr)
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::fused::channels_last;
    use crate::fused::testing::{CUDA, check, draw};

    #[test]
    fn group_norm_and_its_gradients_match_float64() {
        tch::manual_seed(1);
        let shapes = [
            [2, 128, 33, 17],
            [3, 512, 16, 16],
            [1, 64, 1, 1],
            [5, 384, 5, 7],
            [64, 32, 3, 2],
            [1, 256, 96, 96],
        ];
        for shape in shapes {
            for swish in [false, true] {
                let c = shape[1];
                // A mean far from zero, as activations have it.
                let x = channels_last(&(draw(&shape) * 1.5 + 3.0));
                let weight = Tensor::randn([c], (Kind::Float, CUDA)) + 1.0;
                let bias = Tensor::randn([c], (Kind::Float, CUDA));
                check(
                    &[x, weight, bias],
                    |t| group_norm(&t[0], 32, &t[1], &t[2], 1e-6, swish),
                    |t| {
                        let y = t[0].group_norm(32, Some(&t[1]), Some(&t[2]), 1e-6, false);
                        if swish { y.silu() } else { y }
                    },
                );
            }
        }
    }

    #[test]
    fn rms_norm_and_its_gradients_match_float64() {
        tch::manual_seed(2);
        for shape in [
            [7, 3, 64],
            [1000, 12, 128],
            [33, 1, 512],
            [5, 2, 24],
            [300, 1, 896],
            [70, 1, 1536],
            [2000, 1, 384],
            [9, 1, 2048],
            [1600, 1, 3584],
            [5, 1, 8192],
        ] {
            let k = shape[2];
            let weight = Tensor::randn([k], (Kind::Float, CUDA)) + 1.0;
            check(
                &[draw(&shape), weight],
                |t| rms_norm(&t[0], &t[1], 1e-6),
                |t| t[0].rms_norm([k], Some(&t[1]), 1e-6),
            );
        }
    }

    #[test]
    fn layer_norm_and_its_gradients_match_float64() {
        tch::manual_seed(8);
        for (rows, k) in
            [(7, 64), (1000, 128), (5, 24), (300, 896), (70, 1536), (2000, 1024), (5, 4096), (9, 8192)]
        {
            let weight = Tensor::randn([k], (Kind::Float, CUDA)) + 1.0;
            let bias = Tensor::randn([k], (Kind::Float, CUDA));
            // A mean that is large beside the deviation.
            check(
                &[draw(&[rows, k]) + 3.0, weight, bias],
                |t| layer_norm(&t[0], &t[1], &t[2], 1e-5),
                |t| t[0].layer_norm([k], Some(&t[1]), Some(&t[2]), 1e-5, false),
            );
        }
    }

    #[test]
    fn a_sum_and_its_layer_norm_match_float64() {
        tch::manual_seed(9);
        for (rows, k) in [(70, 64), (33, 896), (700, 1536)] {
            let weight = Tensor::randn([k], (Kind::Float, CUDA)) + 1.0;
            let bias = Tensor::randn([k], (Kind::Float, CUDA));
            check(
                &[draw(&[rows, k]), draw(&[rows, k]), weight, bias],
                |t| {
                    let (sum, normed) = add_layer_norm(&t[0], &t[1], &t[2], &t[3], 1e-5);
                    sum * 0.5 + normed
                },
                |t| {
                    let sum = &t[0] + &t[1];
                    &sum * 0.5 + sum.layer_norm([k], Some(&t[2]), Some(&t[3]), 1e-5, false)
                },
            );
        }
    }

    #[test]
    fn a_sum_and_its_norm_match_float64_whichever_of_them_is_used() {
        tch::manual_seed(7);
        for (rows, width) in [(70, 64), (33, 896), (700, 1536)] {
            let inputs = [draw(&[rows, width]), draw(&[rows, width]), draw(&[width])];
            for part in 0..3 {
                // The sum, the norm, or both.
                let of = |(sum, normed): (Tensor, Tensor)| match part {
                    0 => sum,
                    1 => normed,
                    _ => sum + normed,
                };
                check(
                    &inputs[..if part == 0 { 2 } else { 3 }],
                    |t| {
                        let weight = t.get(2).unwrap_or(&inputs[2]).to_kind(Kind::Float);
                        of(add_rms_norm(&t[0], &t[1], &weight, 1e-6))
                    },
                    |t| {
                        let sum = &t[0] + &t[1];
                        let weight =
                            t.get(2).map_or_else(|| inputs[2].to_kind(Kind::Double), Tensor::shallow_clone);
                        let normed = sum.rms_norm([width], Some(&weight), 1e-6);
                        of((sum, normed))
                    },
                );
            }
        }
    }

    #[test]
    fn rms_norm_reads_heads_where_they_lie() {
        tch::manual_seed(3);
        let qkv = draw(&[50, 3, 4, 64]);
        let weight = Tensor::ones([64], (Kind::Float, CUDA));
        let [q, k, _] = &qkv.unbind(1)[..] else { unreachable!("three along axis 1") };
        for heads in [q, k] {
            let gap = rms_norm(heads, &weight, 1e-6) - rms_norm(&heads.contiguous(), &weight, 1e-6);
            assert_eq!(gap.abs().max().double_value(&[]), 0.0);
        }
    }
}
