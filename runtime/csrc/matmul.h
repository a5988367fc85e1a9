// Matrix products in bf16 on a GPU by the fastest of the kernels that give the same bits.

#pragma once

#include <ATen/ATen.h>

#include <optional>

// Writes `a b` to `out` `[m, n]`, with a `bias` `[n]` added to each row if there is one; `a` `[m, k]`, `b` `[k, n]`, all bf16.
//
// cuBLAS decides by the shape alone which of its kernels computes a product, and is often a tenth off. So a large product
// that comes again is timed, once, with every kernel that cuBLASLt suggests, and the fastest is kept. Only those take part
// whose results are those of the first choice to the bit (they add up in the same order, in tiles of other shapes): what a
// timing says can then not change a run.
void product_out(
    const at::Tensor& out, const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt);

inline at::Tensor product(
    const at::Tensor& a, const at::Tensor& b, const std::optional<at::Tensor>& bias = std::nullopt) {
  const at::Tensor out = at::empty({a.size(0), b.size(1)}, a.options());
  product_out(out, a, b, bias);
  return out;
}
