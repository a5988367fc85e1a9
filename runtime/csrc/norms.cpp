// Group and root-mean-square norms and their gradients.

#include <algorithm>

#include <torch/csrc/autograd/custom_function.h>

#include "guarded.h"
#include "launch.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// How the group norm kernels cut `[b, t, c]`.
struct Cut {
  int64_t b, t, c, chunks, threads, shared_bytes;

  explicit Cut(const Tensor& x) : b(x.size(0)), t(x.size(2) * x.size(3)), c(x.size(1)) {
    const int64_t lanes = c / VECTOR;
    const int64_t rows = std::max<int64_t>(1, BLOCK / lanes);
    // Positions for each thread, so that what a block does once is little beside them.
    constexpr int64_t MIN_POSITIONS = 8;
    chunks = std::clamp<int64_t>(ceil_div(BLOCKS, b), 1, ceil_div(t, rows * MIN_POSITIONS));
    threads = lanes * rows;
    shared_bytes = rows * 2 * c * static_cast<int64_t>(sizeof(float));
  }

  Grid grid() const { return {chunks, b}; }
};

class GroupNorm : public torch::autograd::Function<GroupNorm> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& given, const Tensor& weight, const Tensor& bias, int64_t groups, double eps,
      bool swish) {
    const c10::DeviceGuard guard(given.device());
    const Tensor x = given.contiguous(at::MemoryFormat::ChannelsLast);
    const Tensor w = dense(weight), offset = dense(bias);
    const Cut cut(x);
    const auto floats = x.options().dtype(at::kFloat);
    const Tensor sums = at::empty({cut.b, cut.chunks, groups, 2}, floats);
    const Tensor moments = at::empty({cut.b, groups, 2}, floats);
    const Tensor y = at::empty_like(x, at::MemoryFormat::ChannelsLast);
    const int c = static_cast<int>(cut.c), g = static_cast<int>(groups);
    launch("m6_group_norm_sums", cut.grid(), cut.threads, cut.shared_bytes, bytes(x), mutable_bytes(sums), cut.t, c, g);
    launch(
        "m6_group_norm_moments", {cut.b, 1}, groups * WARP, 0, bytes(x), bytes(sums), mutable_bytes(moments), cut.t, c, g,
        static_cast<int>(cut.chunks), static_cast<float>(eps));
    launch(
        "m6_group_norm_apply", cut.grid(), cut.threads, 0, bytes(x), bytes(moments), bytes(w), bytes(offset),
        mutable_bytes(y), cut.t, c, g, static_cast<int>(swish));
    context->save_for_backward({x, w, offset, moments});
    context->saved_data["groups"] = groups;
    context->saved_data["swish"] = swish;
    return y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1], &bias = saved[2], &moments = saved[3];
    const c10::DeviceGuard guard(x.device());
    const int64_t groups = context->saved_data["groups"].toInt();
    const int swish = static_cast<int>(context->saved_data["swish"].toBool());
    const Tensor dy = grads[0].to(x.scalar_type()).contiguous(at::MemoryFormat::ChannelsLast);
    const Cut cut(x);
    const Tensor sums = at::empty({cut.b, cut.chunks, 2, cut.c}, weight.options());
    const Tensor channel_sums = at::empty({cut.b, 2, cut.c}, weight.options());
    const Tensor means = at::empty({cut.b, groups, 2}, weight.options());
    const Tensor dx = at::empty_like(x, at::MemoryFormat::ChannelsLast);
    const int c = static_cast<int>(cut.c), g = static_cast<int>(groups);
    launch(
        "m6_group_norm_grad_sums", cut.grid(), cut.threads, cut.shared_bytes, bytes(dy), bytes(x), bytes(moments),
        bytes(weight), bytes(bias), mutable_bytes(sums), cut.t, c, g, swish);
    launch(
        "m6_group_norm_grad_means", {cut.b, 1}, BLOCK, 2 * cut.c * static_cast<int64_t>(sizeof(float)), bytes(sums),
        bytes(weight), mutable_bytes(channel_sums), mutable_bytes(means), cut.t, c, g, static_cast<int>(cut.chunks));
    launch(
        "m6_group_norm_grad_apply", cut.grid(), cut.threads, 0, bytes(dy), bytes(x), bytes(moments), bytes(means),
        bytes(weight), bytes(bias), mutable_bytes(dx), cut.t, c, g, swish);
    const Tensor total = channel_sums.sum(0);
    return {dx, total[1], total[0], Tensor(), Tensor(), Tensor()};
  }
};

// How the RMS norm kernels lie over rows: `lanes` threads for each, some lanes of a warp or whole warps.
struct Rows {
  int64_t n, k, lanes, inner, outer_stride, threads;

  explicit Rows(const Tensor& x) : k(x.size(-1)) {
    n = x.numel() / k;
    lanes = 1;
    while (lanes < WARP && lanes * VECTOR < k) lanes *= 2;
    if (lanes == WARP) lanes = ceil_div(k, VECTOR * WARP) * WARP;
    inner = x.dim() == 3 ? x.size(1) : 1;
    outer_stride = x.dim() == 3 ? x.stride(0) : k;
    threads = lanes * std::max<int64_t>(1, BLOCK / lanes);
  }

  int64_t rows_of_block() const { return threads / lanes; }
};

