// Rotation of pairs: products and sums rounded one by one, as by rotate_rows of the CPU engine.
#pragma once

#include "cacovid/round.h"
#include "memory.cuh"

namespace cacovid::cuda {

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bf16_t x) { return load_float(x); }
__device__ __forceinline__ float widen(f16_t x) { return load_float(x); }
__device__ __forceinline__ void narrow(double* to, double x) { *to = x; }
template <class T>
__device__ __forceinline__ void narrow(T* to, float x) {
  store_float(to, x);
}

// The cosines or sines of `Count` pairs.
template <int Count>
__device__ __forceinline__ void load_angles(float (&angles)[Count], const float* from) {
  constexpr int bytes = Count * 4 < 16 ? Count * 4 : 16;
  using Access = typename Word<bytes>::type;
#pragma unroll
  for (int i = 0; i < Count; i += bytes / 4) {
    const Access word = __ldg(reinterpret_cast<const Access*>(from + i));
    std::memcpy(&angles[i], &word, bytes);
  }
}

// `low` and `high` hold as many elements of type T, each of which is a pair with its counterpart.
template <class T, class Access>
__device__ __forceinline__ void rotate(Access& low, Access& high, const float* cos, const float* sin) {
  constexpr int count = sizeof(Access) / sizeof(T);
  using Wide = decltype(widen(T{}));
  T a[count], b[count];
  float c[count], s[count];
  std::memcpy(a, &low, sizeof low);
  std::memcpy(b, &high, sizeof high);
  load_angles(c, cos);
  load_angles(s, sin);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const Wide x = widen(a[i]), y = widen(b[i]), cosine = c[i], sine = s[i];
    narrow(&a[i], x * cosine - y * sine);
    narrow(&b[i], y * cosine + x * sine);
  }
  std::memcpy(&low, a, sizeof low);
  std::memcpy(&high, b, sizeof high);
}

}  // namespace cacovid::cuda
