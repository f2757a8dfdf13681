// Accesses as wide as alignment allows.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace cacovid::cuda {

// An integer of 1 to 16 bytes: what one access moves.
template <int Bytes>
struct Word;
template <>
struct Word<1> {
  using type = uint8_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

// The widest access that everything or-ed into `bits`, addresses and byte counts, is a multiple of.
inline int widest(uint64_t bits) {
  const uint64_t lowest = bits & (~bits + 1);
  return lowest == 0 || lowest > 16 ? 16 : static_cast<int>(lowest);
}

// For data that is read once and that this kernel does not write: past L1, whose lines others need.
template <class T>
__device__ __forceinline__ T load_once(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    uint4 x;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
        : "l"(from));
    return x;
  } else {
    return __ldg(from);
  }
#else
  return *from;
#endif
}

// For data that is read once and that other threads of this kernel may write later: past L1, but never stale.
template <class T>
__device__ __forceinline__ T load_before_writes(const T* from) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == 16) {
    uint4 x;
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
  } else {
    return *from;
  }
#else
  return *from;
#endif
}

}  // namespace cacovid::cuda
