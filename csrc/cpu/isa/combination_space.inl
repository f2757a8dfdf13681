// Online combination space sampling: the distribution that a frame's combinations are drawn from.
#pragma once

#include "cacovid/combinations.h"
#include "isa/combination_loops.h"
#include "isa/noise_loops.inl"
#include "isa/rank_network.inl"
#include "race.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

// Some slots of a group, signed because comparing unsigned words takes AVX2 several instructions. Not wider than the
// registers of the instruction set: GCC takes wider vectors apart, element by element.
#if defined(__AVX512F__)
constexpr int slot_lanes = 16;
#elif defined(__AVX2__)
constexpr int slot_lanes = 8;
#else
constexpr int slot_lanes = 4;
#endif
typedef int32_t Slots __attribute__((vector_size(4 * slot_lanes)));
typedef float SlotValues __attribute__((vector_size(4 * slot_lanes)));

#if defined(__AVX512F__)
// Words of the network as positions: what looks equal, because the keys have lost their low bits, is ordered by the
// full keys. False if there is too much of it.
inline bool repair_ranks(const uint32_t* keys, int64_t n, uint32_t* words) {
  int32_t alike = 0;
  for (int64_t r = 1; r < n; ++r) alike += words[r] >> 8 == words[r - 1] >> 8;
  if (alike > 16) return false;
  for (int64_t r = 1; alike > 0; ++r) {
    if (words[r] >> 8 != words[r - 1] >> 8) continue;
    --alike;
    for (int64_t j = r; j > 0 && words[j] >> 8 == words[j - 1] >> 8; --j) {
      if (keys[words[j - 1] & 255] >= keys[words[j] & 255]) break;  // of equal keys the lower index is first already
      const uint32_t word = words[j];
      words[j] = words[j - 1];
      words[j - 1] = word;
    }
  }
  return true;
}

// A word holds how far a key is from the largest, as much of it as 24 bits take, and the position.
bool rank_by_network(const KeyRow& row, int64_t n, uint32_t* order) {
  alignas(64) uint32_t words[network_size];
  const uint32_t range = row.largest - row.smallest;
  const int shift = range >> 24 ? 8 - __builtin_clz(range) : 0;
  const int64_t padded_n = padded16(n);
  for (int64_t i = 0; i < padded_n; ++i) {
    words[i] = (row.largest - row.keys[i]) >> shift << 8 | static_cast<uint32_t>(i);
  }
  for (int64_t i = n; i < padded_n; ++i) words[i] = 0xffffffffu;
  for (int64_t i = padded_n; i < network_size; ++i) words[i] = 0xffffffffu;
  sort_network(words);
  if (shift > 0 && !repair_ranks(row.keys, n, words)) return false;
  for (int64_t r = 0; r < padded_n; ++r) order[r] = words[r] & 255;
  return true;
}
#endif

// Positions by falling key, the lower position first among equals.
void rank_tokens(const KeyRow& row, int64_t n, uint32_t* order) {
#if defined(__AVX512F__)
  if (n <= network_size && rank_by_network(row, n, order)) return;
#endif
  rank_by_sorting(row.keys, n, order);
}

// Sorts each run of 8 words, or of 16, by a bitonic network. In a step word l meets word l ^ flip; the one whose `bit`
// is clear keeps the smaller word.
#if defined(__AVX512F__)
template <int flip, int bit>
inline __attribute__((always_inline)) void meet(__m512i& words) {
  words = across<flip, bit>(words, words);
}
template <int run>
void sort_runs(uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    __m512i v = _mm512_loadu_si512(words + i);
#else
template <int flip, int bit, int run>
inline __attribute__((always_inline)) void meet(uint32_t (&words)[run]) {
  for (int l = 0; l < run; ++l) {
    if (l & bit) continue;
    const uint32_t a = words[l], b = words[l ^ flip];
    words[l] = a < b ? a : b;
    words[l ^ flip] = a < b ? b : a;
  }
}
template <int run>
void sort_runs(uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; i += run) {
    uint32_t v[run];
    std::memcpy(v, words + i, sizeof v);
#endif
    meet<1, 1>(v);
    meet<3, 2>(v);
    meet<1, 1>(v);
    meet<7, 4>(v);
    meet<2, 2>(v);
    meet<1, 1>(v);
    if constexpr (run == 16) {
      meet<15, 8>(v);
      meet<4, 4>(v);
      meet<2, 2>(v);
      meet<1, 1>(v);
    }
    std::memcpy(words + i, &v, sizeof v);
  }
}

// The first `count` of `width` words, a multiple of 8, then the filler. May read `width` words.
inline __attribute__((always_inline)) void copy_padded(const uint32_t* words, int64_t count, int64_t width,
                                                       uint32_t filler, uint32_t* out) {
#if defined(__AVX512VL__)
  for (int64_t l = 0; l < width; l += 8) {
    const int64_t left = count - l < 0 ? 0 : count - l < 8 ? count - l : 8;
    const __mmask8 inside = static_cast<__mmask8>((1 << left) - 1);
    const __m256i eight = _mm256_mask_loadu_epi32(_mm256_set1_epi32(static_cast<int32_t>(filler)), inside, words + l);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + l), eight);
  }
