// Group, root-mean-square and layer norms and their gradients.

#include <algorithm>
#include <optional>
#include <utility>

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

// How the kernels of norms over rows lie over them: `lanes` threads for each, some lanes of a warp or whole warps.
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

// A root-mean-square norm, or with a bias a layer norm.
struct Norm {
  Tensor weight, bias;
  double eps;

  bool is_layer_norm() const { return bias.defined(); }
};

// The sums that were normed and the result. Without a residual the sums are the input.
struct Normed {
  Tensor sum, y;
};

Normed row_norm(const Tensor& given, const Tensor& residual, const Norm& norm) {
  const Tensor x = residual.defined() ? given.contiguous() : in_place_rows(given);
  const Rows rows(x);
  const Tensor y = at::empty(x.sizes(), x.options());
  const Tensor sum = residual.defined() ? at::empty(x.sizes(), x.options()) : x;
  launch(
      norm.is_layer_norm() ? "m6_layer_norm" : "m6_rms_norm", {ceil_div(rows.n, rows.rows_of_block()), 1}, rows.threads, 0,
      bytes(x), residual.defined() ? bytes(residual) : nullptr, bytes(norm.weight),
      norm.is_layer_norm() ? bytes(norm.bias) : nullptr, residual.defined() ? mutable_bytes(sum) : nullptr,
      mutable_bytes(y), rows.n, static_cast<int>(rows.k), static_cast<int>(rows.lanes), static_cast<int>(rows.inner),
      rows.outer_stride, static_cast<float>(norm.eps));
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

// The bias has one in a layer norm.
struct NormGrads {
  Tensor x, weight, bias;
};

// `dsum` is what reaches the sums past the norm, if anything.
NormGrads row_norm_grad(const Tensor& given, const Tensor& dsum, const Tensor& x, const Norm& norm) {
  const Tensor dy = given.to(x.scalar_type()).contiguous();
  const Tensor past = dsum.defined() ? dsum.to(x.scalar_type()).contiguous() : Tensor();
  const Rows rows(x);
  const Tensor dx = at::empty(x.sizes(), x.options());
  // Every block leaves a row of gradients of the weight, and of the bias, behind.
  constexpr int64_t GRAD_BLOCKS = 512;
  const int64_t blocks = std::min(ceil_div(rows.n, rows.rows_of_block()), GRAD_BLOCKS);
  const int64_t columns = rows.k * (norm.is_layer_norm() ? 2 : 1);
  const Tensor shares = at::empty({blocks, columns}, norm.weight.options());
  launch(
      norm.is_layer_norm() ? "m6_layer_norm_grad" : "m6_rms_norm_grad", {blocks, 1}, rows.threads,
      rows.rows_of_block() * columns * static_cast<int64_t>(sizeof(float)), bytes(dy),
      past.defined() ? bytes(past) : nullptr, bytes(x), bytes(norm.weight), mutable_bytes(dx), mutable_bytes(shares),
      rows.n, static_cast<int>(rows.k), static_cast<int>(rows.lanes), static_cast<int>(rows.inner), rows.outer_stride,
      static_cast<float>(norm.eps));
  const Tensor sums = sum_of_rows(shares);
  if (!norm.is_layer_norm()) return {dx, sums, Tensor()};
  return {dx, sums.narrow(0, 0, rows.k), sums.narrow(0, rows.k, rows.k)};
}

using Bias = std::optional<Tensor>;

Norm dense_norm(const Tensor& weight, const Bias& bias, double eps) {
  return {dense(weight), bias.has_value() ? dense(*bias) : Tensor(), eps};
}

// Keeps what the gradients need: the sums and the norm.
void save(AutogradContext* context, const Tensor& sum, const Norm& norm) {
  context->save_for_backward({sum, norm.weight, norm.bias});
  context->saved_data["eps"] = norm.eps;
}

// The sums and the norm.
std::pair<Tensor, Norm> saved(AutogradContext* context) {
  const auto tensors = context->get_saved_variables();
  return {tensors[0], {tensors[1], tensors[2], context->saved_data["eps"].toDouble()}};
}

class RowNorm : public torch::autograd::Function<RowNorm> {
 public:
  static Tensor forward(AutogradContext* context, const Tensor& x, const Tensor& weight, const Bias& bias, double eps) {
    const c10::DeviceGuard guard(x.device());
    const Norm norm = dense_norm(weight, bias, eps);
    const Normed normed = row_norm(x, Tensor(), norm);
    save(context, normed.sum, norm);
    return normed.y;
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto [sum, norm] = saved(context);
    const c10::DeviceGuard guard(sum.device());
    const NormGrads made = row_norm_grad(grads[0], Tensor(), sum, norm);
    return {made.x, made.weight, made.bias, Tensor()};
  }
};

class AddRowNorm : public torch::autograd::Function<AddRowNorm> {
 public:
  // The sum and its norm.
  static variable_list forward(
      AutogradContext* context, const Tensor& x, const Tensor& residual, const Tensor& weight, const Bias& bias, double eps) {
    const c10::DeviceGuard guard(x.device());
    const Norm norm = dense_norm(weight, bias, eps);
    const Normed normed = row_norm(x, residual.contiguous(), norm);
    save(context, normed.sum, norm);
    context->set_materialize_grads(false);
    return {normed.sum, normed.y};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto [sum, norm] = saved(context);
    const c10::DeviceGuard guard(sum.device());
    if (!grads[1].defined()) return {grads[0], grads[0], Tensor(), Tensor(), Tensor()};
    const NormGrads made = row_norm_grad(grads[1], grads[0], sum, norm);
    return {made.x, made.x, made.weight, made.bias, Tensor()};
  }
};

Bias optional(const Tensor* bias) { return bias == nullptr ? Bias() : Bias(*bias); }

}  // namespace

extern "C" {

char* m6_group_norm(
    const Tensor* x, const Tensor* weight, const Tensor* bias, int64_t groups, double eps, bool swish, Tensor** out) {
  return guarded([&] { *out = new Tensor(GroupNorm::apply(*x, *weight, *bias, groups, eps, swish)); });
}

char* m6_row_norm(const Tensor* x, const Tensor* weight, const Tensor* bias, double eps, Tensor** out) {
  return guarded([&] { *out = new Tensor(RowNorm::apply(*x, *weight, optional(bias), eps)); });
}

char* m6_add_row_norm(
    const Tensor* x, const Tensor* residual, const Tensor* weight, const Tensor* bias, double eps, Tensor** sum,
    Tensor** out) {
  return guarded([&] {
    const auto results = AddRowNorm::apply(*x, *residual, *weight, optional(bias), eps);
    *sum = new Tensor(results[0]);
    *out = new Tensor(results[1]);
  });
}

}  // extern "C"
