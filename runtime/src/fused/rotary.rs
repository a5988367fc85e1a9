//! Rotary positions.

use tch::{Kind, Tensor};

/// Rotary positions (Su et al. 2021) of heads `x` `[n, h, k]`: a value of the first half and its partner in the second
/// are turned by the angle of their token, whose `cosines` and `sines` are `[n, 1, k]` float32, both halves alike. Same
/// shape and dtype as `x`, computed in float32.
pub fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Tensor {
    #[cfg(feature = "cuda")]
    if calls::rotate_fits(x) {
        return calls::rotate(x, cosines, sines);
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
    if calls::rotate_fits(qkv) {
        return calls::split_rotate(qkv, heads, kv_heads, cosines, sines);
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

/// The calls of `csrc/rotary.cpp`.
#[cfg(feature = "cuda")]
mod calls {
    use std::ptr::null_mut;

    use tch::Tensor;

    use crate::ffi;
    use crate::fused::kernels::{VECTOR, is_bf16_on_gpu, made};

    pub(super) fn rotate_fits(x: &Tensor) -> bool {
        x.dim() == 3 && x.size()[2] % (2 * VECTOR) == 0 && is_bf16_on_gpu(x)
    }

    pub(super) fn rotate(x: &Tensor, cosines: &Tensor, sines: &Tensor) -> Tensor {
        let (cosines, sines) = (cosines.contiguous(), sines.contiguous());
        // SAFETY: live tensors that libtorch reads; the result is new.
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
}

/// Need a GPU; run with `cargo test --features cuda`.
#[cfg(all(test, feature = "cuda"))]
mod tests {
    use super::*;
    use crate::fused::testing::{CUDA, check, draw};

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
}