#else
  for (int64_t l = 0; l < width; l += 8) std::memcpy(out + l, words + l, 8 * sizeof(uint32_t));
  for (int64_t l = count; l < width; ++l) out[l] = filler;
#endif
}

// Tokens by group, ascending in each; the slots beyond hold P, which is no token.
void fill_groups(const CombinationPlan& p, const FrameSpace& f) {
  const int64_t size = p.tokens_per_frame / p.num_groups, remainder = p.tokens_per_frame % p.num_groups;
  const int64_t slots = p.num_groups * f.width;
  const uint32_t* first = f.order;
  uint32_t* out = f.token;
  for (int64_t g = 0; g < p.num_groups; ++g, out += f.width) {
    const int64_t length = size + (g < remainder ? 1 : 0);
    copy_padded(first, length, f.width, static_cast<uint32_t>(p.tokens_per_frame), out);
    first += length;
  }
  if (f.width > slot_block) {
    for (int64_t i = 0; i < slots; i += f.width) sort_ascending(f.token + i, f.width);
  } else {
    for (int64_t i = slots; i < padded16(slots); ++i) f.token[i] = static_cast<uint32_t>(p.tokens_per_frame);
    f.width == 8 ? sort_runs<8>(f.token, slots) : sort_runs<16>(f.token, slots);
  }
}

// exp(score - best); where a score is +inf, 1 for those and 0 for all others.
void fill_exps(const float* score, int64_t slots, float best, float* exps) {
  if (best == __builtin_inff()) {
    for (int64_t i = 0; i < slots; ++i) exps[i] = score[i] == best ? 1.0f : 0.0f;
  } else {
    for (int64_t i = 0; i < slots; ++i) exps[i] = exp_float(score[i] - best);
  }
}

// Sums of the fixed-point exps of every group, as float64, and of all.
int64_t sum_groups(const int64_t* fixed, int64_t groups, int64_t width, double* sum) {
  int64_t all = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t inside = 0;
    for (int64_t i = g * width; i < (g + 1) * width; i += 8) {
      for (int64_t l = 0; l < 8; ++l) inside += fixed[i + l];
    }
    sum[g] = from_fixed(inside);
    all += inside;
  }
  return all;
}

// weight = exps times the scale of the slot's group, clamped; 0 where the score is no number above -inf.
void fill_weights(const CombinationPlan& p, const float* score, const float* exps, const float* scale, int64_t width,
                  float* weight) {
  typedef float Floats8 __attribute__((vector_size(32)));  // GCC unrolls a plain loop over 8 before it vectorises
  const int64_t slots = p.num_groups * width;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    for (int64_t i = g * width; i < (g + 1) * width; i += 8) {
      Floats8 e;
      std::memcpy(&e, exps + i, sizeof e);
      e *= scale[g];
      std::memcpy(weight + i, &e, sizeof e);
    }
  }
  for (int64_t i = slots; i < padded16(slots); ++i) weight[i] = 0.0f;
  const float uniform = uniform_weight(p);
  for (int64_t i = 0; i < padded16(slots); ++i) {
    weight[i] = score[i] > -__builtin_inff() ? clamped_weight(weight[i], uniform) : 0.0f;
  }
}

void prepare(const KeyRow& row, const CombinationPlan& plan, FrameSpace& f) {
  const CombinationPlan p = plan;  // a copy, which stores to the arrays cannot change
  const int64_t n = p.tokens_per_frame, slots = padded16(p.num_groups * f.width), groups = padded16(p.num_groups);
  rank_tokens(row, n, f.order);
  f.valid = n;
  if (row.smallest <= key_neginf) {
    while (f.valid > 0 && row.keys[f.order[f.valid - 1]] <= key_neginf) --f.valid;
  }
  fill_groups(p, f);
  float* score = f.log_weight;
  for (int64_t i = 0; i < slots; ++i) score[i] = key_score(row.keys[f.token[i]]);  // NaN where there is no token
  fill_exps(score, slots, key_score(row.largest), f.exps);
  for (int64_t i = 0; i < slots; ++i) f.fixed[i] = to_fixed(static_cast<double>(f.exps[i]));
  const int64_t all = sum_groups(f.fixed, p.num_groups, f.width, f.share);
  const double total = from_fixed(all > 0 ? all : 1), inverse = 1.0 / total;
  for (int64_t g = p.num_groups; g < groups; ++g) f.share[g] = 0.0;
  for (int64_t g = 0; g < groups; ++g) f.share[g] = f.share[g] * inverse;
  for (int64_t g = 0; g < groups; ++g) f.log_share[g] = weight_scale(f.share[g], total);
  fill_weights(p, score, f.exps, f.log_share, f.width, f.weight);
  log_weights(f.weight, slots, f.log_weight);
  f.open = open_groups(p, f.valid);
  cap_shares(ShareArray{f.share, groups}, f.open, p.group_cap);
  for (int64_t g = 0; g < groups; ++g) f.log_share[g] = static_cast<float>(f.share[g]);
  log_weights(f.log_share, groups, f.log_share);
  for (int64_t g = 0; g < groups; ++g) f.cumulative[g] = static_cast<uint32_t>(share_weight(f.share[g]));
  for (int64_t g = 1; g < groups; ++g) f.cumulative[g] += f.cumulative[g - 1];
}

}  // namespace
}  // namespace cacovid::cpu
