#include "matmul.h"

#include <c10/core/DeviceGuard.h>
#include <c10/core/Event.h>
#include <c10/cuda/CUDAStream.h>
#include <cublasLt.h>
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "launch.h"

namespace {

using at::Tensor;
using Bias = std::optional<Tensor>;

// Operations of a product, 2 m n k, below which it is left to cuBLAS.
constexpr int64_t LEAST_OPERATIONS = int64_t{1} << 32;
// The call of a shape at which its kernels are timed; a shape that came once or twice will hardly come again.
constexpr int64_t FIRST_TIMED_CALL = 3;
// Between attempts to time a shape, where results had nothing to compare.
constexpr int64_t CALLS_FACTOR = 4;
constexpr int CANDIDATES = 8;
constexpr size_t MOST_WORKSPACE = size_t{64} << 20;
// Multiple of the addresses that the suggestions are for.
constexpr uintptr_t ALIGNMENT = 256;

// cuBLASLt, which libtorch has loaded; linking it would ask for it on machines without a GPU.
template <typename F>
F function(const char* name) {
  static void* library =
      dlopen(("libcublasLt.so." + std::to_string(CUBLAS_VER_MAJOR)).c_str(), RTLD_NOW | RTLD_LOCAL);
  void* found = library == nullptr ? nullptr : dlsym(library, name);
  TORCH_CHECK(found != nullptr, "cuBLASLt has no ", name);
  return reinterpret_cast<F>(found);
}

#define M6_CUBLASLT(name) function<decltype(&name)>(#name)

void check(cublasStatus_t status, const char* what) {
  TORCH_CHECK(status == CUBLAS_STATUS_SUCCESS, "cuBLASLt: ", what, ": status ", static_cast<int>(status));
}

// A matrix where its rows or its columns lie close together, `step` values apart from each other.
struct Side {
  int64_t step;
  bool is_transposed;

  static std::optional<Side> of(const Tensor& x) {
    if (reinterpret_cast<uintptr_t>(bytes(x)) % ALIGNMENT != 0) return std::nullopt;
    if (x.stride(1) == 1 && x.stride(0) >= x.size(1)) return Side{x.stride(0), false};
    if (x.stride(0) == 1 && x.stride(1) >= x.size(0)) return Side{x.stride(1), true};
    return std::nullopt;
  }
};

struct Kernel {
  cublasLtMatmulAlgo_t algorithm;
  size_t workspace;
};

// A product as cuBLASLt has it: it thinks in columns, and so computes `b^T a^T`.
class Problem {
 public:
  using Key = std::array<int64_t, 10>;

  // None where it is left to cuBLAS.
  static std::optional<Problem> of(const Tensor& out, const Tensor& a, const Tensor& b, const Bias& bias) {
    const int64_t m = a.size(0), k = a.size(1), n = b.size(1);
    if (2 * m * n * k < LEAST_OPERATIONS) return std::nullopt;
    for (const Tensor* x : {&out, &a, &b}) {
      if (x->scalar_type() != at::kBFloat16) return std::nullopt;
    }
    if (bias.has_value() && (bias->scalar_type() != at::kBFloat16 || !bias->is_contiguous())) return std::nullopt;
    const auto of_out = Side::of(out), of_a = Side::of(a), of_b = Side::of(b);
    if (!of_out || !of_a || !of_b || of_out->is_transposed) return std::nullopt;
    return Problem(m, n, k, *of_out, *of_a, *of_b, bias.has_value());
  }

  Key key(const Tensor& out) const {
    return {out.device().index(), m_, n_, k_, out_.step, a_.step, b_.step, a_.is_transposed, b_.is_transposed, has_bias_};
  }

