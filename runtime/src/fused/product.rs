//! Products with float32 weights in the dtype of activations.

use tch::Tensor;

#[cfg(feature = "cuda")]
use super::kernels::is_bf16_on_gpu;

/// `x weight^T + bias` in the dtype of `x` `[.., in]`; `weight` `[out, in]` and `bias` `[out]` float32.
///
/// On a GPU the gradient of a parameter `weight` is bf16 after the first backward pass, and float32 once another is added.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    #[cfg(feature = "cuda")]
    if is_bf16_on_gpu(x) {
        return calls::linear(x, weight, bias);
    }
    let kind = x.kind();
    x.linear(&weight.to_kind(kind), bias.map(|bias| bias.to_kind(kind)).as_ref())
}

/// Rows `x` `[r, i]` sorted by expert, each by the matrix `[o, i]` of its expert: `weight` `[e, o, i]` float32, `ends` `[e]`
/// int32, where the rows of each expert end. Returns `[r, o]` in the dtype of `x`. Of the gradient, see [`linear`].
pub fn grouped_linear(x: &Tensor, weight: &Tensor, ends: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if is_bf16_on_gpu(x) {
        return calls::grouped_linear(x, weight, ends);
    }
    x.internal_grouped_mm(&weight.to_kind(x.kind()).transpose(1, 2), Some(ends), None, None)
}

/// The calls of `csrc/products.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use tch::Tensor;

    use crate::ffi;
    use crate::fused::kernels::made;

    pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
        // SAFETY: live tensors that libtorch reads, no bias is a null pointer; the result is new.
        made(|out| unsafe { ffi::m6_linear(x.as_ptr(), weight.as_ptr(), bias, out) })
    }

    pub(super) fn grouped_linear(x: &Tensor, weight: &Tensor, ends: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_grouped_linear(x.as_ptr(), weight.as_ptr(), ends.as_ptr(), out) })
    }

    #[cfg(test)]
    pub(super) fn in_bf16(weight: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_in_bf16(weight.as_ptr(), out) })
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use tch::Kind;

    use super::*;
    use crate::fused::testing::{CUDA, check, draw};
    use crate::optim::{Optimizer, OptimizerConfig};
    use crate::params::{Group, Init, Params};

    #[test]
    fn a_product_and_its_gradients_match_float64() {
        tch::manual_seed(8);
        for shape in [&[65, 96][..], &[3, 7, 96]] {
            let inputs = [draw(shape), draw(&[40, 96]), draw(&[40])];
            for has_bias in [true, false] {
                check(
                    &inputs[..if has_bias { 3 } else { 2 }],
                    |t| {
                        linear(
                            &t[0],
                            &t[1].to_kind(Kind::Float),
                            t.get(2).map(|b| b.to_kind(Kind::Float)).as_ref(),
                        )
                    },
                    |t| t[0].linear(&t[1], t.get(2)),
                );
            }
        }
    }

    /// An expert without rows among them.
    #[test]
    fn a_product_by_experts_and_its_gradients_match_float64_and_add_up_in_float32() {
        tch::manual_seed(11);
        const ENDS: [i32; 4] = [40, 40, 41, 100];
        let ends = Tensor::from_slice(&ENDS).to_device(CUDA);
        let by_hand = |x: &Tensor, weight: &Tensor| {
            let starts = std::iter::once(0).chain(ENDS);
            let part = |(expert, (start, end)): (usize, (i32, i32))| {
                let rows = x.slice(0, i64::from(start), i64::from(end), 1);
                rows.matmul(&weight.get(expert as i64).tr())
            };
            Tensor::cat(&starts.zip(ENDS).enumerate().map(part).collect::<Vec<_>>(), 0)
        };
        let weight = draw(&[4, 48, 64]);
        check(
            &[draw(&[100, 64]), weight.to_kind(Kind::Float)],
            |t| grouped_linear(&t[0], &t[1], &ends),
            |t| by_hand(&t[0], &t[1]),
        );
        assert_grad_adds_up(&weight, |x, weight| grouped_linear(x, weight, &ends), by_hand);
    }

    #[test]
    fn gradients_of_a_product_add_up_in_float32() {
        tch::manual_seed(12);
        assert_grad_adds_up(
            &draw(&[48, 64]),
            |x, weight| linear(x, weight, None),
            |x, weight| x.linear::<&Tensor>(weight, None),
        );
    }

    /// Of a parameter of these values, over passes with rows `[100, 64]`.
    #[track_caller]
    fn assert_grad_adds_up(
        values: &Tensor,
        product: impl Fn(&Tensor, &Tensor) -> Tensor,
        exact_product: impl Fn(&Tensor, &Tensor) -> Tensor,
    ) {
        let leaf = |kind| values.to_kind(kind).set_requires_grad(true);
        let (weight, exact) = (leaf(Kind::Float), leaf(Kind::Double));
        for pass in 1..=3 {
            let x = draw(&[100, 64]);
            product(&x, &weight).square().sum(Kind::Float).backward();
            exact_product(&x.to_kind(Kind::Double), &exact).square().sum(Kind::Double).backward();
            let grad = weight.grad();
            assert_eq!(grad.kind(), if pass == 1 { Kind::BFloat16 } else { Kind::Float });
            let gap = (grad.to_kind(Kind::Double) - exact.grad()).norm() / exact.grad().norm();
            assert!(gap.double_value(&[]) < 1e-2);
        }
    }

    #[test]
    fn a_parameters_copy_is_kept_and_follows_it_whoever_writes() {
        let parameter = |seed| {
            let params = Params::new(CUDA, seed);
            let weight = params.add("w", &[40, 99], Init::Normal(1.0), Group::Decay);
            (params, weight)
        };
        let copy = |weight: &Tensor| {
            let copy = calls::in_bf16(weight);
            assert_eq!(copy, weight.to_kind(Kind::BFloat16));
            copy.data_ptr()
        };
        let (params, mut weight) = parameter(1);
        let first = copy(&weight);
        let mut optimizer = Optimizer::new(&params, OptimizerConfig::default());
        optimizer.set_lr(0.1);
        for max_norm in [1.0, 0.5, f64::INFINITY] {
            optimizer.zero_grad().unwrap();
            let x = draw(&[7, 99]);
            (linear(&x, &weight, None) + linear(&x, &weight.narrow(0, 0, 40), None))
                .sum(Kind::Float)
                .backward();
            let _ = optimizer.step(max_norm).unwrap();
            assert_eq!(copy(&weight), first);
            copy(&weight.narrow(0, 7, 20));
        }
        tch::no_grad(|| weight.copy_(&parameter(2).1));
        copy(&weight);
        drop((params, weight, optimizer));
        for seed in 3..6 {
            copy(&parameter(seed).1);
        }
    }
}
