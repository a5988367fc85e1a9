// Rotary positions: each value of the first half of a head turned with its partner in the second.
//
// A thread for each word of a first half. `turn` is 1, or -1 for the gradient, which turns back.

#pragma once

#include "common.cuh"

namespace {

__device__ void rotate(Vector& first, Vector& second, const float* cosines, const float* sines, float turn) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float c = cosines[i], s = turn * sines[i];
    const float a = first.at[i], b = second.at[i];
    first.at[i] = a * c - b * s;
    second.at[i] = b * c + a * s;
  }
}

}  // namespace

// Heads `[n, h, k]`, the tokens of `x` `outer_stride` apart.
extern "C" __global__ void m6_rotate(
    const bf16* x, const float* cosines, const float* sines, bf16* y, int64_t words, int h, int k, int64_t outer_stride,
    float turn) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int half = k / 2, words_of_half = half / VECTOR;
  const int64_t head = word / words_of_half, token = head / h;
  const int at = static_cast<int>(word % words_of_half) * VECTOR;
  const int64_t from = token * outer_stride + head % h * k + at;
  Vector first = load(x + from), second = load(x + from + half);
  rotate(first, second, cosines + token * k + at, sines + token * k + at, turn);
  store(y + head * k + at, first);
  store(y + head * k + at + half, second);
}

// The gradient of queries `[n, h, k]`, keys and values `[n, g, k]`, of which the first two were turned, side by side:
// `[n, h + 2 g, k]`.
extern "C" __global__ void m6_join_rotated(
    const bf16* dq, const bf16* dk, const bf16* dv, const float* cosines, const float* sines, bf16* dx, int64_t words, int h,
    int g, int k) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int half = k / 2, words_of_half = half / VECTOR, heads = h + 2 * g;
  const int64_t row = word / words_of_half, token = row / heads;
  const int head = static_cast<int>(row % heads), at = static_cast<int>(word % words_of_half) * VECTOR;
  const bf16* from = head < h       ? dq + (token * h + head) * k
                     : head < h + g ? dk + (token * g + head - h) * k
                                    : dv + (token * g + head - h - g) * k;
  Vector first = load(from + at), second = load(from + at + half);
  if (head < h + g) rotate(first, second, cosines + token * k + at, sines + token * k + at, -1.0f);
  store(dx + row * k + at, first);
  store(dx + row * k + at + half, second);
}
