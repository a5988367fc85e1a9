// What the kernels of attention over short examples work on; read by short_attention.cpp and short_attention.cuh.

#pragma once

#include <cstdint>

// bf16 values of a head.
constexpr int HEAD_WIDTH = 64;
// Rows that a warp holds at once.
constexpr int ROWS_OF_WARP = 16;
// Rows of a matrix in shared memory come in steps of these; what is past an example is zero.
constexpr int ROWS_STEP = 32;
// Threads of a block at most, forward and backward.
constexpr int ATTENTION_THREADS = 256;
constexpr int ATTENTION_GRAD_THREADS = 512;

// Heads `[n, h, 64]` in bf16, the heads of a token close together.
struct Heads {
  void* values;
  // From a token to the next.
  int64_t stride;
};

struct ShortAttention {
  Heads q, k, v;
  // `[n, 64]`; null where queries and keys are not turned.
  const float *cosines, *sines;
  // Where examples begin, `[examples + 1]`, and the tokens of their prefixes.
  const int *starts, *prefixes;
  // `[n, h, 64]`.
  Heads out;
  // Base 2 logarithms of the sums of the exponentials of scores, `[h, n]`.
  float* log_sums;
  int64_t n;
  int h;
  // Blocks, one for each head of each example, and how many of them run at once.
  int blocks, running;
};

struct ShortAttentionGrads {
  Heads out, q, k, v;
};
