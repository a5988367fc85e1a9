// Group norm over [b, t, c], optionally followed by swish.

#include "common.cuh"

namespace {

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
