//! The functions of `csrc`, and the one place that turns their messages into errors.

use std::ffi::{CStr, c_char, c_int};

use tch::Tensor;
use torch_sys::C_tensor;

use crate::error::{Result, RuntimeError, first_line};

unsafe extern "C" {
    fn m6_free(message: *mut c_char);
    pub(crate) fn m6_keep_freed_memory();
    /// Of glibc.
    #[cfg(target_env = "gnu")]
    pub(crate) fn malloc_trim(pad: usize) -> std::ffi::c_int;
    pub(crate) fn m6_init_normal(tensor: *const C_tensor, std: f64, seed: u64) -> *mut c_char;
    pub(crate) fn m6_init_uniform(tensor: *const C_tensor, bound: f64, seed: u64) -> *mut c_char;
    pub(crate) fn m6_adamw(
        count: usize,
        params: *const *const C_tensor,
        grads: *const *const C_tensor,
        firsts: *const *const C_tensor,
        seconds: *const *const C_tensor,
        steps: *const *const C_tensor,
        streams: *const u32,
        lr: *const C_tensor,
        beta1: f64,
        beta2: f64,
        weight_decay: f64,
        eps: f64,
        norm: *const C_tensor,
        factor: *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_backward(
        count: usize,
        outputs: *const *const C_tensor,
        gradients: *const *const C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_clear_grads(count: usize, params: *const *const C_tensor) -> *mut c_char;
    pub(crate) fn m6_foreach_l2_norm(
        count: usize,
        tensors: *const *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_foreach_lerp(
        count: usize,
        averages: *const *const C_tensor,
        values: *const *const C_tensor,
        weight: f64,
    ) -> *mut c_char;
    pub(crate) fn m6_varlen_flash(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        cu_q: *const C_tensor,
        cu_k: *const C_tensor,
        max_q: i64,
        max_k: i64,
        causal: bool,
        window_left: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_causal_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        length: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_is_deterministic() -> bool;
    pub(crate) fn m6_linear_cross_entropy(
        hidden: *const C_tensor,
        weight: *const C_tensor,
        labels: *const C_tensor,
        total: *mut *mut C_tensor,
        losses: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_leaky_relu(x: *const C_tensor, slope: f64, out: *mut *mut C_tensor) -> *mut c_char;
    pub(crate) fn m6_upload(host: *const C_tensor, cuda_index: c_int, out: *mut *mut C_tensor)
    -> *mut c_char;
    pub(crate) fn m6_rng_state(cuda_index: c_int, out: *mut *mut C_tensor) -> *mut c_char;
    pub(crate) fn m6_set_rng_state(cuda_index: c_int, state: *const C_tensor) -> *mut c_char;
    pub(crate) fn m6_set_deterministic(on: bool) -> *mut c_char;
    pub(crate) fn m6_set_tf32(on: bool) -> *mut c_char;
    pub(crate) fn m6_device_memory(
        cuda_index: c_int,
        current: *mut i64,
        peak: *mut i64,
        reserved: *mut i64,
    ) -> *mut c_char;
}

#[cfg(feature = "cuda")]
unsafe extern "C" {
    pub(crate) fn m6_set_kernels(image: *const u8);
    pub(crate) fn m6_group_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        groups: i64,
        eps: f64,
        swish: bool,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_row_norm(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        eps: f64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_add_row_norm(
        x: *const C_tensor,
        residual: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        eps: f64,
        sum: *mut *mut C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        bias: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    #[cfg(test)]
    pub(crate) fn m6_in_bf16(weight: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    pub(crate) fn m6_rotate(
        x: *const C_tensor,
        cosines: *const C_tensor,
        sines: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_split_rotate(
        x: *const C_tensor,
        cosines: *const C_tensor,
        sines: *const C_tensor,
        heads: i64,
        kv_heads: i64,
        q: *mut *mut C_tensor,
        k: *mut *mut C_tensor,
        v: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_short_attention_longest() -> i64;
    pub(crate) fn m6_short_attention(
        q: *const C_tensor,
        k: *const C_tensor,
        v: *const C_tensor,
        starts: *const C_tensor,
        prefixes: *const C_tensor,
        longest: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_short_rotary_attention(
        qkv: *const C_tensor,
        cosines: *const C_tensor,
        sines: *const C_tensor,
        starts: *const C_tensor,
        prefixes: *const C_tensor,
        longest: i64,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_swiglu(gate_up: *const C_tensor, out: *mut *mut C_tensor) -> *mut c_char;
    pub(crate) fn m6_gated_sum(
        x: *const C_tensor,
        gates: *const C_tensor,
        y: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_graph_begin(device: i64, out: *mut *mut std::ffi::c_void) -> *mut c_char;
    pub(crate) fn m6_graph_end(recording: *mut std::ffi::c_void) -> *mut c_char;
    pub(crate) fn m6_graph_replay(recording: *mut std::ffi::c_void) -> *mut c_char;
    pub(crate) fn m6_graph_drop(recording: *mut std::ffi::c_void);
    pub(crate) fn m6_permute(
        x: *const C_tensor,
        tokens: *const C_tensor,
        rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_grouped_linear(
        x: *const C_tensor,
        weight: *const C_tensor,
        ends: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
    pub(crate) fn m6_unpermute(
        x: *const C_tensor,
        weights: *const C_tensor,
        order: *const C_tensor,
        rows: *const C_tensor,
        out: *mut *mut C_tensor,
    ) -> *mut c_char;
}

/// Turns the shim's answer into a result, freeing its message.
pub(crate) fn check(message: *mut c_char) -> Result<()> {
    if message.is_null() {
        return Ok(());
    }
    // SAFETY: a non-null answer is a NUL-terminated string that `strdup` made for us.
    let text = unsafe { CStr::from_ptr(message) }.to_string_lossy().into_owned();
    // SAFETY: freed once, by the allocator that made it.
    unsafe { m6_free(message) };
    Err(RuntimeError::Torch(first_line(&text)))
}

/// Takes ownership of a tensor that the shim made.
pub(crate) fn take(out: *mut C_tensor) -> Tensor {
    // SAFETY: called after a successful answer only; the shim allocated the tensor for us.
    unsafe { Tensor::from_ptr(out) }
}

/// The raw pointers of a list of tensors, valid while `tensors` is borrowed.
pub(crate) fn pointers(tensors: &[Tensor]) -> Vec<*const C_tensor> {
    tensors.iter().map(Tensor::as_ptr).collect()
}
