// The vector layer in plain C++ with the compilers' vector types; simd_avx512.h explains the members.
#pragma once

#include "cpu/scalar.h"

namespace mixrank {
namespace {

// Sixteen bytes: what every 64-bit processor has in one register.
template <class Scalar>
struct Portable {
  using Wide = Portable;
  using Narrow = void;
  using Acc = Scalar;
  using Unit = Scalar;
  using Lane = int32_t;
  typedef Scalar V __attribute__((vector_size(16)));
  using UnitV = V;
  static constexpr int kLanes = 16 / sizeof(Scalar), kPack = 1, kRows = 6, kVecs = 2, kDotRows = 4, kDotCols = 2, kGramRows = 4;
  static constexpr bool kWidensFast = false, kExpands = false;

  static V zero() { return V{}; }
  static Unit one() { return 1; }
  static V load(const Scalar* p) {
    V v;
    memcpy(&v, p, sizeof(v));
    return v;
  }
  template <class T>
  static V load(const T* p) {
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = widen(p[i]);
    return v;
  }
  static V broadcast(const Scalar* p) { return *p - V{}; }
  static V fma(V a, V b, V c) { return a * b + c; }
  static V add(V a, V b) { return a + b; }
  static V choose(V a, V b, const Lane* lanes) {
    V v;
    for (int i = 0; i < kLanes; ++i) v[i] = lanes[i] < kLanes ? a[lanes[i]] : b[lanes[i] - kLanes];
    return v;
  }
  static Scalar reduce(V v) {
    Scalar sum = v[0];
    for (int i = 1; i < kLanes; ++i) sum += v[i];
    return sum;
  }
  template <class T>
  static void store(T* p, V v) {
    for (int i = 0; i < kLanes; ++i) narrow(v[i], p + i);
  }
};

using F32 = Portable<float>;
using F64 = Portable<double>;

inline void store_transposed(const F32::V* rows, float* dst, int64_t dst_stride) {
  for (int c = 0; c < F32::kLanes; ++c) {
    F32::V column;
    for (int r = 0; r < F32::kLanes; ++r) column[r] = rows[r][c];
    F32::store(dst + c * dst_stride, column);
  }
}

}  // namespace
}  // namespace mixrank
