// The output head and its loss.

#include <algorithm>

#include <torch/csrc/autograd/custom_function.h>

#include "copies.h"
#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Cross-entropy of `hidden weight^T`, whose logits are there for some rows at a time only. Their gradients are made where
// they lie, in the forward pass, so that no product is computed twice; the backward pass scales what they came to.
class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  // The weighted sum, and the loss of each row, which has no gradient.
  static variable_list forward(
      AutogradContext* context, const Tensor& given, const Tensor& weight, const Tensor& labels, const Tensor& row_weights,
      bool with_gradient) {
    // Bytes of logits at once: little beside what a stack keeps, and few parts, each of which rewrites the weights' gradient.
    constexpr int64_t CHUNK_BYTES = int64_t{1} << 30;
    constexpr int64_t CHUNK_ALIGN = 128;
    constexpr int64_t THREADS = 512;
    const c10::DeviceGuard guard(given.device());
    const Tensor hidden = given.contiguous();
    const Tensor table = in_bf16(weight).contiguous();
    const Tensor weights = dense(row_weights), targets = labels.contiguous();
    const int64_t rows = hidden.size(0), v = table.size(0);
    const int64_t stride = ceil_div(v, VECTOR) * VECTOR;
    const int64_t most = std::max(CHUNK_BYTES / (stride * hidden.element_size()) / CHUNK_ALIGN, int64_t{1}) * CHUNK_ALIGN;
    const int64_t chunk = ceil_div(ceil_div(rows, ceil_div(rows, most)), CHUNK_ALIGN) * CHUNK_ALIGN;
    const auto floats = hidden.options().dtype(at::kFloat);
    const Tensor losses = at::empty({rows}, floats);
    const Tensor dhidden = with_gradient ? at::empty_like(hidden) : Tensor();
    Tensor dweight;
    const Tensor buffer = at::empty({std::min(rows, chunk), stride}, hidden.options());
    for (int64_t begin = 0; begin < rows; begin += chunk) {
      const int64_t count = std::min(chunk, rows - begin);
      const Tensor h = hidden.narrow(0, begin, count);
      Tensor logits = buffer.narrow(0, 0, count).narrow(1, 0, v);
      at::mm_out(logits, h, table.t());
      launch(
          "m6_cross_entropy", {count, 1}, THREADS, 0, mutable_bytes(logits), bytes(targets.narrow(0, begin, count)),
          bytes(weights.narrow(0, begin, count)), mutable_bytes(losses.narrow(0, begin, count)), v, stride);
      if (!with_gradient) continue;
      Tensor dh = dhidden.narrow(0, begin, count);
      at::mm_out(dh, logits, table);
      if (dweight.defined()) {
        at::addmm_out(dweight, dweight, logits.t(), h, at::kFloat);
      } else {
        dweight = at::mm(logits.t(), h, at::kFloat);
      }
    }
    context->save_for_backward({dhidden, dweight});
    const Tensor total = losses.dot(weights);
    context->mark_non_differentiable({losses});
    return {total, losses};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &dhidden = saved[0], &dweight = saved[1];
    const c10::DeviceGuard guard(dhidden.device());
    // Rows are whole words of bf16 values, so the weights are whole words of float32 ones.
    constexpr int64_t QUAD = 4;
    // In place: the graph is gone through once.
    launch("m6_scale", {BLOCKS, 1}, BLOCK, 0, mutable_bytes(dweight), bytes(grads[0]), dweight.numel() / QUAD);
    return {dhidden * grads[0].to(dhidden.scalar_type()), dweight, Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_linear_cross_entropy(
    const Tensor* hidden, const Tensor* weight, const Tensor* labels, const Tensor* row_weights, Tensor** total,
    Tensor** losses) {
  return guarded([&] {
    // Asked here, since a function's own forward pass runs without gradients.
    const bool with_gradient = at::GradMode::is_enabled() && (hidden->requires_grad() || weight->requires_grad());
    const auto results = LinearCrossEntropy::apply(*hidden, *weight, *labels, *row_weights, with_gradient);
    *total = new Tensor(results[0]);
    *losses = new Tensor(results[1]);
  });
}

}  // extern "C"
