// Rows of tokens sorted by expert and back: tokens `[n, k]`, each of which has `a` of the `r = a n` rows `[r, k]`.
//
// `order[row]` is `choice * n + token`, and `places`, `[a, n]`, its inverse.

#include "common.cuh"

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
