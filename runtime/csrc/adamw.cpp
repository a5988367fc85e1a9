// Launches AdamW over many parameters.

#include "kernels/adamw.h"

#include <c10/core/GradMode.h>

#include "copies.h"
#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;

void adamw(
    size_t count, Tensor* const* params, Tensor* const* grads, Tensor* const* firsts, Tensor* const* seconds,
    Tensor* const* steps, const AdamWRates& rates, const Tensor& lr, const Tensor& norm, const Tensor& factor) {
  const c10::DeviceGuard guard(norm.device());
  std::vector<Tensor> counters, kept;
  AdamWBatch batch;
  size_t filled = 0;
  const at::ScalarType moments = firsts[0]->scalar_type();
  TORCH_CHECK(moments == at::kFloat || moments == at::kBFloat16, "AdamW needs moments in float32 or bf16");
  const char* const kernel = moments == at::kFloat ? "m6_adamw" : "m6_adamw_bf16_moments";
  for (size_t i = 0; i < count; ++i) counters.push_back(*steps[i]);
  at::_foreach_add_(counters, std::vector<Tensor>(count, norm.isfinite().to(at::kFloat)));
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i]->numel();
    const auto of = [&](const Tensor& tensor, at::ScalarType type) {
      TORCH_CHECK(tensor.scalar_type() == type && tensor.is_contiguous(), "AdamW needs dense ", type);
      TORCH_CHECK(tensor.numel() == size, "AdamW needs parameters and moments of one size");
      return mutable_bytes(tensor);
    };
    kept.push_back(grads[i]->contiguous());
    const Tensor& grad = kept.back();
    const bool has_bf16_grad = grad.scalar_type() == at::kBFloat16;
    TORCH_CHECK(has_bf16_grad || grad.scalar_type() == at::kFloat, "AdamW needs gradients in float32 or bf16");
    TORCH_CHECK(grad.numel() == size, "AdamW needs parameters and gradients of one size");
    batch.params[filled] = static_cast<float*>(of(*params[i], at::kFloat));
    batch.copies[filled] = bf16_copy(*params[i]);
    batch.grads[filled] = bytes(grad);
    batch.has_bf16_grad[filled] = has_bf16_grad;
    batch.firsts[filled] = of(*firsts[i], moments);
    batch.seconds[filled] = of(*seconds[i], moments);
    batch.steps[filled] = static_cast<const float*>(bytes(*steps[i]));
    batch.sizes[filled] = size;
    batch.ends[filled] = static_cast<int>((filled == 0 ? 0 : batch.ends[filled - 1]) + ceil_div(size, AdamWBatch::CHUNK));
    ++filled;
    if (filled == AdamWBatch::MOST || i + 1 == count) {
      launch(kernel, {batch.ends[filled - 1], 1}, BLOCK, 0, batch, rates, bytes(lr), bytes(norm), bytes(factor));
      filled = 0;
    }
  }
}

}  // namespace

extern "C" {

char* m6_adamw(
    size_t count, Tensor* const* params, Tensor* const* grads, Tensor* const* firsts, Tensor* const* seconds,
    Tensor* const* steps, const Tensor* lr, double beta1, double beta2, double weight_decay, double eps,
    const Tensor* norm, const Tensor* factor) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const auto narrow = [](double value) { return static_cast<float>(value); };
    const AdamWRates rates{narrow(beta1), narrow(beta2), narrow(weight_decay), narrow(eps)};
    adamw(count, params, grads, firsts, seconds, steps, rates, *lr, *norm, *factor);
  });
}

}  // extern "C"
