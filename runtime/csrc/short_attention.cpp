// Attention over short examples and its gradient.

#include "kernels/short_attention.h"

#include <torch/csrc/autograd/custom_function.h>

#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

Heads heads(const Tensor& x) { return {const_cast<void*>(bytes(x)), x.stride(0)}; }

// What both passes read: queries, keys and values `[n, h, 64]` as views of wherever they lie, and of the examples where
// they begin, their prefixes and the tokens of the longest.
struct Inputs {
  Tensor q, k, v, cosines, sines, starts, prefixes;
  int64_t longest;

  // `running` blocks fit at once.
  ShortAttention with(const Tensor& out, const Tensor& log_sums, int64_t running) const {
    const auto floats = [](const Tensor& x) { return x.defined() ? static_cast<const float*>(bytes(x)) : nullptr; };
    const auto numbers = [](const Tensor& x) { return static_cast<const int*>(bytes(x)); };
    return {
        heads(q), heads(k), heads(v), floats(cosines), floats(sines), numbers(starts), numbers(prefixes), heads(out),
        static_cast<float*>(mutable_bytes(log_sums)), q.size(0), static_cast<int>(q.size(1)), static_cast<int>(blocks()),
        static_cast<int>(running)};
  }

  int64_t blocks() const { return prefixes.numel() * q.size(1); }
  int64_t rows() const { return ceil_div(longest, ROWS_STEP) * ROWS_STEP; }

  int64_t threads(int64_t most, int64_t rows_of_warp) const {
    return std::min(most, ceil_div(longest, rows_of_warp) * WARP);
  }
};

constexpr int64_t ROW_BYTES = HEAD_WIDTH * 2;

// Queries, keys and values.
int64_t shared_bytes(int64_t rows) { return 3 * rows * ROW_BYTES; }

// With results, their gradients, and two numbers for each row.
int64_t grad_shared_bytes(int64_t rows) {
  constexpr int64_t NUMBERS_BYTES = 2 * sizeof(float);
  return rows * (5 * ROW_BYTES + NUMBERS_BYTES);
}

struct Attended {
  Tensor out, log_sums;
};

Attended attention(const Inputs& inputs) {
  const Tensor out = at::empty(inputs.q.sizes(), inputs.q.options());
  const Tensor log_sums = at::empty({inputs.q.size(1), inputs.q.size(0)}, inputs.q.options().dtype(at::kFloat));
  // Two tiles for a warp, one with many keys to see and one with few.
  const int64_t threads = inputs.threads(ATTENTION_THREADS, 2 * ROWS_OF_WARP);
  launch(
      "m6_short_attention", {inputs.blocks(), 1}, threads, shared_bytes(inputs.rows()),
      inputs.with(out, log_sums, inputs.blocks()));
  return {out, log_sums};
}

// Writes the gradients of queries, keys and values to `dq`, `dk` and `dv`.
void attention_grad(
    const Inputs& inputs, const Attended& attended, const Tensor& dout, const Tensor& dq, const Tensor& dk,
    const Tensor& dv) {
  const ShortAttentionGrads grads{heads(dout), heads(dq), heads(dk), heads(dv)};
  const int64_t threads = inputs.threads(ATTENTION_GRAD_THREADS, ROWS_OF_WARP);
  const int64_t needed = grad_shared_bytes(inputs.rows());
  launch(
      "m6_short_attention_grad", {inputs.blocks(), 1}, threads, needed,
      inputs.with(attended.out, attended.log_sums, blocks_at_once(threads, needed)), grads);
}

class Apart : public torch::autograd::Function<Apart> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& starts,
      const Tensor& prefixes, int64_t longest) {
    const c10::DeviceGuard guard(q.device());
    const Inputs inputs{
        in_place_rows(q), in_place_rows(k), in_place_rows(v), Tensor(), Tensor(), starts, prefixes, longest};
    const Attended made = attention(inputs);
    context->save_for_backward({inputs.q, inputs.k, inputs.v, starts, prefixes, made.out, made.log_sums});
    context->saved_data["longest"] = longest;
    return made.out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const c10::DeviceGuard guard(saved[0].device());
    const Inputs inputs{saved[0], saved[1],  saved[2], Tensor(),
                        Tensor(), saved[3], saved[4], context->saved_data["longest"].toInt()};
    const auto made = [&] { return at::empty(inputs.q.sizes(), inputs.q.options()); };
    const Tensor dq = made(), dk = made(), dv = made();
    attention_grad(inputs, {saved[5], saved[6]}, in_place_rows(grads[0]), dq, dk, dv);
    return {dq, dk, dv, Tensor(), Tensor(), Tensor()};
  }
};

// Of queries, keys and values side by side, `[n, 3 h, 64]`, the first two to be turned.
class Together : public torch::autograd::Function<Together> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& given, const Tensor& cosines, const Tensor& sines, const Tensor& starts,
      const Tensor& prefixes, int64_t longest) {
    const c10::DeviceGuard guard(given.device());
    const Tensor qkv = given.contiguous();
    const Attended made = attention(inputs(qkv, cosines, sines, starts, prefixes, longest));
    context->save_for_backward({qkv, cosines, sines, starts, prefixes, made.out, made.log_sums});
    context->saved_data["longest"] = longest;
    return made.out;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor& qkv = saved[0];
    const c10::DeviceGuard guard(qkv.device());
    const Tensor dqkv = at::empty(qkv.sizes(), qkv.options());
    const int64_t longest = context->saved_data["longest"].toInt();
    attention_grad(
        inputs(qkv, saved[1], saved[2], saved[3], saved[4], longest), {saved[5], saved[6]}, in_place_rows(grads[0]),
        part(dqkv, 0), part(dqkv, 1), part(dqkv, 2));
    return {dqkv, Tensor(), Tensor(), Tensor(), Tensor(), Tensor()};
  }

 private:
  static Tensor part(const Tensor& x, int64_t index) {
    const int64_t h = x.size(1) / 3;
    return x.narrow(1, index * h, h);
  }

  static Inputs inputs(
      const Tensor& qkv, const Tensor& cosines, const Tensor& sines, const Tensor& starts, const Tensor& prefixes,
      int64_t longest) {
    return {part(qkv, 0), part(qkv, 1), part(qkv, 2), cosines, sines, starts, prefixes, longest};
  }
};

}  // namespace

extern "C" {

int64_t m6_short_attention_longest() {
  static const int64_t longest = [] {
    int64_t rows = 0;
    while (grad_shared_bytes(rows + ROWS_STEP) <= most_shared_bytes()) rows += ROWS_STEP;
    return rows;
  }();
  return longest;
}

char* m6_short_attention(
    const Tensor* q, const Tensor* k, const Tensor* v, const Tensor* starts, const Tensor* prefixes, int64_t longest,
    Tensor** out) {
  return guarded([&] { *out = new Tensor(Apart::apply(*q, *k, *v, *starts, *prefixes, longest)); });
}

char* m6_short_rotary_attention(
    const Tensor* qkv, const Tensor* cosines, const Tensor* sines, const Tensor* starts, const Tensor* prefixes,
    int64_t longest, Tensor** out) {
  return guarded([&] { *out = new Tensor(Together::apply(*qkv, *cosines, *sines, *starts, *prefixes, longest)); });
}

}  // extern "C"
