// Stochastic rounding of float32 to bf16, the same on host and device: up or down by lot, with the chance that makes the mean
// right (Gupta et al. 2015, "Deep learning with limited numerical precision", section 3). Updates that are small beside a
// weight's eight bits are then not lost but made now and then.

#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define M6_HOST_DEVICE __host__ __device__
#else
#define M6_HOST_DEVICE
#endif

namespace rounding {

// A bijection in which every bit of `x` reaches all others (Wellons's "lowbias32").
M6_HOST_DEVICE inline uint32_t mixed(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x7feb352dU;
  x = (x ^ (x >> 15)) * 0x846ca68bU;
  return x ^ (x >> 16);
}

// The lots of a parameter at a step. They follow from the two alone, so that a run that goes on draws what it would have.
struct Lots {
  uint32_t key;

  M6_HOST_DEVICE Lots(uint32_t parameter, uint32_t step) : key(mixed(parameter ^ mixed(step))) {}

  M6_HOST_DEVICE uint32_t operator()(int64_t index) const {
    const uint32_t low = static_cast<uint32_t>(index), high = static_cast<uint32_t>(index >> 32);
    return mixed(mixed(low) ^ key ^ mixed(high));
  }
};

// The bits of a float32 number whose lower half is 0: those of one of the two bf16 numbers around the number of `bits`, or
// of that itself.
M6_HOST_DEVICE inline uint32_t rounded(uint32_t bits, uint32_t lot) {
  constexpr uint32_t EXPONENT = 0x7f800000U, SIGN = 0x80000000U, QUIET_NAN = 0x00400000U, LOWER_HALF = 0xffffU;
  if ((bits & ~SIGN) > EXPONENT) return (bits | QUIET_NAN) & ~LOWER_HALF;
  const bool is_infinite = (bits & ~SIGN) == EXPONENT;
  return is_infinite ? bits : (bits + (lot & LOWER_HALF)) & ~LOWER_HALF;
}

}  // namespace rounding
