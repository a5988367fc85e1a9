// How kernels are launched, and what their callers share. Compiled with the feature `cuda` only.

#pragma once

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>

#include <string>

#include "ceil_div.h"

// bf16 values of a 16-byte word, as in the kernels.
constexpr int64_t VECTOR = 8;
constexpr int64_t WARP = 32;
constexpr int64_t BLOCK = 256;
// Blocks that keep every multiprocessor of today's GPUs busy to the end.
constexpr int64_t BLOCKS = 2048;

struct Grid {
  int64_t x, y;
};

// Launches the kernel `name`, whose arguments `pointers` point to, on the current stream of the current device.
void launch_with(const std::string& name, Grid grid, int64_t threads, int64_t shared_bytes, void** pointers);

template <typename... Arguments>
void launch(const std::string& name, Grid grid, int64_t threads, int64_t shared_bytes, Arguments... arguments) {
  void* pointers[] = {static_cast<void*>(&arguments)...};
  launch_with(name, grid, threads, shared_bytes, pointers);
}

// Bytes of shared memory that a block of the current device can have.
int64_t most_shared_bytes();

// Blocks of so many threads and bytes of shared memory that the current device runs at once, as far as these decide.
int64_t blocks_at_once(int64_t threads, int64_t shared_bytes);

inline const void* bytes(const at::Tensor& tensor) { return tensor.const_data_ptr(); }
inline void* mutable_bytes(const at::Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Weights as the kernels read them.
inline at::Tensor dense(const at::Tensor& weight) { return weight.to(at::kFloat).contiguous(); }

// Heads `[n, h, k]` that lie close together in rows of something wider, and anything contiguous, are read in place.
inline at::Tensor in_place_rows(const at::Tensor& x) {
  const bool heads = x.dim() == 3 && x.stride(2) == 1 && x.stride(1) == x.size(2) && x.stride(0) % VECTOR == 0;
  return heads ? x : x.contiguous();
}
