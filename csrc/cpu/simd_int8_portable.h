// Products of 8-bit codes in plain C++; simd_int8_avx512.h explains the members.
#pragma once

#include "cpu/simd_portable.h"

namespace mixrank {
namespace {

struct Int8 {
  using Acc = int32_t;
  using Unit = int32_t;
  typedef int32_t V __attribute__((vector_size(16)));
  using UnitV = V;
  using Left = int32_t;
  static constexpr bool kHasZero = false;
  static constexpr int kPack = 1, kLanes = 4, kRows = 6, kVecs = 2;

  static V zero() { return V{}; }
  static Unit one() { return 1; }
  static V load(const int32_t* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  static UnitV load(const Codes<1>* p) { return V{p[0].of[0], p[1].of[0], p[2].of[0], p[3].of[0]}; }
  static V broadcast(const int32_t* p) { return all(*p); }
  static V fma(UnitV a, UnitV b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V subtract(V a, V b) { return a - b; }
  static void store(int32_t* p, V v) { memcpy(p, &v, sizeof(v)); }
  static void store_left(int32_t* p, V v) { store(p, v); }

  static V all(int32_t value) { return V{value, value, value, value}; }
  static V clamp(V v, int32_t low, int32_t high) {
    for (int i = 0; i < kLanes; ++i) v[i] = v[i] < low ? low : v[i] > high ? high : v[i];
    return v;
  }
  // To nearest even, and any number for what no int32 holds: such rows have no values.
  static V round(F32::V v) {
    V rounded;
    for (int i = 0; i < kLanes; ++i) {
      const float nearest = __builtin_rintf(v[i]);
      rounded[i] = nearest > -1e9f && nearest < 1e9f ? static_cast<int32_t>(nearest) : 0;
    }
    return rounded;
  }
  static F32::V to_float(V v) { return __builtin_convertvector(v, F32::V); }
  static F32::V multiply(F32::V a, F32::V b) { return a * b; }
  static F32::V least(F32::V a, F32::V b) { return a < b ? a : b; }
  static F32::V largest(F32::V a, F32::V b) { return a > b ? a : b; }
};

}  // namespace
}  // namespace mixrank
