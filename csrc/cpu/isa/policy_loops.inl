// Packed masks, sums over combinations, and the loss and gradient of each token.
#pragma once

#include "isa/noise_loops.inl"
#include "isa/policy_loops.h"

namespace cacovid::cpu {
namespace {

// 32 bytes to the bits of a word.
inline __attribute__((always_inline)) uint32_t nonzero_bits(const uint8_t* bytes) {
#if defined(__AVX512BW__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return _mm256_test_epi8_mask(x, x);
#elif defined(__AVX2__)
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  return ~static_cast<uint32_t>(_mm256_movemask_epi8(_mm256_cmpeq_epi8(x, _mm256_setzero_si256())));
#else
  uint32_t word = 0;
  for (int part = 0; part < 4; ++part) {
    uint64_t x;
    std::memcpy(&x, bytes + 8 * part, sizeof x);
    constexpr uint64_t low = 0x7f7f7f7f7f7f7f7f;
    const uint64_t ones = (((x & low) + low) | x) >> 7 & 0x0101010101010101;
    word |= static_cast<uint32_t>(ones * 0x0102040810204080 >> 56) << (8 * part);  // byte k to bit k of the top byte
  }
  return word;
#endif
}

void pack_bytes(const uint8_t* bytes, int64_t n, uint32_t* words) {
  int64_t i = 0;
  for (; i + word_tokens <= n; i += word_tokens) *words++ = nonzero_bits(bytes + i);
  if (i < n) {
    uint8_t last[word_tokens] = {};
    std::memcpy(last, bytes + i, static_cast<size_t>(n - i));
    *words = nonzero_bits(last);
  }
}

int64_t count_bits(const uint32_t* words, int64_t count) {
  int64_t bits = 0, i = 0;
  for (; i + 2 <= count; i += 2) {  // the instruction counts 64 of them
    uint64_t pair;
    std::memcpy(&pair, words + i, sizeof pair);
    bits += __builtin_popcountll(pair);
  }
  return i < count ? bits + __builtin_popcount(words[i]) : bits;
}

#if defined(__AVX512F__)
// What limits this loop is the work on masks: they are loaded as bytes, not shifted out of a word, and never inverted.
// A dropped token's addend is blended with +0 instead, which changes no sum that began at +0.
void add_rows(const WeightedRow* rows, int64_t count, int64_t word, double* kept, double* dropped) {
  const __m512d zero = _mm512_setzero_pd();
  __m512d k[4], d[4];
  for (int j = 0; j < 4; ++j) k[j] = d[j] = zero;
  for (int64_t r = 0; r < count; ++r) {
    const uint8_t* bits = reinterpret_cast<const uint8_t*>(rows[r].words + word);
    const __m512d add_kept = _mm512_set1_pd(rows[r].kept), add_dropped = _mm512_set1_pd(rows[r].dropped);
    for (int j = 0; j < 4; ++j) {
      const __mmask8 mask = bits[j];
      k[j] = _mm512_mask_add_pd(k[j], mask, k[j], add_kept);
      d[j] = _mm512_add_pd(d[j], _mm512_mask_blend_pd(mask, add_dropped, zero));
    }
  }
  for (int j = 0; j < 4; ++j) {
    _mm512_storeu_pd(kept + 8 * j, k[j]);
    _mm512_storeu_pd(dropped + 8 * j, d[j]);
  }
}
#else
typedef double Doubles __attribute__((vector_size(8 * wide_lanes)));

// Masks of lanes by the bits of a number.
struct LaneMasks {
  Wide of[1 << wide_lanes];
  constexpr LaneMasks() : of() {
    for (int bits = 0; bits < 1 << wide_lanes; ++bits) {
      for (int l = 0; l < wide_lanes; ++l) of[bits][l] = (bits >> l & 1) != 0 ? ~uint64_t{0} : 0;
    }
  }
};

void add_rows(const WeightedRow* rows, int64_t count, int64_t word, double* kept, double* dropped) {
  static const LaneMasks masks;
  constexpr int parts = 4;  // so many pairs of sums stay in registers
  for (int first = 0; first < word_tokens; first += parts * wide_lanes) {
    Doubles k[parts] = {}, d[parts] = {};
    for (int64_t r = 0; r < count; ++r) {
      const uint32_t bits = rows[r].words[word] >> first;
      const Wide add_kept = reinterpret_cast<Wide>(Doubles{} + rows[r].kept);
      const Wide add_dropped = reinterpret_cast<Wide>(Doubles{} + rows[r].dropped);
      for (int p = 0; p < parts; ++p) {
        const Wide mask = masks.of[bits >> (p * wide_lanes) & ((1 << wide_lanes) - 1)];
        k[p] += reinterpret_cast<Doubles>(add_kept & mask);
        d[p] += reinterpret_cast<Doubles>(add_dropped & ~mask);
      }
    }
    std::memcpy(kept + first, k, sizeof k);
    std::memcpy(dropped + first, d, sizeof d);
  }
}
#endif

inline __attribute__((always_inline)) double load_wide(double x) { return x; }
template <class T>
inline __attribute__((always_inline)) double load_wide(T x) {
  return static_cast<double>(load_float(x));
}

// Strides that the compiler knows make a loop of vector instructions.
template <class T>
inline __attribute__((always_inline)) void load_odds_of(const OddsRow& row, int64_t first, int64_t n, double* odds) {
  const T* x = static_cast<const T*>(row.data) + first * row.stride;
  if (!row.pairs && row.stride == 1) {
    for (int64_t i = 0; i < n; ++i) odds[i] = load_wide(x[i]);
  } else if (!row.pairs) {
    for (int64_t i = 0; i < n; ++i) odds[i] = load_wide(x[i * row.stride]);
  } else if (row.stride == 2 && row.pair_stride == 1) {
    for (int64_t i = 0; i < n; ++i) odds[i] = load_wide(x[2 * i + 1]) - load_wide(x[2 * i]);
  } else {
    for (int64_t i = 0; i < n; ++i) {
      odds[i] = load_wide(x[i * row.stride + row.pair_stride]) - load_wide(x[i * row.stride]);
    }
  }
}

void load_odds(const OddsRow& row, int64_t first, int64_t n, double* odds) {
  switch (row.dtype) {
    case DType::f64: return load_odds_of<double>(row, first, n, odds);
    case DType::bf16: return load_odds_of<bf16_t>(row, first, n, odds);
    case DType::f16: return load_odds_of<f16_t>(row, first, n, odds);
    default: return load_odds_of<float>(row, first, n, odds);
  }
}

template <class T>
inline __attribute__((always_inline)) void store_gradient(const double* gradient, int64_t n, bool pairs, T* out) {
  if (!pairs) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<T>(gradient[i]);
    return;
  }
  for (int64_t i = 0; i < n; ++i) {
    out[2 * i] = static_cast<T>(-gradient[i]);
    out[2 * i + 1] = static_cast<T>(gradient[i]);
  }
}

// __restrict: without it so many pointers keep the loop from vectorising.
template <bool WithDivergence>
void loop_terms(const double* odds, const double* old_odds, const PolicyTokens& t, int64_t first, int64_t n,
                double* __restrict loss, double* __restrict gradient) {
  const double* s[policy_sums_rows];
  for (int row = 0; row < policy_sums_rows; ++row) s[row] = t.sums + row * t.tokens + first;
  const PolicyRule rule = t.rule;
  const double scale = t.scale;
  for (int64_t i = 0; i < n; ++i) {
    const double sums[policy_sums_rows] = {s[0][i], s[1][i], s[2][i], s[3][i], s[4][i], s[5][i]};
    const PolicyTerm term = policy_term<WithDivergence>(odds[i], old_odds[i], sums, rule);
    loss[i] = term.loss;
    gradient[i] = term.gradient * scale;
  }
}

double terms(const PolicyTokens& t, int64_t first, int64_t n) {
  double odds[policy_block], old_odds[policy_block], loss[policy_block], gradient[policy_block];
  load_odds(t.odds, first, n, odds);
  load_odds(t.old_odds, first, n, old_odds);
  (t.rule.kl_weight != 0.0 ? loop_terms<true> : loop_terms<false>)(odds, old_odds, t, first, n, loss, gradient);
  const int64_t at = t.odds.pairs ? 2 * first : first;
  if (t.odds.dtype == DType::f64) {
    store_gradient(gradient, n, t.odds.pairs, static_cast<double*>(t.gradient) + at);
  } else {
    store_gradient(gradient, n, t.odds.pairs, static_cast<float*>(t.gradient) + at);
  }
  return sum(loss, n);
}

constexpr PolicyLoops policy_loop_table = {pack_bytes, count_bits, add_rows, terms};

}  // namespace
}  // namespace cacovid::cpu
