//! Operations that are one or two kernels on a GPU in bf16 where libtorch has one a step. Elsewhere they are libtorch's
//! own, which define them.
//!
//! A norm or a gate moves far more bytes than it computes, so each pass over its input that is saved is time saved.

use tch::{Kind, Reduction, Tensor};

use crate::ffi;

/// Group norm (Wu and He 2018) of `x` `[b, c, h, w]`, followed by swish where `swish` says so; moments in float32.
/// Same shape and dtype as `x`. On a GPU the result lies channels last.
pub fn group_norm(x: &Tensor, groups: i64, weight: &Tensor, bias: &Tensor, eps: f64, swish: bool) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::group_norm_fits(x, groups) {
        return kernels::group_norm(x, groups, weight, bias, eps, swish);
    }
    let (weight, bias) = (weight.to_kind(x.kind()), bias.to_kind(x.kind()));
    let normed = x.group_norm(groups, Some(&weight), Some(&bias), eps, true);
    if swish { normed.silu() } else { normed }
}

/// Root-mean-square norm (Zhang and Sennrich 2019) over the last axis of `x`, computed in float32; same shape and dtype.
pub fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::rms_norm_fits(x) {
        return kernels::rms_norm(x, weight, eps);
    }
    x.rms_norm(weight.size(), Some(&weight.to_kind(x.kind())), eps)
}

/// `x + residual`, and [`rms_norm`] of it.
pub fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if kernels::rms_norm_fits(x) && residual.kind() == x.kind() && residual.size() == x.size() {
        return kernels::add_rms_norm(x, residual, weight, eps);
    }
    let sum = x + residual;
    let normed = rms_norm(&sum, weight, eps);
    (sum, normed)
}

/// `x weight^T + bias` in the dtype of `x` `[.., in]`; `weight` `[out, in]` and `bias` `[out]` float32.
pub fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::is_bf16_on_gpu(x) {
        return kernels::linear(x, weight, bias);
    }
    let kind = x.kind();
    x.linear(&weight.to_kind(kind), bias.map(|bias| bias.to_kind(kind)).as_ref())
}

/// A float32 `weight` in the dtype `kind` of activations, for products that [`linear`] does not cover. On a GPU the bf16
/// copy of a parameter is kept from call to call and renewed by the optimizer.
pub fn converted(weight: &Tensor, kind: Kind) -> Tensor {
    #[cfg(feature = "cuda")]
    if weight.device().is_cuda() && (weight.kind(), kind) == (Kind::Float, Kind::BFloat16) {
        return kernels::in_bf16(weight);
    }
    weight.to_kind(kind)
}

/// Rotary positions (Su et al. 2021) of heads `x` `[n, h, k]`: a value of the first half and its partner in the second
/// are turned by the angle of their token, whose `cosines` and `sines` are `[n, 1, k]` float32, both halves alike. Same
/// shape and dtype as `x`, computed in float32.
pub fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::rotate_fits(x) {
        return kernels::rotate(x, cosines, sines);
    }
    let float = x.to_kind(Kind::Float);
    let halves = float.chunk(2, -1);
    let partners = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
    (float * cosines + partners * sines).to_kind(x.kind())
}

/// Queries `[n, h, k]`, keys and values `[n, g, k]` of a product `[n, h + 2 g, k]` that has them side by side, the first
/// two turned as by [`rotate`].
pub fn split_rotate(
    qkv: &Tensor,
    heads: i64,
    kv_heads: i64,
    cosines: &Tensor,
    sines: &Tensor,
) -> (Tensor, Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if kernels::rotate_fits(qkv) {
        return kernels::split_rotate(qkv, heads, kv_heads, cosines, sines);
    }
    let (q, k, v) = split_heads(qkv, heads, kv_heads);
    (rotate(&q, cosines, sines), rotate(&k, cosines, sines), v)
}

/// The same without turning.
pub fn split_heads(qkv: &Tensor, heads: i64, kv_heads: i64) -> (Tensor, Tensor, Tensor) {
    // One node of the graph: three narrows would each fill the gradient of all of `qkv` with zeros.
    let parts = qkv.split_with_sizes([heads, kv_heads, kv_heads], 1);
    let [q, k, v] = &parts[..] else { unreachable!("three along axis 1") };
    (q.shallow_clone(), k.shallow_clone(), v.shallow_clone())
}

