// Conversions of single elements, exact in both directions up to one rounding to nearest even; NaN stays NaN.
// Everything has internal linkage, so that each file compiles its own copy for its own instruction set.
#pragma once

#include <cstring>

#include "cpu/types.h"

namespace mixrank {
namespace {

inline float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

inline uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(Codes<1> value) { return value.of[0]; }
inline float widen(BFloat value) { return as_float(static_cast<uint32_t>(value.bits) << 16); }

inline float widen(Half value) {
  const uint32_t magnitude = value.bits & 0x7fffu;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude << 13));
  // Through an integer, so that subnormals survive a thread that flushes subnormal floats.
  if (magnitude < 0x0400u) return as_float(sign | as_bits(static_cast<float>(static_cast<int>(magnitude)) * 0x1p-24f));
  return as_float(sign | ((magnitude << 13) + 0x38000000u));
}

inline void narrow(float value, float* out) { *out = value; }
inline void narrow(double value, double* out) { *out = value; }

inline void narrow(float value, BFloat* out) {
  const uint32_t bits = as_bits(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  out->bits = static_cast<uint16_t>((is_nan ? (bits | 0x00400000u) : rounded) >> 16);
}

inline void narrow(float value, Half* out) {
  const uint32_t bits = as_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {
    // Adding one half leaves the multiple of 2^-24, rounded to nearest even, in the low bits.
    half = as_bits(as_float(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

inline int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

}  // namespace
}  // namespace mixrank