// The sums that were normed and the result. Without a residual the sums are the input.
struct Normed {
  Tensor sum, y;
};

Normed rms_norm(const Tensor& given, const Tensor& residual, const Tensor& weight, double eps) {
  const Tensor x = residual.defined() ? given.contiguous() : in_place_rows(given);
  const Rows rows(x);
  const Tensor y = at::empty(x.sizes(), x.options());
  const Tensor sum = residual.defined() ? at::empty(x.sizes(), x.options()) : x;
  launch(
      "m6_rms_norm", {ceil_div(rows.n, rows.rows_of_block()), 1}, rows.threads, 0, bytes(x),
      residual.defined() ? bytes(residual) : nullptr, bytes(weight), residual.defined() ? mutable_bytes(sum) : nullptr,
      mutable_bytes(y), rows.n, static_cast<int>(rows.k), static_cast<int>(rows.lanes), static_cast<int>(rows.inner),
      rows.outer_stride, static_cast<float>(eps));
  return {sum, y};
}

// `[n, k]` float32 to `[k]`.
Tensor sum_of_rows(const Tensor& rows) {
  const int64_t n = rows.size(0), k = rows.size(1);
  const Tensor sums = at::empty({k}, rows.options());
  launch(
      "m6_sum_rows", {ceil_div(k, WARP), 1}, WARP * WARP, 0, bytes(rows), mutable_bytes(sums), static_cast<int>(n),
      static_cast<int>(k));
  return sums;
}

struct NormGrads {
  Tensor x, weight;
};

// `dsum` is what reaches the sums past the norm, if anything.
NormGrads rms_norm_grad(const Tensor& given, const Tensor& dsum, const Tensor& x, const Tensor& weight, double eps) {
  const Tensor dy = given.to(x.scalar_type()).contiguous();
  const Tensor past = dsum.defined() ? dsum.to(x.scalar_type()).contiguous() : Tensor();
  const Rows rows(x);
  const Tensor dx = at::empty(x.sizes(), x.options());
  // Every block leaves a row of weight gradients behind.
  constexpr int64_t GRAD_BLOCKS = 512;
  const int64_t blocks = std::min(ceil_div(rows.n, rows.rows_of_block()), GRAD_BLOCKS);
  const Tensor dweights = at::empty({blocks, rows.k}, weight.options());
  launch(
      "m6_rms_norm_grad", {blocks, 1}, rows.threads,
      rows.rows_of_block() * rows.k * static_cast<int64_t>(sizeof(float)), bytes(dy),
      past.defined() ? bytes(past) : nullptr, bytes(x), bytes(weight), mutable_bytes(dx), mutable_bytes(dweights), rows.n,
      static_cast<int>(rows.k), static_cast<int>(rows.lanes), static_cast<int>(rows.inner), rows.outer_stride,
      static_cast<float>(eps));
  return {dx, sum_of_rows(dweights)};
}

class RmsNorm : public torch::autograd::Function<RmsNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, double eps) {
    const c10::DeviceGuard guard(x.device());
    const Tensor w = dense(weight);
    const Normed normed = rms_norm(x, Tensor(), w, eps);
    context->save_for_backward({normed.sum, w});
    context->saved_data["eps"] = eps;
    return normed.y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const c10::DeviceGuard guard(saved[0].device());
    const NormGrads made = rms_norm_grad(grads[0], Tensor(), saved[0], saved[1], context->saved_data["eps"].toDouble());
    return {made.x, made.weight, Tensor()};
  }
};

class AddRmsNorm : public torch::autograd::Function<AddRmsNorm> {
 public:
  // The sum and its norm.
  static variable_list forward(
      AutogradContext* context, const Tensor& x, const Tensor& residual, const Tensor& weight, double eps) {
    const c10::DeviceGuard guard(x.device());
    const Tensor w = dense(weight);
    const Normed normed = rms_norm(x, residual.contiguous(), w, eps);
    context->save_for_backward({normed.sum, w});
    context->saved_data["eps"] = eps;
    context->set_materialize_grads(false);
    return {normed.sum, normed.y};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const c10::DeviceGuard guard(saved[0].device());
    if (!grads[1].defined()) return {grads[0], grads[0], Tensor(), Tensor()};
    const NormGrads made = rms_norm_grad(grads[1], grads[0], saved[0], saved[1], context->saved_data["eps"].toDouble());
    return {made.x, made.x, made.weight, Tensor()};
  }
};

}  // namespace

extern "C" {

char* m6_group_norm(
    const Tensor* x, const Tensor* weight, const Tensor* bias, int64_t groups, double eps, bool swish, Tensor** out) {
  return guarded([&] { *out = new Tensor(GroupNorm::apply(*x, *weight, *bias, groups, eps, swish)); });
}

char* m6_rms_norm(const Tensor* x, const Tensor* weight, double eps, Tensor** out) {
  return guarded([&] { *out = new Tensor(RmsNorm::apply(*x, *weight, eps)); });
}

char* m6_add_rms_norm(
    const Tensor* x, const Tensor* residual, const Tensor* weight, double eps, Tensor** sum, Tensor** out) {
  return guarded([&] {
    const auto results = AddRmsNorm::apply(*x, *residual, *weight, eps);
    *sum = new Tensor(results[0]);
    *out = new Tensor(results[1]);
  });
}

}  // extern "C"
