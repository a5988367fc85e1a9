// Launches the kernels of kernels.cu and gives them gradients. Compiled with the feature `cuda` only.

#include <ATen/ATen.h>
#include <c10/core/DeviceGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <cuda.h>
#include <dlfcn.h>
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>
#include <mutex>
#include <string>
#include <unordered_map>

#include "adamw.h"
#include "copies.h"
#include "guarded.h"

namespace {

using at::Tensor;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

// bf16 values of a 16-byte word, as in kernels.cu.
constexpr int64_t VECTOR = 8;
constexpr int64_t WARP = 32;
constexpr int64_t BLOCK = 256;
// Blocks that keep every multiprocessor of today's GPUs busy to the end.
constexpr int64_t BLOCKS = 2048;

// The driver's library, which a process that uses a GPU has loaded; linking it would ask for it on machines without one.
template <typename F>
F driver_function(const char* name) {
  static void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  void* function = driver == nullptr ? nullptr : dlsym(driver, name);
  TORCH_CHECK(function != nullptr, "the NVIDIA driver has no ", name);
  return reinterpret_cast<F>(function);
}

void check_driver(CUresult result, const std::string& what) {
  if (result == CUDA_SUCCESS) return;
  static const auto describe = driver_function<decltype(&cuGetErrorString)>("cuGetErrorString");
  const char* reason = nullptr;
  describe(result, &reason);
  TORCH_CHECK(false, what, ": ", reason == nullptr ? "unknown error" : reason);
}

// The fat binary of kernels.cu, loaded at the first launch.
const void* fat_binary = nullptr;

CUfunction kernel(const std::string& name) {
  static std::mutex mutex;
  static std::unordered_map<std::string, CUfunction> known;
  static CUlibrary library = nullptr;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(name);
  if (found != known.end()) return found->second;
  if (library == nullptr) {
    static const auto load = driver_function<decltype(&cuLibraryLoadData)>("cuLibraryLoadData");
    check_driver(load(&library, fat_binary, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading m6's kernels");
  }
  static const auto get = driver_function<decltype(&cuLibraryGetKernel)>("cuLibraryGetKernel");
  CUkernel made = nullptr;
  check_driver(get(&made, library, name.c_str()), name);
  return known[name] = reinterpret_cast<CUfunction>(made);
}

struct Grid {
  int64_t x, y;
};

template <typename... Arguments>
void launch(const std::string& name, Grid grid, int64_t threads, int64_t shared_bytes, Arguments... arguments) {
  static const auto launch_kernel = driver_function<decltype(&cuLaunchKernel)>("cuLaunchKernel");
  void* pointers[] = {static_cast<void*>(&arguments)...};
  check_driver(
      launch_kernel(
          kernel(name), static_cast<unsigned>(grid.x), static_cast<unsigned>(grid.y), 1, static_cast<unsigned>(threads), 1, 1,
          static_cast<unsigned>(shared_bytes), c10::cuda::getCurrentCUDAStream().stream(), pointers, nullptr),
      name);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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

const void* bytes(const Tensor& tensor) { return tensor.const_data_ptr(); }
void* mutable_bytes(const Tensor& tensor) { return tensor.mutable_data_ptr(); }

// Weights as the kernels read them.
Tensor dense(const Tensor& weight) { return weight.to(at::kFloat).contiguous(); }

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

// Heads `[n, h, k]` that lie close together in rows of something wider, and anything contiguous, are read in place.
Tensor in_place_rows(const Tensor& x) {
  const bool heads = x.dim() == 3 && x.stride(2) == 1 && x.stride(1) == x.size(2) && x.stride(0) % VECTOR == 0;
  return heads ? x : x.contiguous();
}

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

// A product with float32 weights in the dtype of its input. Their gradient comes out of the matrix product in float32, so
// that it is neither rounded nor copied.
class LinearProduct : public torch::autograd::Function<LinearProduct> {
 public:
  static Tensor forward(
      AutogradContext* context, const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
    const Tensor w = in_bf16(weight);
    context->save_for_backward({x, w});
    context->saved_data["has_bias"] = bias.has_value();
    return bias.has_value() ? at::linear(x, w, in_bf16(*bias)) : at::linear(x, w);
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const auto saved = context->get_saved_variables();
    const Tensor &x = saved[0], &weight = saved[1];
    const Tensor dy = grads[0].reshape({-1, weight.size(0)});
    const Tensor dx = context->needs_input_grad(0) ? at::mm(dy, weight).view(x.sizes()) : Tensor();
    const Tensor dweight =
        context->needs_input_grad(1) ? at::mm(dy.t(), x.reshape({-1, weight.size(1)}), at::kFloat) : Tensor();
    const bool has_bias = context->saved_data["has_bias"].toBool();
    return {dx, dweight, has_bias ? dy.sum(0, /*keepdim=*/false, at::kFloat) : Tensor()};
  }
};

Tensor rotated(const Tensor& x, const Tensor& cosines, const Tensor& sines, float turn) {
  const c10::DeviceGuard guard(x.device());
  const Tensor y = at::empty(x.sizes(), x.options());
  const int64_t words = x.numel() / 2 / VECTOR;
  launch(
      "m6_rotate", {ceil_div(words, BLOCK), 1}, BLOCK, 0, bytes(x), bytes(cosines), bytes(sines), mutable_bytes(y), words,
      static_cast<int>(x.size(1)), static_cast<int>(x.size(2)), x.stride(0), turn);
  return y;
}

// A float32 weight in bf16.
class Converted : public torch::autograd::Function<Converted> {
 public:
  static Tensor forward(AutogradContext*, const Tensor& weight) { return in_bf16(weight); }

  static variable_list backward(AutogradContext*, const variable_list& grads) { return {grads[0].to(at::kFloat)}; }
};

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

void adamw(
    size_t count, Tensor* const* params, Tensor* const* grads, Tensor* const* firsts, Tensor* const* seconds,
    Tensor* const* steps, const AdamWRates& rates, const Tensor& lr, const Tensor& norm, const Tensor& factor) {
  const c10::DeviceGuard guard(norm.device());
  std::vector<Tensor> counters, kept;
  AdamWBatch batch;
  size_t filled = 0;
  for (size_t i = 0; i < count; ++i) counters.push_back(*steps[i]);
  at::_foreach_add_(counters, std::vector<Tensor>(count, norm.isfinite().to(at::kFloat)));
  for (size_t i = 0; i < count; ++i) {
    const int64_t size = params[i]->numel();
    const auto of = [&](const Tensor& tensor) {
      TORCH_CHECK(tensor.scalar_type() == at::kFloat && tensor.is_contiguous(), "AdamW needs dense float32");
      TORCH_CHECK(tensor.numel() == size, "AdamW needs parameters, gradients and moments of one size");
      return static_cast<float*>(mutable_bytes(tensor));
    };
    kept.push_back(grads[i]->contiguous());
    batch.params[filled] = of(*params[i]);
    batch.copies[filled] = bf16_copy(*params[i]);
    batch.grads[filled] = of(kept.back());
    batch.firsts[filled] = of(*firsts[i]);
    batch.seconds[filled] = of(*seconds[i]);
    batch.steps[filled] = static_cast<const float*>(bytes(*steps[i]));
    batch.sizes[filled] = size;
    batch.ends[filled] = static_cast<int>((filled == 0 ? 0 : batch.ends[filled - 1]) + ceil_div(size, AdamWBatch::CHUNK));
    ++filled;
    if (filled == AdamWBatch::MOST || i + 1 == count) {
      launch("m6_adamw", {batch.ends[filled - 1], 1}, BLOCK, 0, batch, rates, bytes(lr), bytes(norm), bytes(factor));
      filled = 0;
    }
  }
}

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
    return {saved[0] * grads[0].to(saved[0].scalar_type()), saved[1] * grads[0], Tensor(), Tensor(), Tensor()};
  }
};

}  // namespace

extern "C" {

void m6_set_kernels(const void* image) { fat_binary = image; }

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

char* m6_linear(const Tensor* x, const Tensor* weight, const Tensor* bias, Tensor** out) {
  return guarded([&] {
    *out = new Tensor(LinearProduct::apply(*x, *weight, bias == nullptr ? std::nullopt : std::make_optional(*bias)));
  });
}

char* m6_in_bf16(const Tensor* weight, Tensor** out) {
  return guarded([&] { *out = new Tensor(Converted::apply(*weight)); });
}

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

char* m6_swiglu(const Tensor* gate_up, Tensor** out) {
  return guarded([&] { *out = new Tensor(SwiGlu::apply(*gate_up)); });
}

char* m6_permute(const Tensor* x, const Tensor* tokens, const Tensor* places, Tensor** out) {
  return guarded([&] { *out = new Tensor(Permute::apply(*x, *tokens, *places)); });
}

char* m6_unpermute(
    const Tensor* rows, const Tensor* weights, const Tensor* order, const Tensor* places, Tensor** out) {
  return guarded([&] { *out = new Tensor(Unpermute::apply(*rows, *weights, *order, *places)); });
}

char* m6_gated_sum(const Tensor* x, const Tensor* gates, const Tensor* y, Tensor** out) {
  return guarded([&] { *out = new Tensor(GatedSum::apply(*x, *gates, *y)); });
}

char* m6_adamw(
    size_t count, Tensor* const* params, Tensor* const* grads, Tensor* const* firsts, Tensor* const* seconds,
    Tensor* const* steps, const Tensor* lr, double beta1, double beta2, double weight_decay, double eps,
    const Tensor* norm, const Tensor* factor) {
  return guarded([&] {
    const at::NoGradGuard no_grad;
    const auto narrow = [](double value) { return static_cast<float>(value); };
    const AdamWRates rates{narrow(beta1), narrow(beta2), narrow(weight_decay), narrow(eps)};
    adamw(count, params, grads, firsts, seconds, steps, rates, *lr, *norm, *factor);
  });
}

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
