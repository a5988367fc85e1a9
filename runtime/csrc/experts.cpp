// Rows of tokens to their experts, and back.

#include <torch/csrc/autograd/custom_function.h>

#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// The (weighted) sum of the rows `[r, k]` of each token; `places` `[a, n]`.
Tensor sum_of_rows(const Tensor& rows, const Tensor& places, const void* weights) {
  const int64_t n = places.size(1), k = rows.size(1);
  const Tensor y = at::empty({n, k}, rows.options());
  launch(
      "m6_unpermute", {ceil_div(y.numel() / VECTOR, BLOCK), 1}, BLOCK, 0, bytes(rows), bytes(places), weights,
      mutable_bytes(y), n, static_cast<int>(places.size(0)), static_cast<int>(k));
  return y;
}

class Permute : public torch::autograd::Function<Permute> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& tokens, const Tensor& places) {
    context->save_for_backward({places});
    return x.index_select(0, tokens);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const Tensor places = context->get_saved_variables()[0];
    const c10::DeviceGuard guard(places.device());
    return {sum_of_rows(grads[0].contiguous(), places, nullptr), Tensor(), Tensor()};
  }
};

class Unpermute : public torch::autograd::Function<Unpermute> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& given, const Tensor& given_weights, const Tensor& order, const Tensor& places) {
    const c10::DeviceGuard guard(given.device());
    const Tensor rows = given.contiguous(), weights = dense(given_weights);
    context->save_for_backward({rows, weights, order});
    return sum_of_rows(rows, places, bytes(weights));
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &rows = saved[0], &weights = saved[1], &order = saved[2];
    const c10::DeviceGuard guard(rows.device());
    const Tensor dy = grads[0].contiguous();
    const Tensor drows = at::empty_like(rows), dweights = at::empty_like(weights);
    launch(
        "m6_unpermute_grad", {ceil_div(rows.size(0), BLOCK / WARP), 1}, BLOCK, 0, bytes(dy), bytes(rows), bytes(order),
        bytes(weights), mutable_bytes(drows), mutable_bytes(dweights), weights.size(0), static_cast<int>(weights.size(1)),
        static_cast<int>(rows.size(1)));
    return {drows, dweights, Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_permute(const Tensor* x, const Tensor* tokens, const Tensor* places, Tensor** out) {
  return guarded([&] { *out = new Tensor(Permute::apply(*x, *tokens, *places)); });
}

char* m6_unpermute(
    const Tensor* rows, const Tensor* weights, const Tensor* order, const Tensor* places, Tensor** out) {
  return guarded([&] { *out = new Tensor(Unpermute::apply(*rows, *weights, *order, *places)); });
}

}  // extern "C"
