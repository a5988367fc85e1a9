// The C++ half of m6-runtime: ATen functions that tch does not bind.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include <climits>
#include <cstdlib>
#include <mutex>
#include <tuple>
#include <vector>

#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "gather.h"
#include "guarded.h"

namespace {

at::Device device_of(int cuda_index) {
  return cuda_index < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda_index));
}

}  // namespace

extern "C" {

void m6_free(char* message) { std::free(message); }

void m6_keep_freed_memory() {
#ifdef __GLIBC__
  mallopt(M_MMAP_MAX, 0);
  mallopt(M_TRIM_THRESHOLD, INT_MAX);
  mallopt(M_TOP_PAD, 64 << 20);
#endif
}

char* m6_init_normal(at::Tensor* tensor, double std, uint64_t seed) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    tensor->normal_(0.0, std, at::detail::createCPUGenerator(seed));
  });
}

char* m6_init_uniform(at::Tensor* tensor, double bound, uint64_t seed) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    tensor->uniform_(-bound, bound, at::detail::createCPUGenerator(seed));
  });
}

char* m6_backward(size_t count, at::Tensor* const* outputs, at::Tensor* const* gradients) {
  return guarded([&] { torch::autograd::backward(gather(outputs, count), gather(gradients, count)); });
}

char* m6_clear_grads(size_t count, at::Tensor* const* params) {
  return guarded([&] {
    for (size_t i = 0; i < count; ++i) params[i]->mutable_grad().reset();
  });
}

char* m6_foreach_l2_norm(size_t count, at::Tensor* const* tensors, at::Tensor** out) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    // In two lists, since one of two dtypes goes through kernels one by one.
    std::vector<at::Tensor> floats, others, norms;
    for (const auto& tensor : gather(tensors, count)) {
      (tensor.scalar_type() == at::kFloat ? floats : others).push_back(tensor);
    }
    for (const auto& list : {floats, others}) {
      if (list.empty()) continue;
      const auto made = at::_foreach_norm(list, 2, at::kFloat);
      norms.insert(norms.end(), made.begin(), made.end());
    }
    *out = new at::Tensor(at::stack(norms).norm());
  });
}

char* m6_foreach_lerp(size_t count, at::Tensor* const* averages, at::Tensor* const* values, double weight) {
  return guarded([&] {
    c10::NoGradGuard no_grad;
    at::_foreach_lerp_(gather(averages, count), gather(values, count), weight);
  });
}

char* m6_varlen_flash(
    const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, const at::Tensor* cu_q, const at::Tensor* cu_k,
    int64_t max_q, int64_t max_k, bool causal, int64_t window_left, at::Tensor** out) {
  return guarded([&] {
    // A negative number is no limit.
    auto left = window_left < 0 ? std::nullopt : std::make_optional(window_left);
    auto result = at::_flash_attention_forward(
        *q, *k, *v, *cu_q, *cu_k, max_q, max_k, /*dropout_p=*/0.0, causal, /*return_debug_mask=*/false,
        /*scale=*/std::nullopt, left);
    *out = new at::Tensor(std::get<0>(result));
  });
}

char* m6_causal_attention(
    const at::Tensor* q, const at::Tensor* k, const at::Tensor* v, int64_t length, at::Tensor** out) {
  return guarded([&] {
    const auto examples = [&](const at::Tensor& heads) {
      return heads.view({-1, length, heads.size(1), heads.size(2)}).transpose(1, 2);
    };
    const bool with_gradient = at::GradMode::is_enabled() && (q->requires_grad() || k->requires_grad() || v->requires_grad());
    const auto result = at::_scaled_dot_product_cudnn_attention(
        examples(*q), examples(*k), examples(*v), /*attn_bias=*/std::nullopt, with_gradient, /*dropout_p=*/0.0,
        /*is_causal=*/true);
    *out = new at::Tensor(std::get<0>(result).transpose(1, 2).flatten(0, 1));
  });
}

bool m6_is_deterministic() { return at::globalContext().deterministicAlgorithms(); }

char* m6_leaky_relu(const at::Tensor* x, double slope, at::Tensor** out) {
  return guarded([&] { *out = new at::Tensor(at::leaky_relu(*x, slope)); });
}

char* m6_upload(const at::Tensor* host, int cuda_index, at::Tensor** out) {
  return guarded([&] {
    *out = new at::Tensor(host->pin_memory().to(device_of(cuda_index), /*non_blocking=*/true));
  });
}

char* m6_rng_state(int cuda_index, at::Tensor** out) {
  return guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(cuda_index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    *out = new at::Tensor(generator.get_state());
  });
}

char* m6_set_rng_state(int cuda_index, const at::Tensor* state) {
  return guarded([&] {
    auto generator = at::globalContext().defaultGenerator(device_of(cuda_index));
    std::lock_guard<std::mutex> lock(generator.mutex());
    generator.set_state(*state);
  });
}

char* m6_set_deterministic(bool on) {
  return guarded([&] {
    at::globalContext().setDeterministicAlgorithms(on, /*warn_only=*/false);
    at::globalContext().setDeterministicFillUninitializedMemory(false);
    at::globalContext().setDeterministicCuDNN(on);
  });
}

char* m6_set_tf32(bool on) {
  return guarded([&] {
    at::globalContext().setAllowTF32CuBLAS(on);
    at::globalContext().setAllowTF32CuDNN(on);
  });
}

char* m6_device_memory(int cuda_index, int64_t* current, int64_t* peak, int64_t* reserved) {
  return guarded([&] {
    auto* allocator = at::getDeviceAllocator(at::kCUDA);
    auto stats = allocator->getDeviceStats(static_cast<c10::DeviceIndex>(cuda_index));
    const auto all = static_cast<size_t>(c10::CachingAllocator::StatType::AGGREGATE);
    *current = stats.allocated_bytes[all].current;
    *peak = stats.allocated_bytes[all].peak;
    *reserved = stats.reserved_bytes[all].peak;
  });
}

}  // extern "C"
