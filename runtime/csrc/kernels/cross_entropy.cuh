// Cross-entropy of rows of logits `[n, v]`, `stride` apart, and its gradient in their place.

#include "common.cuh"

namespace {

// The largest and the sum of exponentials less it, of the values so far.
struct Partition {
  float largest, sum;

  // Adds values `at ..` of those before `v`.
  __device__ void add(const Vector& values, int64_t at, int64_t v) {
    float above = largest;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) above = at + i < v ? fmaxf(above, values.at[i]) : above;
    sum *= __expf(largest - above);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum += at + i < v ? __expf(values.at[i] - above) : 0.0f;
    largest = above;
  }

  __device__ void merge(const Partition& other) {
    const float above = fmaxf(largest, other.largest);
    sum = sum * __expf(largest - above) + other.sum * __expf(other.largest - above);
    largest = above;
  }

  __device__ void merge_lanes() {
    for (int step = WARP / 2; step > 0; step /= 2) {
      merge({__shfl_xor_sync(ALL_LANES, largest, step), __shfl_xor_sync(ALL_LANES, sum, step)});
    }
  }
};

__device__ float log_sum_of(const Partition* parts, int count) {
  Partition total = parts[0];
  for (int i = 1; i < count; ++i) total.merge(parts[i]);
  return total.largest + __logf(total.sum);
}

// The gradient of logits `at ..`.
__device__ Vector gradient(Vector values, int64_t at, int64_t v, int64_t label, float log_sum, float weight) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float target = at + i == label ? 1.0f : 0.0f;
    values.at[i] = at + i < v ? weight * (__expf(values.at[i] - log_sum) - target) : 0.0f;
  }
  return values;
}

}  // namespace

// `losses[row]` is the row's cross-entropy; the logits become `weight * (softmax - one at the label)`. Words past v
// are padding: they are ignored and become zero. A block for each row.
extern "C" __global__ void m6_cross_entropy(
    bf16* logits, const int64_t* labels, float* losses, float weight, int64_t v, int64_t stride) {
  __shared__ Partition partitions[WARP];
  const int64_t row = blockIdx.x;
  bf16* own = logits + row * stride;
  const int64_t label = labels[row];
  Partition part{LOWEST, 0};
  for (int64_t at = threadIdx.x * VECTOR; at < v; at += blockDim.x * VECTOR) part.add(load(own + at), at, v);
  part.merge_lanes();
  if (threadIdx.x % WARP == 0) partitions[threadIdx.x / WARP] = part;
  const float at_label = __bfloat162float(own[label]);
  __syncthreads();
  const float log_sum = log_sum_of(partitions, blockDim.x / WARP);
  if (threadIdx.x == 0) losses[row] = log_sum - at_label;
  for (int64_t at = threadIdx.x * VECTOR; at < stride; at += blockDim.x * VECTOR) {
    store(own + at, gradient(load(own + at), at, v, label, log_sum, weight));
  }
}

// Multiplies `words` of four values by `factor`, by 1 without touching them.
extern "C" __global__ void m6_scale(float4* x, const float* factor, int64_t words) {
  const float by = *factor;
  if (by == 1.0f) return;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) {
    const float4 value = x[i];
    x[i] = {value.x * by, value.y * by, value.z * by, value.w * by};
  }
}
