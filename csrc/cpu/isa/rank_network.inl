// Ranking up to 256 keys without a branch: a bitonic network on 16 vectors of 16 words.
namespace cacovid::cpu {
namespace {

constexpr int64_t network_size = 256;

#if defined(__AVX512F__)
typedef int32_t Lanes16 __attribute__((vector_size(64)));

inline __attribute__((always_inline)) __m512i lower(__m512i a, __m512i b) {
  return _mm512_maskz_min_epu32(0xffff, a, b);
}
inline __attribute__((always_inline)) __m512i upper(__m512i a, __m512i b) {
  return _mm512_maskz_max_epu32(0xffff, a, b);
}

// Each lane l against lane l ^ flip of `other`: the lanes whose `bit` is clear take the smaller word.
template <int flip, int bit>
inline __attribute__((always_inline)) __m512i across(__m512i own, __m512i other) {
  const Lanes16 partner = {0 ^ flip, 1 ^ flip, 2 ^ flip,  3 ^ flip,  4 ^ flip,  5 ^ flip,  6 ^ flip,  7 ^ flip,
                           8 ^ flip, 9 ^ flip, 10 ^ flip, 11 ^ flip, 12 ^ flip, 13 ^ flip, 14 ^ flip, 15 ^ flip};
  constexpr __mmask16 small = bit == 1 ? 0x5555 : bit == 2 ? 0x3333 : bit == 4 ? 0x0f0f : 0x00ff;
  const __m512i met = _mm512_maskz_permutexvar_epi32(0xffff, reinterpret_cast<__m512i>(partner), other);
  return _mm512_mask_min_epu32(upper(own, met), small, own, met);
}

// Word p of the order lies in lane p / 16 of vector p % 16, so that most comparisons are between vectors.
template <int distance>
inline __attribute__((always_inline)) void merge_vectors(__m512i* v) {
  for (int a = 0; a < 16; ++a) {
    if (a & distance) continue;
    const __m512i small = lower(v[a], v[a + distance]);
    v[a + distance] = upper(v[a], v[a + distance]);
    v[a] = small;
  }
}
template <int size>
inline __attribute__((always_inline)) void mirror_vectors(__m512i* v) {
  for (int a = 0; a < 16; ++a) {
    const int b = a ^ (size - 1);
    if (b < a) continue;
    const __m512i small = lower(v[a], v[b]);
    v[b] = upper(v[a], v[b]);
    v[a] = small;
  }
}
template <int lanes>
inline __attribute__((always_inline)) void mirror_lanes(__m512i* v) {
  for (int a = 0; a < 8; ++a) {
    const __m512i x = v[a], y = v[15 - a];
    v[a] = across<lanes - 1, lanes / 2>(x, y);
    v[15 - a] = across<lanes - 1, lanes / 2>(y, x);
  }
}
template <int distance>
inline __attribute__((always_inline)) void merge_lanes(__m512i* v) {
  for (int a = 0; a < 16; ++a) v[a] = across<distance, distance>(v[a], v[a]);
}
inline __attribute__((always_inline)) void merge_all_vectors(__m512i* v) {
  merge_vectors<8>(v);
  merge_vectors<4>(v);
  merge_vectors<2>(v);
  merge_vectors<1>(v);
}

// Exchanges one bit of the lane's number with the same bit of the vector's.
template <int bit>
inline __attribute__((always_inline)) void transpose(__m512i* v) {
  Lanes16 first, second;
  for (int l = 0; l < 16; ++l) {
    first[l] = l & bit ? (l ^ bit) + 16 : l;
    second[l] = l & bit ? l + 16 : l ^ bit;
  }
  for (int a = 0; a < 16; ++a) {
    if (a & bit) continue;
    const __m512i x = v[a], y = v[a + bit];
    v[a] = _mm512_permutex2var_epi32(x, reinterpret_cast<__m512i>(first), y);
    v[a + bit] = _mm512_permutex2var_epi32(x, reinterpret_cast<__m512i>(second), y);
  }
}

// Sorts 256 words ascending. The merges compare mirrored halves first, so that all comparisons point one way.
void sort_network(uint32_t* words) {
  __m512i v[16];
  for (int a = 0; a < 16; ++a) v[a] = _mm512_loadu_si512(words + 16 * a);
  mirror_vectors<2>(v);
  mirror_vectors<4>(v);
  merge_vectors<1>(v);
  mirror_vectors<8>(v);
  merge_vectors<2>(v);
  merge_vectors<1>(v);
  mirror_vectors<16>(v);
  merge_vectors<4>(v);
  merge_vectors<2>(v);
  merge_vectors<1>(v);
  mirror_lanes<2>(v);
  merge_all_vectors(v);
  mirror_lanes<4>(v);
  merge_lanes<1>(v);
  merge_all_vectors(v);
  mirror_lanes<8>(v);
  merge_lanes<2>(v);
  merge_lanes<1>(v);
  merge_all_vectors(v);
  mirror_lanes<16>(v);
  merge_lanes<4>(v);
  merge_lanes<2>(v);
  merge_lanes<1>(v);
  merge_all_vectors(v);
  transpose<1>(v);
  transpose<2>(v);
  transpose<4>(v);
  transpose<8>(v);
  for (int a = 0; a < 16; ++a) _mm512_storeu_si512(words + 16 * a, v[a]);
}
#endif

}  // namespace
}  // namespace cacovid::cpu
