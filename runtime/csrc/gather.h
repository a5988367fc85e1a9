// Lists of tensors as Rust hands them over.

#pragma once

#include <ATen/ATen.h>

#include <vector>

inline std::vector<at::Tensor> gather(at::Tensor* const* tensors, size_t count) {
  std::vector<at::Tensor> list;
  list.reserve(count);
  for (size_t i = 0; i < count; ++i) list.push_back(*tensors[i]);
  return list;
}
