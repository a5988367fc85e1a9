// CUDA kernels of m6-runtime, compiled to a fat binary by nvcc and launched from fused.cpp.
//
// All of them read and write bf16 in words of 16 bytes and compute in float32. Sums are taken in a fixed order, without
// atomics, so that results are the same from run to run.
// Legend: b batch, t positions, c channels, g groups, n rows, k width of a row, f feed-forward width.

#include <cuda_bf16.h>

#include <cstdint>

#include "adamw.h"

namespace {

constexpr int VECTOR = 8;
constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xffffffff;

using bf16 = __nv_bfloat16;

struct alignas(16) Packed {
  bf16 at[VECTOR];
};

struct Vector {
  float at[VECTOR];
};

__device__ Vector load(const bf16* source) {
  const Packed packed = *reinterpret_cast<const Packed*>(source);
  Vector vector;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) vector.at[i] = __bfloat162float(packed.at[i]);
  return vector;
}

__device__ void store(bf16* target, const Vector& vector) {
  Packed packed;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) packed.at[i] = __float2bfloat16(vector.at[i]);
  *reinterpret_cast<Packed*>(target) = packed;
}

// Half a word.
__device__ void store(bf16* target, const float4& values) {
  struct alignas(8) Half {
    __nv_bfloat162 low, high;
  };
  const Half half{__floats2bfloat162_rn(values.x, values.y), __floats2bfloat162_rn(values.z, values.w)};
  *reinterpret_cast<Half*>(target) = half;
}

__device__ float rounded(float value) { return __bfloat162float(__float2bfloat16(value)); }

__device__ float sigmoid(float z) { return 1.0f / (1.0f + __expf(-z)); }

// The gradient of swish, z * sigmoid(z).
__device__ float swish_slope(float z) {
  const float gate = sigmoid(z);
  return gate * (1.0f + z * (1.0f - gate));
}

__device__ float sum_of_lanes(float value, int lanes) {
  for (int step = lanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
  return value;
}

// What a thread of the group norm kernels works on: one word of channels, every `rows`-th position of one chunk of one
// example. Blocks are `c / VECTOR * rows` threads; grids are (chunks, b).
struct Tile {
  int lanes, lane, rows, row, channel;
  int64_t example, begin, end;

  __device__ Tile(int64_t t, int c) {
    lanes = c / VECTOR;
    lane = threadIdx.x % lanes;
    rows = blockDim.x / lanes;
    row = threadIdx.x / lanes;
    channel = lane * VECTOR;
    example = blockIdx.y;
    const int64_t chunk = (t + gridDim.x - 1) / gridDim.x;
    begin = blockIdx.x * chunk;
    end = min(begin + chunk, t);
  }

  __device__ int64_t offset(int64_t position, int64_t t, int c) const {
    return (example * t + position) * c + channel;
  }
};

// Sums two values a channel over the block's rows into `shared[0 .. c]` and `shared[c .. 2 c]`.
__device__ void sum_of_rows(float* shared, const Tile& tile, int c, const Vector& first, const Vector& second) {
  float* own = shared + static_cast<int64_t>(tile.row) * 2 * c;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    own[tile.channel + i] = first.at[i];
    own[c + tile.channel + i] = second.at[i];
  }
  __syncthreads();
  for (int at = threadIdx.x; at < 2 * c; at += blockDim.x) {
    float sum = 0;
    for (int row = 0; row < tile.rows; ++row) sum += shared[row * 2 * c + at];
    shared[at] = sum;
  }
  __syncthreads();
}

// The affine map and moments of a thread's channels.
struct Affine {
  Vector mean, rstd, weight, bias;

  __device__ Affine(const float2* moments, const float* weights, const float* biases, const Tile& tile, int c, int g) {
    const int width = c / g;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const int channel = tile.channel + i;
      const float2 moment = moments[tile.example * g + channel / width];
      mean.at[i] = moment.x;
      rstd.at[i] = moment.y;
      weight.at[i] = weights[channel];
      bias.at[i] = biases[channel];
    }
  }
};

}  // namespace

// ---- Group norm over [b, t, c], optionally followed by swish. ----