  std::vector<Kernel> suggestions() {
    static const auto init = M6_CUBLASLT(cublasLtMatmulPreferenceInit_internal);
    static const auto set = M6_CUBLASLT(cublasLtMatmulPreferenceSetAttribute);
    static const auto suggest = M6_CUBLASLT(cublasLtMatmulAlgoGetHeuristic);
    cublasLtMatmulPreferenceOpaque_t preference;
    check(init(&preference, sizeof preference), "a preference");
    check(
        set(&preference, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &MOST_WORKSPACE, sizeof MOST_WORKSPACE), "workspace");
    std::array<cublasLtMatmulHeuristicResult_t, CANDIDATES> found;
    int count = 0;
    const auto status = suggest(
        handle(), &operation_, &layout_b_, &layout_a_, &layout_out_, &layout_out_, &preference, CANDIDATES, found.data(),
        &count);
    std::vector<Kernel> kernels;
    for (int i = 0; status == CUBLAS_STATUS_SUCCESS && i < count; ++i) {
      if (found[i].state == CUBLAS_STATUS_SUCCESS) kernels.push_back({found[i].algo, found[i].workspaceSize});
    }
    return kernels;
  }

  void run(const Kernel& kernel, const Tensor& out, const Tensor& a, const Tensor& b, const Bias& bias) {
    static const auto multiply = M6_CUBLASLT(cublasLtMatmul);
    if (bias.has_value()) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, bytes(*bias));
    const Tensor workspace = at::empty({static_cast<int64_t>(kernel.workspace)}, out.options().dtype(at::kByte));
    const float one = 1.0f, zero = 0.0f;
    check(
        multiply(
            handle(), &operation_, &one, bytes(b), &layout_b_, bytes(a), &layout_a_, &zero, bytes(out), &layout_out_,
            mutable_bytes(out), &layout_out_, &kernel.algorithm, mutable_bytes(workspace), kernel.workspace,
            c10::cuda::getCurrentCUDAStream().stream()),
        "a product");
  }

 private:
  Problem(int64_t m, int64_t n, int64_t k, const Side& out, const Side& a, const Side& b, bool has_bias)
      : m_(m), n_(n), k_(k), out_(out), a_(a), b_(b), has_bias_(has_bias) {
    static const auto init = M6_CUBLASLT(cublasLtMatmulDescInit_internal);
    check(init(&operation_, sizeof operation_, CUBLAS_COMPUTE_32F, CUDA_R_32F), "an operation");
    const auto turned = [](const Side& side) { return side.is_transposed ? CUBLAS_OP_T : CUBLAS_OP_N; };
    set(CUBLASLT_MATMUL_DESC_TRANSA, turned(b));
    set(CUBLASLT_MATMUL_DESC_TRANSB, turned(a));
    if (has_bias) set(CUBLASLT_MATMUL_DESC_EPILOGUE, CUBLASLT_EPILOGUE_BIAS);
    layout(layout_b_, k, n, b);
    layout(layout_a_, m, k, a);
    layout(layout_out_, m, n, out);
  }

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    static const auto set_attribute = M6_CUBLASLT(cublasLtMatmulDescSetAttribute);
    check(set_attribute(&operation_, attribute, &value, sizeof value), "an attribute of an operation");
  }

  // Of a matrix `[rows, columns]`, whose rows are the columns of cuBLASLt's.
  static void layout(cublasLtMatrixLayoutOpaque_t& layout, int64_t rows, int64_t columns, const Side& side) {
    static const auto init = M6_CUBLASLT(cublasLtMatrixLayoutInit_internal);
    if (side.is_transposed) std::swap(rows, columns);
    check(init(&layout, sizeof layout, CUDA_R_16BF, columns, rows, side.step), "a layout");
  }

  // Of the current device.
  static cublasLtHandle_t handle() {
    static const auto create = M6_CUBLASLT(cublasLtCreate);
    static std::mutex mutex;
    static std::map<c10::DeviceIndex, cublasLtHandle_t> handles;
    const std::lock_guard<std::mutex> lock(mutex);
    cublasLtHandle_t& handle = handles[c10::cuda::getCurrentCUDAStream().device_index()];
    if (handle == nullptr) check(create(&handle), "a handle");
    return handle;
  }

  int64_t m_, n_, k_;
  Side out_, a_, b_;
  bool has_bias_;
  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t layout_a_, layout_b_, layout_out_;
};

void by_cublas(const Tensor& out, const Tensor& a, const Tensor& b, const Bias& bias) {
  Tensor target = out;
  if (bias.has_value()) {
    at::addmm_out(target, *bias, a, b);
  } else {
    at::mm_out(target, a, b);
  }
}

