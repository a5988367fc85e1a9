// CUDA kernels of m6-runtime, compiled to a fat binary by nvcc.
//
// All of them read and write bf16 in words of 16 bytes and compute in float32. Sums are taken in a fixed order, without
// atomics, so that results are the same from run to run.
// Legend: b batch, t positions, c channels, g groups, n rows, k width of a row, f feed-forward width.

#include "adamw.cuh"
#include "cross_entropy.cuh"
#include "experts.cuh"
#include "gates.cuh"
#include "group_norm.cuh"
#include "row_norm.cuh"
#include "rotary.cuh"
#include "short_attention.cuh"