// Sums of x - s and its square for each group of each chunk, `[b, chunks, g]`; s, the group's first value, keeps a mean
// that is large beside the deviation from taking the digits.
extern "C" __global__ void m6_group_norm_sums(const bf16* x, float2* sums, int64_t t, int c, int g) {
  extern __shared__ float shared[];
  const Tile tile(t, c);
  const int width = c / g;
  Vector shift, first{}, second{};
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    shift.at[i] = __bfloat162float(x[tile.example * t * c + (tile.channel + i) / width * width]);
  }
  for (int64_t position = tile.begin + tile.row; position < tile.end; position += tile.rows) {
    const Vector value = load(x + tile.offset(position, t, c));
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float centred = value.at[i] - shift.at[i];
      first.at[i] += centred;
      second.at[i] += centred * centred;
    }
  }
  sum_of_rows(shared, tile, c, first, second);
  for (int group = threadIdx.x; group < g; group += blockDim.x) {
    float2 sum{0, 0};
    for (int channel = group * width; channel < (group + 1) * width; ++channel) {
      sum.x += shared[channel];
      sum.y += shared[c + channel];
    }
    sums[(tile.example * gridDim.x + blockIdx.x) * g + group] = sum;
  }
}

// Mean and 1 / deviation of each group, `[b, g]`; a warp for each.
extern "C" __global__ void m6_group_norm_moments(
    const bf16* x, const float2* sums, float2* moments, int64_t t, int c, int g, int chunks, float eps) {
  const int group = threadIdx.x / WARP;
  const int lane = threadIdx.x % WARP;
  const int64_t example = blockIdx.x;
  float first = 0, second = 0;
  for (int chunk = lane; chunk < chunks; chunk += WARP) {
    const float2 sum = sums[(example * chunks + chunk) * g + group];
    first += sum.x;
    second += sum.y;
  }
  const float count = static_cast<float>(t) * static_cast<float>(c / g);
  const float centred = sum_of_lanes(first, WARP) / count;
  const float variance = fmaxf(sum_of_lanes(second, WARP) / count - centred * centred, 0.0f);
  if (lane == 0) {
    const float shift = __bfloat162float(x[example * t * c + group * (c / g)]);
    moments[example * g + group] = float2{shift + centred, rsqrtf(variance + eps)};
  }
}

extern "C" __global__ void m6_group_norm_apply(
    const bf16* x, const float2* moments, const float* weight, const float* bias, bf16* y, int64_t t, int c, int g,
    int swish) {
  const Tile tile(t, c);
  const Affine affine(moments, weight, bias, tile, c, g);
  for (int64_t position = tile.begin + tile.row; position < tile.end; position += tile.rows) {
    const int64_t at = tile.offset(position, t, c);
    Vector value = load(x + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float normed = (value.at[i] - affine.mean.at[i]) * affine.rstd.at[i];
      const float z = normed * affine.weight.at[i] + affine.bias.at[i];
      value.at[i] = swish ? z * sigmoid(z) : z;
    }
    store(y + at, value);
  }
}

// Sums over positions of dz and of dz times the normalised value, `[b, chunks, 2, c]`; dz is the gradient before swish.
extern "C" __global__ void m6_group_norm_grad_sums(
    const bf16* dy, const bf16* x, const float2* moments, const float* weight, const float* bias, float* sums, int64_t t,
    int c, int g, int swish) {
  extern __shared__ float shared[];
  const Tile tile(t, c);
  const Affine affine(moments, weight, bias, tile, c, g);
  Vector first{}, second{};
  for (int64_t position = tile.begin + tile.row; position < tile.end; position += tile.rows) {
    const int64_t at = tile.offset(position, t, c);
    const Vector value = load(x + at);
    const Vector grad = load(dy + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float normed = (value.at[i] - affine.mean.at[i]) * affine.rstd.at[i];
      const float z = normed * affine.weight.at[i] + affine.bias.at[i];
      const float dz = swish ? grad.at[i] * swish_slope(z) : grad.at[i];
      first.at[i] += dz;
      second.at[i] += dz * normed;
    }
  }
  sum_of_rows(shared, tile, c, first, second);
  float* own = sums + (tile.example * gridDim.x + blockIdx.x) * 2 * c;
  for (int at = threadIdx.x; at < 2 * c; at += blockDim.x) own[at] = shared[at];
}