/// SwiGLU (Shazeer 2020) of `[.., 2 f]`: the first half, through swish, gates the second. Returns `[.., f]`.
pub fn swiglu(gate_up: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::swiglu_fits(gate_up) {
        return kernels::swiglu(gate_up);
    }
    let halves = gate_up.chunk(2, -1);
    halves[0].silu() * &halves[1]
}

/// `sigmoid(gates) x + y`: rows `x` `[n, d]`, each through its gate of `gates` `[n, 1]`, and rows `y` `[n, d]`.
pub fn gated_sum(x: &Tensor, gates: &Tensor, y: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if kernels::gated_sum_fits(x) && gates.kind() == x.kind() && y.kind() == x.kind() {
        return kernels::gated_sum(x, gates, y);
    }
    gates.sigmoid() * x + y
}

/// Mean cross-entropy, a scalar, and that of each row, `[m]` float32 without a gradient, of the logits
/// `hidden weight^T` for `labels`; `hidden` `[m, d]`, `weight` `[v, d]`, `labels` `[m]` int64 from 0 to `v - 1`.
///
/// On a GPU in bf16 the logits of some rows at a time are made and become their gradients in place (as in Hsu et al. 2024,
/// Liger Kernel), so that memory does not grow with `m v`.
pub fn linear_cross_entropy(hidden: &Tensor, weight: &Tensor, labels: &Tensor) -> (Tensor, Tensor) {
    #[cfg(feature = "cuda")]
    if kernels::linear_cross_entropy_fits(hidden) {
        return kernels::linear_cross_entropy(hidden, weight, labels);
    }
    let logits = hidden.linear(&weight.to_kind(hidden.kind()), None::<&Tensor>).to_kind(Kind::Float);
    let each = logits.cross_entropy_loss(labels, None::<Tensor>, Reduction::None, -100, 0.0);
    (each.mean(Kind::Float), each.detach())
}

/// `x` where it is positive, `slope * x` elsewhere; tch binds the function with its default slope only.
pub fn leaky_relu(x: &Tensor, slope: f64) -> Tensor {
    let mut out = std::ptr::null_mut();
    // SAFETY: a live tensor that libtorch reads; the result is new.
    let result = ffi::check(unsafe { ffi::m6_leaky_relu(x.as_ptr(), slope, &mut out) });
    result.unwrap_or_else(|error| panic!("{error}"));
    ffi::take(out)
}

/// The same tensor with its channels last in memory, `[b, c, h, w]`: the layout of a GPU's convolutions. Elsewhere
/// the tensor as it is.
pub fn channels_last(x: &Tensor) -> Tensor {
    if !x.device().is_cuda() {
        return x.shallow_clone();
    }
    x.permute([0, 2, 3, 1]).contiguous().permute([0, 3, 1, 2])
}

/// The calls of `csrc/fused.cpp`.
#[cfg(feature = "cuda")]
pub(crate) mod kernels {
    use std::ptr::null_mut;
    use std::sync::Once;

    use tch::{Kind, Tensor};
    use torch_sys::C_tensor;

    use crate::error::Result;
    use crate::ffi;

    /// Values in a 16-byte word; rows consist of whole ones.
    pub(crate) const VECTOR: i64 = 8;
    /// What a block of threads can hold.
    const MAX_CHANNELS: i64 = 2048;
    const MAX_GROUPS: i64 = 32;
    const MAX_ROW: i64 = 8192;

    /// The driver reads the image as words.
    #[repr(align(16))]
    struct Aligned<T: ?Sized>(T);
    static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

    pub(crate) fn is_bf16_on_gpu(x: &Tensor) -> bool {
        x.device().is_cuda() && x.kind() == Kind::BFloat16 && x.numel() > 0
    }

    pub(super) fn group_norm_fits(x: &Tensor, groups: i64) -> bool {
        let channels = x.size().get(1).copied().unwrap_or(0);
        is_bf16_on_gpu(x)
            && x.dim() == 4
            && channels % VECTOR == 0
            && channels <= MAX_CHANNELS
            && groups <= MAX_GROUPS
    }

    pub(super) fn rms_norm_fits(x: &Tensor) -> bool {
        let width = x.size().last().copied().unwrap_or(0);
        is_bf16_on_gpu(x) && width % VECTOR == 0 && width <= MAX_ROW
    }

    pub(super) fn rotate_fits(x: &Tensor) -> bool {
        x.dim() == 3 && x.size()[2] % (2 * VECTOR) == 0 && is_bf16_on_gpu(x)
    }

