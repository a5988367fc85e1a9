// Products with float32 weights in bf16.

#include <torch/csrc/autograd/custom_function.h>

#include "copies.h"
#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The gradient of a parameter is left in bf16, in which tensor cores' products have it: half as much is written, and read
// for its norm and by AdamW. Where a later pass adds to it, that is done in float32.
bool is_parameter(const Tensor& weight) { return weight.is_leaf() && weight.requires_grad(); }

void allow_bf16_gradient(const Tensor& weight) {
  if (is_parameter(weight)) weight.set_grad_dtype(std::nullopt);
}

void widen_gradient(const Tensor& weight) {
  if (is_parameter(weight) && weight.grad().defined()) weight.mutable_grad() = weight.grad().to(at::kFloat);
}

// `x` `[.., i]` by float32 weights `[o, i]`, in bf16.
class LinearProduct : public torch::autograd::Function<LinearProduct> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    allow_bf16_gradient(weight);
    const Tensor w = in_bf16(weight);
    context->save_for_backward({x, weight, w});
    context->saved_data["has_bias"] = bias.has_value();
    return bias.has_value() ? at::linear(x, w, in_bf16(*bias)) : at::linear(x, w);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &w = saved[2];
    const Tensor dy = grads[0].reshape({-1, w.size(0)});
    widen_gradient(weight);
    const Tensor dx = context->needs_input_grad(0) ? at::mm(dy, w).view(x.sizes()) : Tensor();
    Tensor dweight;
    if (context->needs_input_grad(1)) {
      dweight = at::mm(dy.t(), x.reshape({-1, w.size(1)}), is_parameter(weight) ? at::kBFloat16 : at::kFloat);
    }
    const bool has_bias = context->saved_data["has_bias"].toBool();
    return {dx, dweight, has_bias ? dy.sum(0, /*keepdim=*/false, at::kFloat) : Tensor()};
  }
};

// Rows `[r, i]` sorted by expert, each by the float32 matrix `[o, i]` of its expert, in bf16. `ends` `[e]` is where the rows
// of each end.
class GroupedProduct : public torch::autograd::Function<GroupedProduct> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Tensor& ends) {
    allow_bf16_gradient(weight);
    const Tensor w = in_bf16(weight);
    context->save_for_backward({x, weight, w, ends});
    return at::_grouped_mm(x, w.transpose(1, 2), ends);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &w = saved[2], &ends = saved[3];
    const Tensor dy = grads[0].contiguous();
    widen_gradient(weight);
    const Tensor dx = context->needs_input_grad(0) ? at::_grouped_mm(dy, w, ends) : Tensor();
    const Tensor dweight = context->needs_input_grad(1) ? at::_grouped_mm(dy.t(), x, ends) : Tensor();
    return {dx, dweight, Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_linear(const Tensor* x, const Tensor* weight, const Tensor* bias, Tensor** out) {
  return guarded([&] {
    *out = new Tensor(LinearProduct::apply(*x, *weight, bias == nullptr ? std::nullopt : std::make_optional(*bias)));
  });
}

char* m6_grouped_linear(const Tensor* x, const Tensor* weight, const Tensor* ends, Tensor** out) {
  return guarded([&] { *out = new Tensor(GroupedProduct::apply(*x, *weight, *ends)); });
}

// For tests.
char* m6_in_bf16(const Tensor* weight, Tensor** out) {
  return guarded([&] { *out = new Tensor(in_bf16(*weight)); });
}

}  // extern "C"