// The sums of an example over its chunks, `[b, 2, c]`, and the means over each group of weight times them, `[b, g]`.
extern "C" __global__ void m6_group_norm_grad_means(
    const float* sums, const float* weight, float* channel_sums, float2* means, int64_t t, int c, int g, int chunks) {
  extern __shared__ float shared[];
  const int64_t example = blockIdx.x;
  for (int at = threadIdx.x; at < 2 * c; at += blockDim.x) {
    float sum = 0;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += sums[(example * chunks + chunk) * 2 * c + at];
    channel_sums[example * 2 * c + at] = sum;
    shared[at] = sum * weight[at % c];
  }
  __syncthreads();
  const int width = c / g;
  const float count = static_cast<float>(t) * static_cast<float>(width);
  for (int group = threadIdx.x; group < g; group += blockDim.x) {
    float2 sum{0, 0};
    for (int channel = group * width; channel < (group + 1) * width; ++channel) {
      sum.x += shared[channel];
      sum.y += shared[c + channel];
    }
    means[example * g + group] = float2{sum.x / count, sum.y / count};
  }
}

extern "C" __global__ void m6_group_norm_grad_apply(
    const bf16* dy, const bf16* x, const float2* moments, const float2* means, const float* weight, const float* bias,
    bf16* dx, int64_t t, int c, int g, int swish) {
  const Tile tile(t, c);
  const Affine affine(moments, weight, bias, tile, c, g);
  Vector level, tilt;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float2 mean = means[tile.example * g + (tile.channel + i) / (c / g)];
    level.at[i] = mean.x;
    tilt.at[i] = mean.y;
  }
  for (int64_t position = tile.begin + tile.row; position < tile.end; position += tile.rows) {
    const int64_t at = tile.offset(position, t, c);
    const Vector value = load(x + at);
    Vector grad = load(dy + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float normed = (value.at[i] - affine.mean.at[i]) * affine.rstd.at[i];
      const float z = normed * affine.weight.at[i] + affine.bias.at[i];
      const float dz = swish ? grad.at[i] * swish_slope(z) : grad.at[i];
      grad.at[i] = affine.rstd.at[i] * (dz * affine.weight.at[i] - level.at[i] - normed * tilt.at[i]);
    }
    store(dx + at, grad);
  }
}

// ---- Root-mean-square norm over rows of width k. ----
//
// Row n of the input begins at `n / inner * outer_stride + n % inner * k`: heads of queries and keys are normed where
// they lie in the product they came from. A row belongs to `lanes` threads, a word to each: some lanes of a warp, or whole
// warps. Where there is a `residual`, what is normed is the sum of it and the input, which is kept in `sum`; both are dense.

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

}  // namespace

extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_rms_norm(
    const bf16* x, const bf16* residual, const float* weight, bf16* sum, bf16* y, int64_t n, int k, int lanes, int inner,
    int64_t outer_stride, float eps) {
  __shared__ float2 shares[MOST_WARPS];
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
  float squares = 0;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) squares += value.at[i] * value.at[i];
  const float rstd = rsqrtf(sums_of_row({squares, 0.0f}, lanes, shares).x / k + eps);
  if (!inside) return;
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) value.at[i] *= rstd * weight[at + i];
  store(y + row * k + at, value);
}

// dx, to which the gradient `dsum` of the sum is added where there is one, and each block's share of dweight in
// `dweights[block, k]`.
extern "C" __global__ void __launch_bounds__(MOST_WARPS * WARP) m6_rms_norm_grad(
    const bf16* dy, const bf16* dsum, const bf16* x, const float* weight, bf16* dx, float* dweights, int64_t n, int k,
    int lanes, int inner, int64_t outer_stride, float eps) {
  // Calls in turn take one and the other.
  __shared__ float2 shares[2][MOST_WARPS];
  extern __shared__ float row_sums[];
  const int rows = blockDim.x / lanes, own_row = threadIdx.x / lanes;
  const int at = threadIdx.x % lanes * VECTOR;
  Vector weights = {}, totals = {};
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
      totals.at[i] += grad.at[i] * value.at[i] * rstd;
      past.at[i] += rstd * (grad.at[i] * weights.at[i] - value.at[i] * tilt);
    }
    if (inside) store(dx + row * k + at, past);
  }
  if (at < k) {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) row_sums[own_row * k + at + i] = totals.at[i];
  }
  __syncthreads();
  for (int column = threadIdx.x; column < k; column += blockDim.x) {
    float sum = 0;
    for (int row = 0; row < rows; ++row) sum += row_sums[row * k + column];
    dweights[static_cast<int64_t>(blockIdx.x) * k + column] = sum;
  }
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

