//! Operations that are one or two kernels on a GPU in bf16 where libtorch has one a step. Elsewhere they are libtorch's
//! own, which define them.
//!
//! A norm or a gate moves far more bytes than it computes, so each pass over its input that is saved is time saved.

mod gate;
mod head;
#[cfg(feature = "cuda")]
pub(crate) mod kernels;
mod norm;
mod product;
mod rotary;
#[cfg(all(test, feature = "cuda"))]
pub(crate) mod testing;

use tch::Tensor;

pub use gate::{gated_sum, swiglu};
pub use head::linear_cross_entropy;
pub use norm::{add_layer_norm, add_rms_norm, group_norm, layer_norm, rms_norm};
pub use product::{grouped_linear, linear};
pub use rotary::{rotate, split_heads, split_rotate};

use crate::ffi;

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
