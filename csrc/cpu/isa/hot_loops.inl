// Included by baseline.cpp, avx2.cpp and avx512.cpp, which define CACOVID_LOOPS and their compiler flags.
// Everything here has internal linkage: a shared inline function could leak AVX code into the baseline.
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "cacovid/order.h"
#include "cacovid/status.h"
#include "isa/hot_loops.h"
#include "isa/pool_frame.inl"

namespace cacovid::cpu {
namespace {

template <class T>
int32_t load_keys_as(const T* scores, int64_t stride, int64_t n, uint32_t* keys) {
  uint32_t nan = 0, posinf = 0;
  const auto load = [&](int64_t i, T x) {
    const uint32_t key = order_key(load_float(x));
    nan |= key == key_nan;
    posinf |= key == key_posinf;
    keys[i] = key;
  };
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) load(i, scores[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) load(i, scores[i * stride]);
  }
  for (int64_t i = n; i < padded(n); ++i) keys[i] = 0;
  return (nan ? status_nan : 0) | (posinf ? status_posinf : 0);
}

int32_t load_keys(const void* scores, DType dtype, int64_t stride, int64_t n, uint32_t* keys) {
  switch (dtype) {
    case DType::bf16: return load_keys_as(static_cast<const bf16_t*>(scores), stride, n, keys);
    case DType::f16: return load_keys_as(static_cast<const f16_t*>(scores), stride, n, keys);
    default: return load_keys_as(static_cast<const float*>(scores), stride, n, keys);
  }
}

// Bit i of the result: keys[i] >= threshold, for one block of 64 keys.
inline uint64_t at_least(const uint32_t* keys, uint32_t threshold) {
  uint64_t mask = 0;
#if defined(__AVX512F__)
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  for (int i = 0; i < 4; ++i) {
    const __m512i block = _mm512_loadu_si512(keys + 16 * i);
    mask |= static_cast<uint64_t>(_mm512_cmpge_epu32_mask(block, t)) << (16 * i);
  }
#elif defined(__AVX2__)
  const __m256i t = _mm256_set1_epi32(static_cast<int>(threshold));
  for (int i = 0; i < 8; ++i) {
    const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
    const __m256i ge = _mm256_cmpeq_epi32(_mm256_max_epu32(block, t), block);
    mask |= static_cast<uint64_t>(static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(ge)))) << (8 * i);
  }
#else
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>(keys[i] >= threshold) << i;
#endif
  return mask;
}

// Padding keys are 0, so only a threshold of 0 could count them; the search never asks for that.
inline int64_t count_at_least(const uint32_t* keys, int64_t blocks, uint32_t threshold) {
#if defined(__AVX2__)
  int64_t count = 0;
  for (int64_t b = 0; b < blocks; ++b) count += __builtin_popcountll(at_least(keys + key_block * b, threshold));
  return count;
#else
  int32_t count = 0;
  for (int64_t i = 0; i < blocks * key_block; ++i) count += keys[i] >= threshold;
  return count;
#endif
}

// The k largest keys are found by fixing the bits of the k-th one from the top: 32 counting passes at
// most, no data movement, the same work whatever the order of the scores.
void top_positions(const uint32_t* keys, int64_t n, int64_t k, int32_t* positions) {
  if (k <= 0) return;
  if (k == n) {
    for (int64_t i = 0; i < n; ++i) positions[i] = static_cast<int32_t>(i);
    return;
  }
  const int64_t blocks = padded(n) / key_block;
  uint32_t smallest = 0xffffffffu, largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    smallest = keys[i] < smallest ? keys[i] : smallest;
    largest = keys[i] > largest ? keys[i] : largest;
  }
  int64_t above = -1;  // keys >= threshold, once known to be exactly k
  uint32_t threshold = smallest;
  if (smallest != largest) {
    int bit = 31 - __builtin_clz(smallest ^ largest);
    threshold = bit == 31 ? 0u : largest >> (bit + 1) << (bit + 1);
    for (; bit >= 0; --bit) {
      const uint32_t candidate = threshold | 1u << bit;
      const int64_t count = count_at_least(keys, blocks, candidate);
      if (count >= k) threshold = candidate;
      if (count == k) {
        above = k;
        break;
      }
    }
  }
  // Without an exact hit the threshold is the k-th key itself and its equals share the last places.
  int64_t ties = 0;
  if (above != k) ties = threshold == 0xffffffffu ? k : k - count_at_least(keys, blocks, threshold + 1);
  for (int64_t b = 0; b < blocks && k > 0; ++b) {
    const uint32_t* block = keys + key_block * b;
    uint64_t taken = at_least(block, threshold);
    if (above != k && above < 0) {
      uint64_t greater = threshold == 0xffffffffu ? 0 : at_least(block, threshold + 1);
      uint64_t equal = taken & ~greater;
      if (threshold == 0 && n - key_block * b < key_block) equal &= (1ull << (n - key_block * b)) - 1;
      taken = greater;
      for (; equal && ties > 0; --ties, equal &= equal - 1) taken |= equal & -equal;
    }
    for (; taken; taken &= taken - 1) {
      *positions++ = static_cast<int32_t>(key_block * b + __builtin_ctzll(taken));
      --k;
    }
  }
}

}  // namespace

extern const HotLoops CACOVID_LOOPS;
const HotLoops CACOVID_LOOPS = {CACOVID_LOOPS_NAME, load_keys, top_positions, pool_frame};

}  // namespace cacovid::cpu