// ---- SwiGLU: rows `[n, 2 f]` to `[n, f]`; the first half gates the second. A thread for each word of the result. ----

extern "C" __global__ void m6_swiglu(const bf16* gate_up, bf16* y, int64_t words, int f) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int64_t at = word * VECTOR, row = at / f, from = row * f + at;
  const Vector gate = load(gate_up + from);
  Vector up = load(gate_up + from + f);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) up.at[i] *= gate.at[i] * sigmoid(gate.at[i]);
  store(y + at, up);
}

extern "C" __global__ void m6_swiglu_grad(const bf16* dy, const bf16* gate_up, bf16* dgate_up, int64_t words, int f) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int64_t at = word * VECTOR, row = at / f, from = row * f + at;
  const Vector grad = load(dy + at);
  Vector gate = load(gate_up + from), up = load(gate_up + from + f);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float z = gate.at[i];
    gate.at[i] = grad.at[i] * up.at[i] * swish_slope(z);
    up.at[i] = grad.at[i] * z * sigmoid(z);
  }
  store(dgate_up + from, gate);
  store(dgate_up + from + f, up);
}

// ---- Rows of tokens sorted by expert and back: tokens `[n, k]`, each of which has `a` of the `r = a n` rows `[r, k]`. ----
//
// `order[row]` is `choice * n + token`, and `places`, `[a, n]`, its inverse.

// The weighted sum of the rows of each token, or their sum without `weights` `[n, a]`; a thread for each word of it.
extern "C" __global__ void m6_unpermute(
    const bf16* rows, const int64_t* places, const float* weights, bf16* y, int64_t n, int a, int k) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int words_of_row = k / VECTOR;
  const int64_t token = word / words_of_row, column = word % words_of_row * VECTOR;
  if (token >= n) return;
  Vector total = {};
  for (int choice = 0; choice < a; ++choice) {
    const Vector row = load(rows + places[choice * n + token] * k + column);
    const float weight = weights == nullptr ? 1.0f : weights[token * a + choice];
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) total.at[i] += weight * row.at[i];
  }
  store(y + word * VECTOR, total);
}

// Gradients of the rows and of their weights; a warp for each row.
extern "C" __global__ void m6_unpermute_grad(
    const bf16* dy, const bf16* rows, const int64_t* order, const float* weights, bf16* drows, float* dweights, int64_t n,
    int a, int k) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  if (row >= a * n) return;
  const int64_t token = order[row] % n, at = token * a + order[row] / n;
  const float weight = weights[at];
  float product = 0;
  for (int column = threadIdx.x % WARP * VECTOR; column < k; column += WARP * VECTOR) {
    Vector grad = load(dy + token * k + column);
    const Vector value = load(rows + row * k + column);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      product += grad.at[i] * value.at[i];
      grad.at[i] *= weight;
    }
    store(drows + row * k + column, grad);
  }
  product = sum_of_lanes(product, WARP);
  if (threadIdx.x % WARP == 0) dweights[at] = product;
}

// ---- Rows `[n, k]` through a gate of their own, and what is added to them: `x sigmoid(gate) + y`. A warp for each row. ----

extern "C" __global__ void m6_gated_sum(
    const bf16* x, const bf16* gates, const bf16* y, bf16* sum, int64_t n, int k) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  if (row >= n) return;
  const float gate = sigmoid(__bfloat162float(gates[row]));
  for (int64_t at = row * k + threadIdx.x % WARP * VECTOR; at < (row + 1) * k; at += WARP * VECTOR) {
    Vector value = load(x + at);
    const Vector other = load(y + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) value.at[i] = value.at[i] * gate + other.at[i];
    store(sum + at, value);
  }
}

// The gradients of `x` and of the gates; that of `y` is `dsum`.
extern "C" __global__ void m6_gated_sum_grad(
    const bf16* dsum, const bf16* x, const bf16* gates, bf16* dx, bf16* dgates, int64_t n, int k) {
  const int64_t row = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / WARP;
  if (row >= n) return;
  const float gate = sigmoid(__bfloat162float(gates[row]));
  float product = 0;
  for (int64_t at = row * k + threadIdx.x % WARP * VECTOR; at < (row + 1) * k; at += WARP * VECTOR) {
    Vector grad = load(dsum + at);
    const Vector value = load(x + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      product += grad.at[i] * value.at[i];
      grad.at[i] *= gate;
    }
    store(dx + at, grad);
  }
  product = sum_of_lanes(product, WARP);
  if (threadIdx.x % WARP == 0) dgates[row] = __float2bfloat16(product * gate * (1.0f - gate));
}