// The first and the last rows of a result, so that what is kept beside it is small.
class Sample {
 public:
  explicit Sample(const Tensor& out) : first_(part(out, false).clone()), last_(part(out, true).clone()) {}

  // Whether what can be compared is more than zeros.
  bool says_something() const {
    return 2 * at::count_nonzero(first_).item<int64_t>() > first_.numel() &&
        2 * at::count_nonzero(last_).item<int64_t>() > last_.numel();
  }

  bool is_of(const Tensor& out) const { return at::equal(first_, part(out, false)) && at::equal(last_, part(out, true)); }

 private:
  static Tensor part(const Tensor& out, bool is_last) {
    constexpr int64_t VALUES = int64_t{1} << 23;
    const int64_t rows = std::clamp<int64_t>(VALUES / out.size(1), 1, out.size(0));
    return out.narrow(0, is_last ? out.size(0) - rows : 0, rows);
  }

  Tensor first_, last_;
};

// Milliseconds of some runs of `work`.
template <typename F>
double milliseconds(F&& work) {
  constexpr int RUNS = 3;
  const c10::Stream stream = c10::cuda::getCurrentCUDAStream().unwrap();
  c10::Event start(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
  c10::Event end(c10::DeviceType::CUDA, c10::EventFlag::BACKEND_DEFAULT);
  start.record(stream);
  for (int i = 0; i < RUNS; ++i) work();
  end.record(stream);
  end.synchronize();
  return start.elapsedTime(end);
}

struct Timed {
  bool is_done;
  // None where cuBLAS's own choice is as fast.
  std::optional<Kernel> fastest;
};

// Times the kernels; leaves the result in `out`.
Timed time_kernels(Problem& problem, const Tensor& out, const Tensor& a, const Tensor& b, const Bias& bias) {
  constexpr int ROUNDS = 3;
  by_cublas(out, a, b, bias);
  const Sample expected(out);
  if (!expected.says_something()) return {false, std::nullopt};
  std::vector<Kernel> kernels;
  for (const Kernel& kernel : problem.suggestions()) {
    problem.run(kernel, out, a, b, bias);
    if (expected.is_of(out)) kernels.push_back(kernel);
  }
  // In turn, since clocks change; the shortest of the rounds counts.
  double shortest = milliseconds([&] { by_cublas(out, a, b, bias); });
  std::vector<double> times(kernels.size(), shortest);
  for (int round = 0; round < ROUNDS; ++round) {
    for (size_t i = 0; i < kernels.size(); ++i) {
      times[i] = std::min(times[i], milliseconds([&] { problem.run(kernels[i], out, a, b, bias); }));
    }
    shortest = std::min(shortest, milliseconds([&] { by_cublas(out, a, b, bias); }));
  }
  const auto best = std::min_element(times.begin(), times.end());
  if (best == times.end() || *best >= shortest) return {true, std::nullopt};
  return {true, kernels[best - times.begin()]};
}

struct Known {
  int64_t calls = 0, next_attempt = FIRST_TIMED_CALL;
  Timed timed{false, std::nullopt};
};

std::mutex mutex;
std::map<Problem::Key, Known> known;

}  // namespace

void product_out(const Tensor& out, const Tensor& a, const Tensor& b, const Bias& bias) {
  const c10::DeviceGuard guard(out.device());
  std::optional<Problem> problem = Problem::of(out, a, b, bias);
  if (!problem) return by_cublas(out, a, b, bias);
  Known now;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    Known& entry = known[problem->key(out)];
    ++entry.calls;
    now = entry;
    if (entry.calls >= entry.next_attempt) entry.next_attempt *= CALLS_FACTOR;
  }
  if (now.timed.fastest) return problem->run(*now.timed.fastest, out, a, b, bias);
  // What is recorded cannot be waited for.
  if (now.timed.is_done || now.calls < now.next_attempt || is_recording()) return by_cublas(out, a, b, bias);
  const Timed timed = time_kernels(*problem, out, a, b, bias);
  const std::lock_guard<std::mutex> lock(mutex);
  known[problem->key(out)].timed = timed;
}