    pub(super) fn swiglu_fits(gate_up: &Tensor) -> bool {
        let width = gate_up.size().last().copied().unwrap_or(0);
        is_bf16_on_gpu(gate_up) && width % (2 * VECTOR) == 0
    }

    pub(super) fn gated_sum_fits(x: &Tensor) -> bool {
        x.dim() == 2 && x.size()[1] % VECTOR == 0 && is_bf16_on_gpu(x)
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

    pub(super) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f64) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_rms_norm(x.as_ptr(), weight.as_ptr(), eps, out) })
    }

    pub(super) fn add_rms_norm(x: &Tensor, residual: &Tensor, weight: &Tensor, eps: f64) -> (Tensor, Tensor) {
        let mut sum = null_mut();
        // SAFETY: as above; both results are new.
        let normed = made(|out| unsafe {
            ffi::m6_add_rms_norm(x.as_ptr(), residual.as_ptr(), weight.as_ptr(), eps, &mut sum, out)
        });
        (ffi::take(sum), normed)
    }

    pub(super) fn linear(x: &Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Tensor {
        let bias = bias.map_or(std::ptr::null(), Tensor::as_ptr);
        // SAFETY: as above; no bias is a null pointer.
        made(|out| unsafe { ffi::m6_linear(x.as_ptr(), weight.as_ptr(), bias, out) })
    }

    pub(super) fn in_bf16(weight: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_in_bf16(weight.as_ptr(), out) })
    }

    pub(super) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Tensor {
        let (cosines, sines) = (cosines.contiguous(), sines.contiguous());
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_rotate(x.as_ptr(), cosines.as_ptr(), sines.as_ptr(), out) })
    }

    pub(super) fn split_rotate(
        qkv: &Tensor,
        heads: i64,
        kv_heads: i64,
        cosines: &Tensor,
        sines: &Tensor,
    ) -> (Tensor, Tensor, Tensor) {
        let (cosines, sines) = (cosines.contiguous(), sines.contiguous());
        let (mut k, mut v) = (null_mut(), null_mut());
        // SAFETY: as above; all three results are new.
        let q = made(|q| unsafe {
            ffi::m6_split_rotate(
                qkv.as_ptr(),
                cosines.as_ptr(),
                sines.as_ptr(),
                heads,
                kv_heads,
                q,
                &mut k,
                &mut v,
            )
        });
        (q, ffi::take(k), ffi::take(v))
    }

    pub(super) fn swiglu(gate_up: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_swiglu(gate_up.as_ptr(), out) })
    }

    pub(super) fn gated_sum(x: &Tensor, gates: &Tensor, y: &Tensor) -> Tensor {
        // SAFETY: as above.
        made(|out| unsafe { ffi::m6_gated_sum(x.as_ptr(), gates.as_ptr(), y.as_ptr(), out) })
    }

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
        // SAFETY: as above; both results are new.
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

    /// Makes the kernels known, before the first of them is launched.
    pub(crate) fn load() {
        static LOADED: Once = Once::new();
        // SAFETY: the image is static.
        LOADED.call_once(|| unsafe { ffi::m6_set_kernels(IMAGE.0.as_ptr()) });
    }

    /// The tensor that `call` made. Panics where tch's own operations would: when the device fails or has no memory.
    pub(crate) fn made(call: impl FnOnce(*mut *mut C_tensor) -> *mut std::ffi::c_char) -> Tensor {
        load();
        let mut out = null_mut();
        let result: Result<()> = ffi::check(call(&mut out));
        result.unwrap_or_else(|error| panic!("{error}"));
        ffi::take(out)
    }
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
pub(crate) mod tests {
    use tch::Device;

    use super::*;
    use crate::optim::{Optimizer, OptimizerConfig};
    use crate::params::{Group, Init, Params};

    pub(crate) const CUDA: Device = Device::Cuda(0);
    /// bf16 keeps eight bits.
    const BF16_ERROR: f64 = 6e-3;
    /// An error of a logit is one of the probability, and logits are a few times larger than one.
    const LOGITS_ERROR: f64 = 2e-2;

    pub(crate) fn draw(shape: &[i64]) -> Tensor {
        Tensor::randn(shape, (Kind::Float, CUDA)).to_kind(Kind::BFloat16)
    }