// ---- Rotary positions: each value of the first half of a head turned with its partner in the second. ----
//
// A thread for each word of a first half. `turn` is 1, or -1 for the gradient, which turns back.

namespace {

__device__ void rotate(Vector& first, Vector& second, const float* cosines, const float* sines, float turn) {
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    const float c = cosines[i], s = turn * sines[i];
    const float a = first.at[i], b = second.at[i];
    first.at[i] = a * c - b * s;
    second.at[i] = b * c + a * s;
  }
}

}  // namespace

// Heads `[n, h, k]`, the tokens of `x` `outer_stride` apart.
extern "C" __global__ void m6_rotate(
    const bf16* x, const float* cosines, const float* sines, bf16* y, int64_t words, int h, int k, int64_t outer_stride,
    float turn) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int half = k / 2, words_of_half = half / VECTOR;
  const int64_t head = word / words_of_half, token = head / h;
  const int at = static_cast<int>(word % words_of_half) * VECTOR;
  const int64_t from = token * outer_stride + head % h * k + at;
  Vector first = load(x + from), second = load(x + from + half);
  rotate(first, second, cosines + token * k + at, sines + token * k + at, turn);
  store(y + head * k + at, first);
  store(y + head * k + at + half, second);
}

// The gradient of queries `[n, h, k]`, keys and values `[n, g, k]`, of which the first two were turned, side by side:
// `[n, h + 2 g, k]`.
extern "C" __global__ void m6_join_rotated(
    const bf16* dq, const bf16* dk, const bf16* dv, const float* cosines, const float* sines, bf16* dx, int64_t words, int h,
    int g, int k) {
  const int64_t word = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (word >= words) return;
  const int half = k / 2, words_of_half = half / VECTOR, heads = h + 2 * g;
  const int64_t row = word / words_of_half, token = row / heads;
  const int head = static_cast<int>(row % heads), at = static_cast<int>(word % words_of_half) * VECTOR;
  const bf16* from = head < h       ? dq + (token * h + head) * k
                     : head < h + g ? dk + (token * g + head - h) * k
                                    : dv + (token * g + head - h - g) * k;
  Vector first = load(from + at), second = load(from + at + half);
  if (head < h + g) rotate(first, second, cosines + token * k + at, sines + token * k + at, -1.0f);
  store(dx + row * k + at, first);
  store(dx + row * k + at + half, second);
}

// ---- Cross-entropy of rows of logits `[n, v]`, `stride` apart, and its gradient in their place. A block for each row. ----

namespace {

// The largest and the sum of exponentials less it, of the values so far.
struct Partition {
  float largest, sum;

  __device__ void merge(const Partition& other) {
    const float above = fmaxf(largest, other.largest);
    sum = sum * __expf(largest - above) + other.sum * __expf(other.largest - above);
    largest = above;
  }
};

// Finite, so that the difference of two of them is a number.
constexpr float LOWEST = -1e30f;

}  // namespace

