// AdamW of many parameters: kernels on a GPU, libtorch's own elsewhere.

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <bit>
#include <vector>

#include "gather.h"
#include "guarded.h"
#include "rounding.h"
#ifdef M6_CUDA
#include "copies.h"
#include "kernels/adamw.h"
#include "launch.h"
#endif

namespace {

using at::Tensor;

// What a call updates, one entry for each parameter.
struct Batch {
  std::vector<Tensor> params, grads, firsts, seconds, steps;
  // Of the lots by which bf16 parameters are rounded.
  const uint32_t* streams;
};

struct Rates {
  double beta1, beta2, weight_decay, eps;
};

#ifdef M6_CUDA
void by_kernels(const Batch& all, const Rates& rates, const Tensor& lr, const Tensor& norm, const Tensor& factor) {
  const c10::DeviceGuard guard(norm.device());
  const size_t count = all.params.size();
  AdamWBatch batch;
  size_t filled = 0;
  const at::ScalarType moments = all.firsts[0].scalar_type();
  TORCH_CHECK(moments == at::kFloat || moments == at::kBFloat16, "AdamW needs moments in float32 or bf16");
  const char* const kernel = moments == at::kFloat ? "m6_adamw" : "m6_adamw_bf16_moments";
  const auto narrow = [](double value) { return static_cast<float>(value); };
  const AdamWRates narrow_rates{
      narrow(rates.beta1), narrow(rates.beta2), narrow(rates.weight_decay), narrow(rates.eps)};
  at::_foreach_add_(all.steps, std::vector<Tensor>(count, norm.isfinite().to(at::kFloat)));
  // Whether it is bf16.
  const auto checked = [](const Tensor& tensor, int64_t size) {
    const bool is_bf16 = tensor.scalar_type() == at::kBFloat16;
    TORCH_CHECK(is_bf16 || tensor.scalar_type() == at::kFloat, "AdamW needs float32 or bf16");
    TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == size, "AdamW needs dense tensors of one size");
    return is_bf16;
  };
  std::vector<Tensor> kept;
  for (size_t i = 0; i < count; ++i) {
    const Tensor& param = all.params[i];
    const int64_t size = param.numel();
    kept.push_back(all.grads[i].contiguous());
    const Tensor& grad = kept.back();
    for (const Tensor* moment : {&all.firsts[i], &all.seconds[i]}) {
      checked(*moment, size);
      TORCH_CHECK(moment->scalar_type() == moments, "AdamW needs moments of one dtype");
    }
    batch.is_bf16[filled] = checked(param, size);
    batch.has_bf16_grad[filled] = checked(grad, size);
    batch.params[filled] = mutable_bytes(param);
    batch.copies[filled] = bf16_copy(param);
    batch.streams[filled] = all.streams[i];
    batch.grads[filled] = bytes(grad);
    batch.firsts[filled] = mutable_bytes(all.firsts[i]);
    batch.seconds[filled] = mutable_bytes(all.seconds[i]);
    batch.steps[filled] = static_cast<const float*>(bytes(all.steps[i]));
    batch.sizes[filled] = size;
    batch.ends[filled] = static_cast<int>((filled == 0 ? 0 : batch.ends[filled - 1]) + ceil_div(size, AdamWBatch::CHUNK));
    ++filled;
    if (filled == AdamWBatch::MOST || i + 1 == count) {
      launch(
          kernel, {batch.ends[filled - 1], 1}, BLOCK, 0, batch, narrow_rates, bytes(lr), bytes(norm), bytes(factor));
      filled = 0;
    }
  }
}
#endif

// `values`, float32, rounded by lot into `target`, bf16.
void keep_rounded(const Tensor& target, const Tensor& values, const rounding::Lots& lots) {
  TORCH_CHECK(target.is_cpu() && target.is_contiguous(), "weights in bf16 need the feature `cuda` on a GPU");
  const float* const source = values.const_data_ptr<float>();
  at::BFloat16* const rounded = target.mutable_data_ptr<at::BFloat16>();
  for (int64_t i = 0; i < target.numel(); ++i) {
    const uint32_t bits = rounding::rounded(std::bit_cast<uint32_t>(source[i]), lots(i));
    rounded[i] = at::BFloat16(static_cast<uint16_t>(bits >> 16), at::BFloat16::from_bits());
  }
}

void by_libtorch(const Batch& all, const Rates& rates, const Tensor& lr, const Tensor& norm, const Tensor& factor) {
  // It wants all in one dtype.
  const auto in_float = [](std::vector<Tensor> tensors) {
    for (Tensor& tensor : tensors) tensor = tensor.to(at::kFloat);
    return tensors;
  };
  const auto params = in_float(all.params), grads = in_float(all.grads);
  const auto firsts = in_float(all.firsts), seconds = in_float(all.seconds);
  at::_foreach_mul_(grads, factor);
  const Tensor is_bad = norm.isfinite().logical_not().to(at::kFloat);
  at::_foreach_add_(all.steps, 1);
  at::_fused_adamw_(
      params, grads, firsts, seconds, {}, all.steps, lr.item<double>(), rates.beta1, rates.beta2, rates.weight_decay,
      rates.eps, /*amsgrad=*/false, /*maximize=*/false, /*grad_scale=*/{}, is_bad);
  at::_foreach_copy_(all.firsts, firsts);
  at::_foreach_copy_(all.seconds, seconds);
  at::_foreach_sub_(all.steps, std::vector<Tensor>(all.steps.size(), is_bad));
  for (size_t i = 0; i < params.size(); ++i) {
    if (all.params[i].scalar_type() == at::kFloat) continue;
    keep_rounded(all.params[i], params[i], {all.streams[i], static_cast<uint32_t>(all.steps[i].item<float>())});
  }
}

}  // namespace

extern "C" {

char* m6_adamw(
    size_t count, Tensor* const* params, Tensor* const* grads, Tensor* const* firsts, Tensor* const* seconds,
    Tensor* const* steps, const uint32_t* streams, const Tensor* lr, double beta1, double beta2, double weight_decay,
    double eps, const Tensor* norm, const Tensor* factor) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const Batch batch{
        gather(params, count), gather(grads, count), gather(firsts, count), gather(seconds, count),
        gather(steps, count),  streams};
    const Rates rates{beta1, beta2, weight_decay, eps};
#ifdef M6_CUDA
    if (norm->is_cuda()) return by_kernels(batch, rates, *lr, *norm, *factor);
#endif
    by_libtorch(batch, rates, *lr, *norm, *factor);
  });
}

}  // extern "C"
