// What the kernels share: words of eight bf16 values, and sums over the lanes of a warp.

#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int VECTOR = 8;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;
// Below all that occurs, and finite, so that the difference of two of them is a number.
constexpr float LOWEST = -1e30f;

using bf16 = __nv_bfloat16;

// Eight values of a word, `uint4`.
struct Vector {
  float at[VECTOR];
};

// Two values as the halves of a number.
__device__ unsigned pair(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const unsigned*>(&both);
}

__device__ Vector unpack(const uint4& word) {
  const unsigned pairs[] = {word.x, word.y, word.z, word.w};
  Vector vector;
#pragma unroll
  for (int i = 0; i < VECTOR; i += 2) {
    // A bf16 is the upper half of a float32.
    vector.at[i] = __uint_as_float(pairs[i / 2] << 16);
    vector.at[i + 1] = __uint_as_float(pairs[i / 2] & 0xffff0000);
  }
  return vector;
}

__device__ uint4 pack(const Vector& vector) {
  return {
      pair(vector.at[0], vector.at[1]), pair(vector.at[2], vector.at[3]), pair(vector.at[4], vector.at[5]),
      pair(vector.at[6], vector.at[7])};
}

__device__ Vector load(const bf16* source) { return unpack(*reinterpret_cast<const uint4*>(source)); }

__device__ void store(bf16* target, const Vector& vector) { *reinterpret_cast<uint4*>(target) = pack(vector); }

struct alignas(8) Half {
  __nv_bfloat162 low, high;
};

// Half a word.
__device__ float4 load_four(const bf16* source) {
  const Half half = *reinterpret_cast<const Half*>(source);
  const float2 low = __bfloat1622float2(half.low), high = __bfloat1622float2(half.high);
  return {low.x, low.y, high.x, high.y};
}

__device__ float4 load_four(const float* source) { return *reinterpret_cast<const float4*>(source); }

__device__ void store(float* target, const float4& values) { *reinterpret_cast<float4*>(target) = values; }

__device__ void store(bf16* target, const float4& values) {
  const Half half{__floats2bfloat162_rn(values.x, values.y), __floats2bfloat162_rn(values.z, values.w)};
  *reinterpret_cast<Half*>(target) = half;
}

__device__ float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }

__device__ float sigmoid(float z) { return 1.0f / (1.0f + __expf(-z)); }

// The gradient of swish, z * sigmoid(z).
__device__ float swish_slope(float z) {
  const float gate = sigmoid(z);
  return gate * (1.0f + z * (1.0f - gate));
}

__device__ float sum_of_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

}  // namespace
