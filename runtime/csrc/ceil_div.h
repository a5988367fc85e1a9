#pragma once

#include <cstdint>

// The parts of so many into which `a` goes, the last of them perhaps not full.
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
