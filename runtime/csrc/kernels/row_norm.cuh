// Root-mean-square norm and layer norm over rows of width k. The second has a bias, and takes the mean off first.
//
// Row n of the input begins at `n / inner * outer_stride + n % inner * k`: heads of queries and keys are normed where
// they lie in the product they came from. A row belongs to `lanes` threads, a word to each: some lanes of a warp, or whole
// warps. Where there is a `residual`, what is normed is the sum of it and the input, which is kept in `sum`; both are dense.

#include "common.cuh"

namespace {

constexpr int MOST_WARPS = 32;

// The sums of two values over the threads of a row. `shares` has a place for each warp, and is not to be used again before
// all threads have come to another call.
__device__ float2 sums_of_row(float2 values, int lanes, float2* shares) {
  const int own = min(lanes, WARP);
  values = {sum_of_lanes(values.x, own), sum_of_lanes(values.y, own)};
  if (lanes <= WARP) return values;
  const int warp = threadIdx.x / WARP, warps = lanes / WARP;
  if (threadIdx.x % WARP == 0) shares[warp] = values;
  __syncthreads();
  float2 sums = {0.0f, 0.0f};
  for (int i = 0; i < warps; ++i) {
    const float2 share = shares[warp / warps * warps + i];
    sums = {sums.x + share.x, sums.y + share.y};
  }
  return sums;
}

// Takes the mean of a row off its values; what is not of the row stays 0. Returns the mean of `other`, of which every thread
// has a part.
__device__ float centre(Vector& value, bool inside, int k, int lanes, float2* shares, float other = 0.0f) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) sum += value.at[i];
  const float2 sums = sums_of_row({sum, other}, lanes, shares);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) value.at[i] = inside ? value.at[i] - sums.x / k : 0.0f;
  return sums.y / k;
}

// `bias` is that of a layer norm.
template <bool is_layer_norm>
__device__ void row_norm(
    const bf16* x, const bf16* residual, const float* weight, const float* bias, bf16* sum, bf16* y, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  __shared__ float2 shares[2][MOST_WARPS];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / lanes) + threadIdx.x / lanes;
  const int at = threadIdx.x % lanes * VECTOR;
  const bool inside = row < n && at < k;
  Vector value = {};
  if (inside) {
    value = load(x + row / inner * outer_stride + row % inner * k + at);
    if (residual != nullptr) {
      const Vector other = load(residual + row * k + at);
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) value.at[i] = rounded(value.at[i] + other.at[i]);
      store(sum + row * k + at, value);
    }
  }
  if (is_layer_norm) centre(value, inside, k, lanes, shares[0]);
  float squares = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) squares += value.at[i] * value.at[i];
  const float rstd = rsqrtf(sums_of_row({squares, 0.0f}, lanes, shares[1]).x / k + eps);
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    value.at[i] = value.at[i] * (rstd * weight[at + i]) + (is_layer_norm ? bias[at + i] : 0.0f);
  }
  store(y + row * k + at, value);
}

// dx, to which the gradient `dsum` of the sum is added where there is one, and each block's share of dweight in
// `shares_of_grads[block, k]`; of a layer norm that of dbias too, `[block, 2, k]`.
template <bool is_layer_norm>
__device__ void row_norm_grad(
    const bf16* dy, const bf16* dsum, const bf16* x, const float* weight, bf16* dx, float* shares_of_grads, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  constexpr int GRADS = is_layer_norm ? 2 : 1;
  // Calls in turn take one and the other.
  __shared__ float2 shares[2][MOST_WARPS];
  extern __shared__ float row_sums[];
  const int rows = blockDim.x / lanes, own_row = threadIdx.x / lanes;
  const int at = threadIdx.x % lanes * VECTOR;
  Vector weights = {}, totals[GRADS] = {};
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) weights.at[i] = at < k ? weight[at + i] : 0.0f;
  int turn = 0;
  // Whole blocks stay together for the sums, so the loop runs over blocks of rows.
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * rows; first < n; first += static_cast<int64_t>(gridDim.x) * rows) {
    const int64_t row = first + own_row;
    const bool inside = row < n && at < k;
    Vector value = {}, grad = {}, past = {};
    if (inside) {
      value = load(x + row / inner * outer_stride + row % inner * k + at);
      grad = load(dy + row * k + at);
      if (dsum != nullptr) past = load(dsum + row * k + at);
    }
    float level = 0;
    if (is_layer_norm) {
      float weighted = 0;
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) weighted += grad.at[i] * weights.at[i];
      level = centre(value, inside, k, lanes, shares[turn], weighted);
      turn = 1 - turn;
    }
    float squares = 0, product = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      squares += value.at[i] * value.at[i];
      product += grad.at[i] * weights.at[i] * value.at[i];
    }
    const float2 sums = sums_of_row({squares, product}, lanes, shares[turn]);
    turn = 1 - turn;
    const float rstd = rsqrtf(sums.x / k + eps);
    const float tilt = sums.y / k * rstd * rstd;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      totals[0].at[i] += grad.at[i] * value.at[i] * rstd;
      if (is_layer_norm) totals[GRADS - 1].at[i] += grad.at[i];
      past.at[i] += rstd * (grad.at[i] * weights.at[i] - level - value.at[i] * tilt);
    }
    if (inside) store(dx + row * k + at, past);
  }
  if (at < k) {
#pragma unroll
    for (int grad = 0; grad < GRADS; ++grad) {
#pragma unroll
      for (int i = 0; i < VECTOR; ++i) row_sums[(own_row * GRADS + grad) * k + at + i] = totals[grad].at[i];
    }
  }
  __syncthreads();
  const int columns = GRADS * k;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    float sum = 0;
    for (int row = 0; row < rows; ++row) sum += row_sums[row * columns + column];
    shares_of_grads[static_cast<int64_t>(blockIdx.x) * columns + column] = sum;
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_rms_norm(
    const bf16* x, const bf16* residual, const float* weight, const float* bias, bf16* sum, bf16* y, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  row_norm<false>(x, residual, weight, bias, sum, y, n, k, lanes, inner, outer_stride, eps);
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_layer_norm(
    const bf16* x, const bf16* residual, const float* weight, const float* bias, bf16* sum, bf16* y, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  row_norm<true>(x, residual, weight, bias, sum, y, n, k, lanes, inner, outer_stride, eps);
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_rms_norm_grad(
    const bf16* dy, const bf16* dsum, const bf16* x, const float* weight, bf16* dx, float* shares_of_grads, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  row_norm_grad<false>(dy, dsum, x, weight, dx, shares_of_grads, n, k, lanes, inner, outer_stride, eps);
}

extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_layer_norm_grad(
    const bf16* dy, const bf16* dsum, const bf16* x, const float* weight, bf16* dx, float* shares_of_grads, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  row_norm_grad<true>(dy, dsum, x, weight, dx, shares_of_grads, n, k, lanes, inner, outer_stride, eps);
}

// The sum of the rows of `[n, k]`, `[k]`. A block for each warp of columns, whose warps share out the rows.
extern "C" __global__ void m6_sum_rows(const float* rows, float* sums, int n, int k) {
  __shared__ float shares[WARP][WARP + 1];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int column = blockIdx.x * WARP + lane;
  float sum = 0;
  for (int row = warp; row < n && column < k; row += WARP) sum += rows[static_cast<int64_t>(row) * k + column];
  shares[warp][lane] = sum;
  __syncthreads();
  const float total = sum_of_lanes(shares[lane][warp], WARP);
  const int own = blockIdx.x * WARP + warp;
  if (lane == 0 && own < k) sums[own] = total;
}
