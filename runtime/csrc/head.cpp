// The output head and its loss.

#include <algorithm>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "ceil_div.h"
#include "guarded.h"
#ifdef M6_CUDA
#include "copies.h"
#include "launch.h"
#endif

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// Of some rows of one head: the losses, and the gradients of their mean over all `rows` rows of the batch.
struct Chunk {
  Tensor hidden, labels;
  // Written.
  Tensor losses, dhidden;
  int64_t rows;
};

#ifdef M6_CUDA
// bf16 rows of whole words on a GPU: a kernel makes the gradients where the logits lie.
class Kernels {
 public:
  // Of logits at once: little beside what a stack keeps, and few chunks, each of which rewrites the weights' gradient.
  static constexpr int64_t CHUNK_BYTES = int64_t{1} << 30;

  static bool fit(const Tensor& hidden) {
    return hidden.is_cuda() && hidden.scalar_type() == at::kBFloat16 && hidden.size(1) % VECTOR == 0;
  }

  explicit Kernels(const Tensor& weight) : table(in_bf16(weight).contiguous()) {}

  int64_t row_bytes() const { return stride() * table.element_size(); }

  void add(const Chunk& chunk, Tensor& dweight) {
    constexpr int64_t THREADS = 512;
    const int64_t count = chunk.hidden.size(0), v = table.size(0);
    // The first chunk is the largest.
    if (!buffer.defined()) buffer = at::empty({count, stride()}, table.options());
    Tensor logits = buffer.narrow(0, 0, count).narrow(1, 0, v);
    at::mm_out(logits, chunk.hidden, table.t());
    launch(
        "m6_cross_entropy", {count, 1}, THREADS, 0, mutable_bytes(logits), bytes(chunk.labels), mutable_bytes(chunk.losses),
        1.0f / static_cast<float>(chunk.rows), v, stride());
    if (!chunk.dhidden.defined()) return;
    Tensor dhidden = chunk.dhidden;
    at::mm_out(dhidden, logits, table);
    if (dweight.defined()) {
      at::addmm_out(dweight, dweight, logits.t(), chunk.hidden, at::kFloat);
    } else {
      dweight = at::mm(logits.t(), chunk.hidden, at::kFloat);
    }
  }

  // Without a pass over the gradients where the factor is 1.
  static void scale(Tensor& dweight, const Tensor& factor) {
    // Rows are whole words of bf16 values, so the weights are whole words of float32 ones.
    constexpr int64_t QUAD = 4;
    launch("m6_scale", {BLOCKS, 1}, BLOCK, 0, mutable_bytes(dweight), bytes(factor), dweight.numel() / QUAD);
  }

 private:
  int64_t stride() const { return ceil_div(table.size(0), VECTOR) * VECTOR; }

  Tensor table, buffer;
};
#endif

// Anywhere, by libtorch's own operations.
class Operations {
 public:
  // Of logits at once: products of so many rows take far longer than rewriting the weights' gradient.
  static constexpr int64_t CHUNK_BYTES = int64_t{1} << 26;

  Operations(const Tensor& weight, at::ScalarType kind) : table(weight.to(kind)) {}

  int64_t row_bytes() const { return table.size(0) * static_cast<int64_t>(sizeof(float)); }

  void add(const Chunk& chunk, Tensor& dweight) {
    Tensor logprobs = at::mm(chunk.hidden, table.t()).to(at::kFloat).log_softmax(1);
    const Tensor labels = chunk.labels.unsqueeze(1);
    chunk.losses.copy_(logprobs.gather(1, labels).squeeze(1).neg());
    if (!chunk.dhidden.defined()) return;
    const double share = 1.0 / static_cast<double>(chunk.rows);
    const Tensor dlogits = logprobs.exp_().mul_(share);
    dlogits.scatter_(1, labels, dlogits.gather(1, labels) - share);
    const Tensor d = dlogits.to(table.scalar_type());
    Tensor dhidden = chunk.dhidden;
    at::mm_out(dhidden, d, table);
    const Tensor part = at::mm(d.t(), chunk.hidden).to(at::kFloat);
    dweight = dweight.defined() ? dweight.add_(part) : part;
  }

 private:
  Tensor table;
};

// All rows, some at a time.
template <typename How>
void add_all(How how, const Chunk& all, Tensor& dweight) {
  constexpr int64_t CHUNK_ALIGN = 128;
  const int64_t most = std::max(How::CHUNK_BYTES / how.row_bytes() / CHUNK_ALIGN, int64_t{1}) * CHUNK_ALIGN;
  const int64_t size = ceil_div(ceil_div(all.rows, ceil_div(all.rows, most)), CHUNK_ALIGN) * CHUNK_ALIGN;
  for (int64_t begin = 0; begin < all.rows; begin += size) {
    const int64_t count = std::min(size, all.rows - begin);
    const auto some = [&](const Tensor& tensor) { return tensor.defined() ? tensor.narrow(0, begin, count) : tensor; };
    how.add({some(all.hidden), some(all.labels), some(all.losses), some(all.dhidden), all.rows}, dweight);
  }
}

// Cross-entropy of `hidden weight^T`, whose logits are there for some rows at a time only. Their gradients are made in the
// forward pass, so that no product is computed twice; the backward pass scales what they came to.
class LinearCrossEntropy : public torch::autograd::Function<LinearCrossEntropy> {
 public:
  // The mean, and the loss of each row, which has no gradient.
  static variable_list forward(
      AutogradContext* context, const Tensor& given, const Tensor& weight, const Tensor& labels, bool with_gradient) {
    const c10::OptionalDeviceGuard guard(given.device());
    // The gradient of weights in bf16 adds up in float32.
    if (weight.is_leaf() && weight.requires_grad()) weight.set_grad_dtype(std::nullopt);
    const Tensor hidden = given.contiguous();
    const Tensor losses = at::empty({hidden.size(0)}, hidden.options().dtype(at::kFloat));
    const Tensor dhidden = with_gradient ? at::empty_like(hidden) : Tensor();
    const Chunk all{hidden, labels.contiguous(), losses, dhidden, hidden.size(0)};
    Tensor dweight;
#ifdef M6_CUDA
    if (Kernels::fit(hidden)) {
      add_all(Kernels(weight), all, dweight);
    } else
#endif
    {
      add_all(Operations(weight, hidden.scalar_type()), all, dweight);
    }
    context->save_for_backward({dhidden, dweight});
    context->mark_non_differentiable({losses});
    return {losses.mean(), losses};
  }

  // In place: the graph is gone through once.
  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor& dhidden = saved[0];
    Tensor dweight = saved[1];
    const c10::OptionalDeviceGuard guard(dhidden.device());
#ifdef M6_CUDA
    if (Kernels::fit(dhidden)) {
      Kernels::scale(dweight, grads[0]);
    } else
#endif
    {
      dweight.mul_(grads[0]);
    }
    return {dhidden * grads[0].to(dhidden.scalar_type()), dweight, Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_linear_cross_entropy(
    const Tensor* hidden, const Tensor* weight, const Tensor* labels, Tensor** total, Tensor** losses) {
  return guarded([&] {
    // Asked here, since a function's own forward pass runs without gradients.
    const bool with_gradient = at::GradMode::is_enabled() && (hidden->requires_grad() || weight->requires_grad());
    const auto results = LinearCrossEntropy::apply(*hidden, *weight, *labels, with_gradient);
    *total = new Tensor(results[0]);
    *losses = new Tensor(results[1]);
  });
}

}  // extern "C"