    /// Memory that is handed out next holds no numbers, so that what is not written shows.
    fn poison() {
        for megabytes in [1, 8, 64] {
            drop(Tensor::full([megabytes << 18], f64::NAN, (Kind::Float, CUDA)));
        }
    }

    /// Results and gradients in bf16 against float64; relative errors.
    pub(crate) fn check(
        inputs: &[Tensor],
        run: impl Fn(&[Tensor]) -> Tensor,
        reference: impl Fn(&[Tensor]) -> Tensor,
    ) {
        check_within(BF16_ERROR, inputs, run, reference);
    }

    fn check_within(
        error: f64,
        inputs: &[Tensor],
        run: impl Fn(&[Tensor]) -> Tensor,
        reference: impl Fn(&[Tensor]) -> Tensor,
    ) {
        let leaves = |kind: Option<Kind>| -> Vec<Tensor> {
            let leaf =
                |t: &Tensor| kind.map_or_else(|| t.copy(), |kind| t.to_kind(kind)).set_requires_grad(true);
            inputs.iter().map(leaf).collect()
        };
        let all = |leaves: &[Tensor], y: &Tensor, probe: &Tensor| {
            (y * probe.to_kind(y.kind())).sum(Kind::Float).backward();
            let grads = leaves.iter().map(Tensor::grad);
            std::iter::once(y.shallow_clone())
                .chain(grads)
                .map(|t| t.to_kind(Kind::Double))
                .collect::<Vec<_>>()
        };
        let exact_leaves = leaves(Some(Kind::Double));
        let exact = reference(&exact_leaves);
        let probe = draw(&exact.size());
        let exact = all(&exact_leaves, &exact, &probe);
        poison();
        let fast_leaves = leaves(None);
        let fast = all(&fast_leaves, &run(&fast_leaves), &probe);
        for (index, (fast, exact)) in fast.iter().zip(&exact).enumerate() {
            let gap = ((fast - exact).norm() / exact.norm()).double_value(&[]);
            assert!(gap < error, "{index}: {gap}");
        }
    }

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
    fn a_parameters_copy_is_kept_and_follows_it_whoever_writes() {
        let parameter = |seed| {
            let params = Params::new(CUDA, seed);
            let weight = params.add("w", &[40, 99], Init::Normal(1.0), Group::Decay);
            (params, weight)
        };
        let copy = |weight: &Tensor| {
            let copy = converted(weight, Kind::BFloat16);
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

    #[test]
    fn rotation_and_its_gradient_match_float64_and_heads_are_read_where_they_lie() {
        tch::manual_seed(6);
        for (heads, width) in [(1, 16), (14, 64), (3, 128)] {
            let angles = Tensor::randn([50, 1, width / 2], (Kind::Float, CUDA)) * 3.0;
            let angles = Tensor::cat(&[&angles, &angles], -1);
            let (cosines, sines) = (angles.cos(), angles.sin());
            let all = draw(&[50, heads + 2, width]);
            check(
                &[all],
                |t| rotate(&t[0].narrow(1, 1, heads), &cosines, &sines),
                |t| exact_rotation(&t[0].narrow(1, 1, heads), &cosines, &sines),
            );
        }
    }

    fn exact_rotation(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Tensor {
        let halves = x.chunk(2, -1);
        let partners = Tensor::cat(&[-&halves[1], halves[0].shallow_clone()], -1);
        x * cosines + partners * sines
    }

    #[test]
    fn turned_parts_and_their_joined_gradient_match_float64() {
        tch::manual_seed(9);
        for (heads, kv_heads, width) in [(1, 1, 16), (14, 2, 64), (3, 3, 128)] {
            let angles = Tensor::randn([50, 1, width / 2], (Kind::Float, CUDA)) * 3.0;
            let angles = Tensor::cat(&[&angles, &angles], -1);
            let (cosines, sines) = (angles.cos(), angles.sin());
            let all = draw(&[50, heads + 2 * kv_heads, width]);
            check(
                &[all],
                |t| {
                    let (q, k, v) = split_rotate(&t[0], heads, kv_heads, &cosines, &sines);
                    Tensor::cat(&[q, v, k], 1)
                },
                |t| {
                    let (q, k, v) = split_heads(&t[0], heads, kv_heads);
                    let turned = |x: &Tensor| exact_rotation(x, &cosines, &sines);
                    Tensor::cat(&[turned(&q), v, turned(&k)], 1)
                },
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
