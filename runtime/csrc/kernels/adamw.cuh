// AdamW (Loshchilov and Hutter 2019) of parameters in float32 or bf16, whose gradients are scaled by `factor` first, with
// moments in float32 or bf16. Where a float32 parameter has a copy in bf16, that follows.

#include "common.cuh"
#include "../rounding.h"
#include "adamw.h"

namespace {

struct AdamWStep {
  AdamWRates rates;
  // `corrected_lr` takes the bias of the first moment into account, `root_correction` that of the second.
  float factor, lr, corrected_lr, root_correction;

  __device__ void update(float& param, float grad, float& first, float& second) const {
    grad *= factor;
    param -= lr * rates.weight_decay * param;
    first += (1.0f - rates.beta1) * (grad - first);
    second = rates.beta2 * second + (1.0f - rates.beta2) * grad * grad;
    param -= corrected_lr * first / (sqrtf(second) / root_correction + rates.eps);
  }

  __device__ void update(float4& param, const float4& grad, float4& first, float4& second) const {
    update(param.x, grad.x, first.x, second.x);
    update(param.y, grad.y, first.y, second.y);
    update(param.z, grad.z, first.z, second.z);
    update(param.w, grad.w, first.w, second.w);
  }
};

// Where a parameter is written: float32, with its copy in bf16 if there is one, or bf16 alone, rounded by lot.
struct Float32Params {
  float* params;
  bf16* copies;

  __device__ float4 load(int64_t i) const { return load_four(params + i); }
  __device__ void keep(int64_t i, const float4& values) const {
    store(params + i, values);
    if (copies != nullptr) store(copies + i, values);
  }
  __device__ float load_one(int64_t i) const { return params[i]; }
  __device__ void keep_one(int64_t i, float value) const {
    params[i] = value;
    if (copies != nullptr) copies[i] = value;
  }
};

struct Bf16Params {
  bf16* params;
  rounding::Lots lots;

  __device__ unsigned upper_half(int64_t i, float value) const {
    return rounding::rounded(__float_as_uint(value), lots(i)) >> 16;
  }
  __device__ float4 load(int64_t i) const { return load_four(params + i); }
  __device__ void keep(int64_t i, const float4& values) const {
    const uint2 word{
        upper_half(i, values.x) | upper_half(i + 1, values.y) << 16,
        upper_half(i + 2, values.z) | upper_half(i + 3, values.w) << 16};
    *reinterpret_cast<uint2*>(params + i) = word;
  }
  __device__ float load_one(int64_t i) const { return params[i]; }
  __device__ void keep_one(int64_t i, float value) const {
    params[i] = __ushort_as_bfloat16(static_cast<unsigned short>(upper_half(i, value)));
  }
};

// What a block updates of one parameter.
template <class Moment>
struct AdamWChunk {
  int64_t begin, end;
  const float* grads;
  // In place of `grads`, unless null.
  const bf16* bf16_grads;
  Moment* firsts;
  Moment* seconds;

  template <class Params>
  __device__ void update(const AdamWStep& step, const Params& params) const {
    constexpr int QUAD = 4;
    const int64_t quads = begin + (end - begin) / QUAD * QUAD;
    for (int64_t i = begin + threadIdx.x * QUAD; i < quads; i += blockDim.x * QUAD) {
      float4 param = params.load(i), first = load_four(firsts + i), second = load_four(seconds + i);
      const float4 grad = bf16_grads == nullptr ? load_four(grads + i) : load_four(bf16_grads + i);
      step.update(param, grad, first, second);
      params.keep(i, param);
      store(firsts + i, first);
      store(seconds + i, second);
    }
    for (int64_t i = quads + threadIdx.x; i < end; i += blockDim.x) {
      float param = params.load_one(i), first = firsts[i], second = seconds[i];
      step.update(param, bf16_grads == nullptr ? grads[i] : static_cast<float>(bf16_grads[i]), first, second);
      params.keep_one(i, param);
      firsts[i] = first;
      seconds[i] = second;
    }
  }
};

// Nothing changes where the norm of all gradients, `norm`, is no finite number.
template <class Moment>
__device__ void adamw(
    const AdamWBatch& batch, const AdamWRates& rates, const double* rate, const float* norm, const float* factor) {
  if (!isfinite(*norm)) return;
  int index = 0;
  while (static_cast<int>(blockIdx.x) >= batch.ends[index]) ++index;
  const int first_block = index == 0 ? 0 : batch.ends[index - 1];
  const int64_t begin = (blockIdx.x - first_block) * AdamWBatch::CHUNK;
  const bool has_bf16_grad = batch.has_bf16_grad[index];
  const AdamWChunk<Moment> chunk{
      begin,
      min(begin + AdamWBatch::CHUNK, batch.sizes[index]),
      static_cast<const float*>(batch.grads[index]),
      has_bf16_grad ? static_cast<const bf16*>(batch.grads[index]) : nullptr,
      static_cast<Moment*>(batch.firsts[index]),
      static_cast<Moment*>(batch.seconds[index])};
  const float steps = *batch.steps[index];
  const float correction = 1.0f - powf(rates.beta1, steps);
  const float lr = static_cast<float>(*rate);
  const AdamWStep step{rates, *factor, lr, lr / correction, sqrtf(1.0f - powf(rates.beta2, steps))};
  void* const params = batch.params[index];
  if (batch.is_bf16[index]) {
    const rounding::Lots lots(batch.streams[index], static_cast<uint32_t>(steps));
    chunk.update(step, Bf16Params{static_cast<bf16*>(params), lots});
  } else {
    chunk.update(step, Float32Params{static_cast<float*>(params), static_cast<bf16*>(batch.copies[index])});
  }
}

}  // namespace

extern "C" __global__ void m6_adamw(
    const __grid_constant__ AdamWBatch batch, AdamWRates rates, const double* rate, const float* norm,
    const float* factor) {
  adamw<float>(batch, rates, rate, norm, factor);
}

extern "C" __global__ void m6_adamw_bf16_moments(
    const __grid_constant__ AdamWBatch batch, AdamWRates rates, const double* rate, const float* norm,
    const float* factor) {
  adamw<bf16>(batch, rates, rate, norm, factor);
}