// `losses[row]` is the row's cross-entropy; the logits become `weights[row] * (softmax - one at the label)`. Words past v
// are padding: they are ignored and become zero.
extern "C" __global__ void m6_cross_entropy(
    bf16* logits, const int64_t* labels, const float* weights, float* losses, int64_t v, int64_t stride) {
  __shared__ Partition partitions[WARP];
  const int64_t row = blockIdx.x;
  bf16* own = logits + row * stride;
  const int64_t label = labels[row];
  Partition part{LOWEST, 0};
  for (int64_t at = threadIdx.x * VECTOR; at < v; at += blockDim.x * VECTOR) {
    const Vector value = load(own + at);
    float largest = part.largest;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) largest = at + i < v ? fmaxf(largest, value.at[i]) : largest;
    float sum = part.sum * __expf(part.largest - largest);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) sum += at + i < v ? __expf(value.at[i] - largest) : 0.0f;
    part = Partition{largest, sum};
  }
  for (int step = WARP / 2; step > 0; step /= 2) {
    part.merge(Partition{
        __shfl_xor_sync(ALL_LANES, part.largest, step), __shfl_xor_sync(ALL_LANES, part.sum, step)});
  }
  if (threadIdx.x % WARP == 0) partitions[threadIdx.x / WARP] = part;
  const float at_label = __bfloat162float(own[label]);
  __syncthreads();
  part = partitions[0];
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / WARP; ++warp) part.merge(partitions[warp]);
  const float log_sum = part.largest + __logf(part.sum);
  if (threadIdx.x == 0) losses[row] = log_sum - at_label;
  const float weight = weights[row];
  for (int64_t at = threadIdx.x * VECTOR; at < stride; at += blockDim.x * VECTOR) {
    Vector value = load(own + at);
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float target = at + i == label ? 1.0f : 0.0f;
      value.at[i] = at + i < v ? weight * (__expf(value.at[i] - log_sum) - target) : 0.0f;
    }
    store(own + at, value);
  }
}

// ---- AdamW (Loshchilov and Hutter 2019) of float32 parameters, whose gradients are scaled by `factor` first. Where a
// parameter has a copy in bf16, that follows. ----

namespace {

struct AdamWStep {
  AdamWRates rates;
  // `corrected_lr` takes the bias of the first moment into account, `root_correction` that of the second.
  float factor, lr, corrected_lr, root_correction;

  __device__ void update(float& param, float grad, float& first, float& second) const {
    grad *= factor;
    param -= lr * rates.weight_decay * param;
    first += (1.0f - rates.beta1) * (grad - first);
    second = rates.beta2 * second + (1.0f - rates.beta2) * grad * grad;
    param -= corrected_lr * first / (sqrtf(second) / root_correction + rates.eps);
  }

  __device__ void update(float4& param, const float4& grad, float4& first, float4& second) const {
    update(param.x, grad.x, first.x, second.x);
    update(param.y, grad.y, first.y, second.y);
    update(param.z, grad.z, first.z, second.z);
    update(param.w, grad.w, first.w, second.w);
  }
};

}  // namespace

// Nothing changes where the norm of all gradients, `norm`, is no finite number.
extern "C" __global__ void m6_adamw(
    AdamWBatch batch, AdamWRates rates, const double* rate, const float* norm, const float* factor) {
  if (!isfinite(*norm)) return;
  int index = 0;
  while (static_cast<int>(blockIdx.x) >= batch.ends[index]) ++index;
  const int first_block = index == 0 ? 0 : batch.ends[index - 1];
  const int64_t begin = (blockIdx.x - first_block) * AdamWBatch::CHUNK;
  const int64_t end = min(begin + AdamWBatch::CHUNK, batch.sizes[index]);
  float* const params = batch.params[index];
  bf16* const copies = static_cast<bf16*>(batch.copies[index]);
  const float* const grads = batch.grads[index];
  float *const firsts = batch.firsts[index], *const seconds = batch.seconds[index];
  const float steps = *batch.steps[index];
  const float correction = 1.0f - powf(rates.beta1, steps);
  const float lr = static_cast<float>(*rate);
  const AdamWStep step{rates, *factor, lr, lr / correction, sqrtf(1.0f - powf(rates.beta2, steps))};
  constexpr int QUAD = 4;
  const int64_t quads = begin + (end - begin) / QUAD * QUAD;
  for (int64_t i = begin + threadIdx.x * QUAD; i < quads; i += blockDim.x * QUAD) {
    float4 param = *reinterpret_cast<const float4*>(params + i), first = *reinterpret_cast<const float4*>(firsts + i);
    float4 second = *reinterpret_cast<const float4*>(seconds + i);
    step.update(param, *reinterpret_cast<const float4*>(grads + i), first, second);
    *reinterpret_cast<float4*>(params + i) = param;
    if (copies != nullptr) store(copies + i, param);
    *reinterpret_cast<float4*>(firsts + i) = first;
    *reinterpret_cast<float4*>(seconds + i) = second;
  }
  for (int64_t i = quads + threadIdx.x; i < end; i += blockDim.x) {
    step.update(params[i], grads[i], firsts[i], seconds[i]);
    if (copies != nullptr) copies[i] = __float2bfloat16(params[i]);
  }
}
