// The parameters that one launch of AdamW updates; read by adamw.cpp and adamw.cuh.

#pragma once

#include <cstdint>

struct AdamWBatch {
  // What fits into the 4 KB of a kernel's arguments.
  static constexpr int MOST = 60;
  // Values that a block updates.
  static constexpr int64_t CHUNK = 8192;

  // float32 or bf16.
  void* params[MOST];
  // Copies of float32 parameters in bf16, null where there are none.
  void* copies[MOST];
  // float32 or bf16.
  const void* grads[MOST];
  // All float32 or all bf16.
  void* firsts[MOST];
  void* seconds[MOST];
  const float* steps[MOST];
  int64_t sizes[MOST];
  // Of the lots by which bf16 parameters are rounded.
  uint32_t streams[MOST];
  bool is_bf16[MOST];
  bool has_bf16_grad[MOST];
  // The block after the last one of each parameter.
  int ends[MOST];
};

struct AdamWRates {
  float beta1, beta2, weight_decay, eps;
};
