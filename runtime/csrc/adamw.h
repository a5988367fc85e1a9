// The parameters that one launch of AdamW updates; read by fused.cpp and kernels.cu.

#pragma once

#include <cstdint>

struct AdamWBatch {
  // What fits into the 4 KB of a kernel's arguments.
  static constexpr int MOST = 64;
  // Values that a block updates.
  static constexpr int64_t CHUNK = 8192;

  float* params[MOST];
  // Copies of the parameters in bf16, null where there are none.
  void* copies[MOST];
  const float* grads[MOST];
  float* firsts[MOST];
  float* seconds[MOST];
  const float* steps[MOST];
  int64_t sizes[MOST];
  // The block after the last one of each parameter.
  int ends[MOST];
};

struct AdamWRates {
  float beta1, beta2, weight_decay, eps;
};
