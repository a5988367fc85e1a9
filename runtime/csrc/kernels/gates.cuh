// Gates.

#include "common.cuh"

// ---- SwiGLU: rows `[n, 2 f]` to `[n, f]`; the first half gates the second. A thread for each word of the result. ----

extern "C" __global__ void m6_swiglu(const bf16* gate_up, bf16* y, int64_t words, int f) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int64_t at = word * VECTOR, row = at / f, from = row * f + at;
  const Vector gate = load(gate_up + from);
  Vector up = load(gate_up + from + f);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) up.at[i] *= gate.at[i] * sigmoid(gate.at[i]);
  store(y + at, up);
}

extern "C" __global__ void m6_swiglu_grad(const bf16* dy, const bf16* gate_up, bf16* dgate_up, int64_t words, int f) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int64_t at = word * VECTOR, row = at / f, from = row * f + at;
  const Vector grad = load(dy + at);
  Vector gate = load(gate_up + from), up = load(gate_up + from + f);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float z = gate.at[i];
    gate.at[i] = grad.at[i] * up.at[i] * swish_slope(z);
    up.at[i] = grad.at[i] * z * sigmoid(z);
  }
  store(dgate_up + from, gate);
  store(dgate_up + from + f, up);
}

// ---- Rows `[n, k]` through a gate of their own, and what is added to them: `x sigmoid(gate) + y`. A warp for each row. ----

extern "C" __global__ void m6_gated_sum(
    const bf16* x, const bf16* gates, const bf16* y, bf16* sum, int64_t n, int k) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  if (row >= n) return;
  const float gate = sigmoid(__bfloat162float(gates[row]));
  for (int64_t at = row * k + threadIdx.x % WARP * VECTOR; at < (row + 1) * k; at += WARP * VECTOR) {
    Vector value = load(x + at);
    const Vector other = load(y + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) value.at[i] = value.at[i] * gate + other.at[i];
    store(sum + at, value);
  }
}

// The gradients of `x` and of the gates; that of `y` is `dsum`.
extern "C" __global__ void m6_gated_sum_grad(
    const bf16* dsum, const bf16* x, const bf16* gates, bf16* dx, bf16* dgates, int64_t n, int k) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  if (row >= n) return;
  const float gate = sigmoid(__bfloat162float(gates[row]));
  float product = 0;
  for (int64_t at = row * k + threadIdx.x % WARP * VECTOR; at < (row + 1) * k; at += WARP * VECTOR) {
    Vector grad = load(dsum + at);
    const Vector value = load(x + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      product += grad.at[i] * value.at[i];
      grad.at[i] *= gate;
    }
    store(dx + at, grad);
  }
  product = sum_of_lanes(product, WARP);
  if (threadIdx.x % WARP == 0) dgates[row] = __float2bfloat16(product * gate * (1.0f - gate));
}
