// Copies in bf16 of float32 parameters, for products on a GPU. A copy is made at its first use, kept for as long as its
// parameter, and renewed where it lies when anything but AdamW has written to that; AdamW writes both.

#pragma once

#include <ATen/ATen.h>

// `weight`, a parameter or a part of one, in bf16. What is no parameter is converted and not kept.
at::Tensor in_bf16(const at::Tensor& weight);

// The values of the copy of `parameter`; null where there is none, or none as new as the parameter.
void* bf16_copy(const at::Tensor& parameter);

// Renews all copies, for those who use them without asking.
void renew_bf16_copies();

// A tensor on the memory of `view` that autograd takes for a tensor of its own.
at::Tensor apart(const at::Tensor& view);
