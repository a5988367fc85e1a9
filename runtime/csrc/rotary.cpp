// Rotary positions and their gradients.

#include <torch/csrc/autograd/custom_function.h>

#include "copies.h"
#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Tensor rotated(const Tensor& x, const Tensor& cosines, const Tensor& sines, float turn) {
  const c10::DeviceGuard guard(x.device());
  const Tensor y = at::empty(x.sizes(), x.options());
  const int64_t words = x.numel() / 2 / VECTOR;
  launch(
      "m6_rotate", {ceil_div(words, BLOCK), 1}, BLOCK, 0, bytes(x), bytes(cosines), bytes(sines), mutable_bytes(y), words,
      static_cast<int>(x.size(1)), static_cast<int>(x.size(2)), x.stride(0), turn);
  return y;
}

class Rotate : public torch::autograd::Function<Rotate> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& given, const Tensor& cosines, const Tensor& sines) {
    context->save_for_backward({cosines, sines});
    return rotated(in_place_rows(given), cosines, sines, 1.0f);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    return {rotated(grads[0].contiguous(), saved[0], saved[1], -1.0f), Tensor(), Tensor()};
  }
};

// Queries `[n, h, k]`, keys and values `[n, g, k]` of `[n, h + 2 g, k]`, the first two turned.
class SplitRotate : public torch::autograd::Function<SplitRotate> {
 public:
  static variable_list forward(
      AutogradContext* context, const Tensor& given, const Tensor& cosines, const Tensor& sines, int64_t h, int64_t g) {
    const Tensor x = given.contiguous();
    const auto part = [&](int64_t begin, int64_t heads) { return x.narrow(1, begin, heads); };
    context->save_for_backward({cosines, sines});
    return {rotated(part(0, h), cosines, sines, 1.0f), rotated(part(h, g), cosines, sines, 1.0f), apart(part(h + g, g))};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const c10::DeviceGuard guard(saved[0].device());
    const Tensor dq = grads[0].contiguous(), dk = grads[1].contiguous(), dv = grads[2].contiguous();
    const int64_t h = dq.size(1), g = dk.size(1), k = dq.size(2);
    const Tensor dx = at::empty({dq.size(0), h + 2 * g, k}, dq.options());
    const int64_t words = dx.numel() / 2 / VECTOR;
    launch(
        "m6_join_rotated", {ceil_div(words, BLOCK), 1}, BLOCK, 0, bytes(dq), bytes(dk), bytes(dv), bytes(saved[0]),
        bytes(saved[1]), mutable_bytes(dx), words, static_cast<int>(h), static_cast<int>(g), static_cast<int>(k));
    return {dx, Tensor(), Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_rotate(const Tensor* x, const Tensor* cosines, const Tensor* sines, Tensor** out) {
  return guarded([&] { *out = new Tensor(Rotate::apply(*x, *cosines, *sines)); });
}

char* m6_split_rotate(
    const Tensor* x, const Tensor* cosines, const Tensor* sines, int64_t heads, int64_t kv_heads, Tensor** q, Tensor** k,
    Tensor** v) {
  return guarded([&] {
    const auto parts = SplitRotate::apply(*x, *cosines, *sines, heads, kv_heads);
    *q = new Tensor(parts[0]);
    *k = new Tensor(parts[1]);
    *v = new Tensor(parts[2]);
  });
}

}  // extern "C"
