// AdamW (Loshchilov and Hutter 2019) of float32 parameters, whose gradients are scaled by `factor` first, with moments in
// float32 or bf16. Where a parameter has a copy in bf16, that follows.

#include "common.cuh"
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

// Nothing changes where the norm of all gradients, `norm`, is no finite number.
template <class Moment>
__device__ void adamw(
    const AdamWBatch& batch, const AdamWRates& rates, const double* rate, const float* norm, const float* factor) {
  if (!isfinite(*norm)) return;
  int index = 0;
  while (static_cast<int>(blockIdx.x) >= batch.ends[index]) ++index;
  const int first_block = index == 0 ? 0 : batch.ends[index - 1];
  const int64_t begin = (blockIdx.x - first_block) * AdamWBatch::CHUNK;
  const int64_t end = min(begin + AdamWBatch::CHUNK, batch.sizes[index]);
  float* const params = batch.params[index];
  bf16* const copies = static_cast<bf16*>(batch.copies[index]);
  const float* const grads = static_cast<const float*>(batch.grads[index]);
  const bf16* const bf16_grads = batch.has_bf16_grad[index] ? static_cast<const bf16*>(batch.grads[index]) : nullptr;
  Moment* const firsts = static_cast<Moment*>(batch.firsts[index]);
  Moment* const seconds = static_cast<Moment*>(batch.seconds[index]);
  const float steps = *batch.steps[index];
  const float correction = 1.0f - powf(rates.beta1, steps);
  const float lr = static_cast<float>(*rate);
  const AdamWStep step{rates, *factor, lr, lr / correction, sqrtf(1.0f - powf(rates.beta2, steps))};
  constexpr int QUAD = 4;
  const int64_t quads = begin + (end - begin) / QUAD * QUAD;
  for (int64_t i = begin + threadIdx.x * QUAD; i < quads; i += blockDim.x * QUAD) {
    float4 param = load_four(params + i), first = load_four(firsts + i), second = load_four(seconds + i);
    const float4 grad = bf16_grads == nullptr ? load_four(grads + i) : load_four(bf16_grads + i);
    step.update(param, grad, first, second);
    store(params + i, param);
    if (copies != nullptr) store(copies + i, param);
    store(firsts + i, first);
    store(seconds + i, second);
  }
  for (int64_t i = quads + threadIdx.x; i < end; i += blockDim.x) {
    float first = firsts[i], second = seconds[i];
    step.update(params[i], bf16_grads == nullptr ? grads[i] : static_cast<float>(bf16_grads[i]), first, second);
    if (copies != nullptr) copies[i] = params[i];
    firsts[i] = first;
    seconds[i] = second;
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
