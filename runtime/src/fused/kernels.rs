//! The image of our kernels, and what all calls of them share.

use std::ptr::null_mut;
use std::sync::Once;

use tch::{Kind, Tensor};
use torch_sys::C_tensor;

use crate::error::Result;
use crate::ffi;

/// Values in a 16-byte word; rows consist of whole ones.
pub(crate) const VECTOR: i64 = 8;

/// The driver reads the image as words.
#[repr(align(16))]
struct Aligned<T: ?Sized>(T);
static IMAGE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

pub(crate) fn is_bf16_on_gpu(x: &Tensor) -> bool {
    x.device().is_cuda() && x.kind() == Kind::BFloat16 && x.numel() > 0
}

/// Makes the kernels known, before the first of them is launched.
pub(crate) fn load() {
    static LOADED: Once = Once::new();
    // SAFETY: the image is static.
    LOADED.call_once(|| unsafe { ffi::m6_set_kernels(IMAGE.0.as_ptr()) });
}

/// The tensor that `call` made.
pub(crate) fn try_made(call: impl FnOnce(*mut *mut C_tensor) -> *mut std::ffi::c_char) -> Result<Tensor> {
    load();
    let mut out = null_mut();
    ffi::check(call(&mut out))?;
    Ok(ffi::take(out))
}

/// The same. Panics where tch's own operations would: when the device fails or has no memory.
pub(crate) fn made(call: impl FnOnce(*mut *mut C_tensor) -> *mut std::ffi::c_char) -> Tensor {
    try_made(call).unwrap_or_else(|error| panic!("{error}"))
}
