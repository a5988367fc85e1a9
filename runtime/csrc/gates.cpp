// Gates and their gradients.

#include <torch/csrc/autograd/custom_function.h>

#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

class SwiGlu : public torch::autograd::Function<SwiGlu> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& given) {
    const c10::DeviceGuard guard(given.device());
    const Tensor gate_up = given.contiguous();
    auto sizes = gate_up.sizes().vec();
    sizes.back() /= 2;
    const Tensor y = at::empty(sizes, gate_up.options());
    const int64_t words = y.numel() / VECTOR;
    launch(
        "m6_swiglu", {ceil_div(words, BLOCK), 1}, BLOCK, 0, bytes(gate_up), mutable_bytes(y), words,
        static_cast<int>(sizes.back()));
    context->save_for_backward({gate_up});
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Tensor gate_up = context->get_saved_variables()[0];
    const c10::DeviceGuard guard(gate_up.device());
    const Tensor dy = grads[0].to(gate_up.scalar_type()).contiguous();
    const Tensor dgate_up = at::empty_like(gate_up);
    const int64_t words = dy.numel() / VECTOR;
    launch(
        "m6_swiglu_grad", {ceil_div(words, BLOCK), 1}, BLOCK, 0, bytes(dy), bytes(gate_up), mutable_bytes(dgate_up), words,
        static_cast<int>(dy.size(-1)));
    return {dgate_up};
  }
};

class GatedSum : public torch::autograd::Function<GatedSum> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& given, const Tensor& given_gates, const Tensor& other) {
    const c10::DeviceGuard guard(given.device());
    const Tensor x = given.contiguous(), gates = given_gates.contiguous(), y = other.contiguous();
    const Tensor sum = at::empty_like(x);
    launch(
        "m6_gated_sum", grid(gates), BLOCK, 0, bytes(x), bytes(gates), bytes(y), mutable_bytes(sum), gates.numel(),
        static_cast<int>(x.size(1)));
    context->save_for_backward({x, gates});
    return sum;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &gates = saved[1];
    const c10::DeviceGuard guard(x.device());
    const Tensor dsum = grads[0].contiguous();
    const Tensor dx = at::empty_like(x), dgates = at::empty_like(gates);
    launch(
        "m6_gated_sum_grad", grid(gates), BLOCK, 0, bytes(dsum), bytes(x), bytes(gates), mutable_bytes(dx),
        mutable_bytes(dgates), gates.numel(), static_cast<int>(x.size(1)));
    return {dx, dgates, grads[0]};
  }

 private:
  static Grid grid(const Tensor& gates) { return {ceil_div(gates.numel(), BLOCK / WARP), 1}; }
};

}  // namespace

extern "C" {

char* m6_swiglu(const Tensor* gate_up, Tensor** out) {
  return guarded([&] { *out = new Tensor(SwiGlu::apply(*gate_up)); });
}

char* m6_gated_sum(const Tensor* x, const Tensor* gates, const Tensor* y, Tensor** out) {
  return guarded([&] { *out = new Tensor(GatedSum::apply(*x, *gates, *y)); });
}

}  // extern "C"
