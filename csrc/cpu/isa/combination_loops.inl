// Online combination space sampling: a frame's distribution, and draws from small groups of tokens.
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
#if defined(__AVX2__)
constexpr int slot_lanes = 8;
#else
constexpr int slot_lanes = 4;
#endif
typedef int32_t Slots __attribute__((vector_size(4 * slot_lanes)));
typedef float SlotValues __attribute__((vector_size(4 * slot_lanes)));

// A ranking by the words of a network whose keys may have lost their low bits: neighbours that look equal are
// ordered by their full keys. False if there are too many of them.
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

// Positions by falling key, the lower position first among equals.
void rank_tokens(const KeyRow& row, int64_t n, uint32_t* order) {
#if defined(__AVX512F__)
  if (n <= network_size) {
    const uint32_t range = row.largest - row.smallest;
    const int shift = range >> 24 ? 8 - __builtin_clz(range) : 0;
    alignas(64) uint32_t words[network_size];
    for (uint32_t i = 0; i < network_size; ++i) words[i] = 0xffffffffu;
    for (int64_t i = 0; i < n; ++i) {
      words[i] = (row.largest - row.keys[i]) >> shift << 8 | static_cast<uint32_t>(i);
    }
    sort_network(words);
    if (shift == 0 || repair_ranks(row.keys, n, words)) {
      for (int64_t r = 0; r < n; ++r) order[r] = words[r] & 255;
      return;
    }
  }
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

// Tokens by group, ascending in each; the slots beyond hold P, which is no token.
void fill_groups(const CombinationPlan& p, const FrameSpace& f) {
  const int64_t size = p.tokens_per_frame / p.num_groups, remainder = p.tokens_per_frame % p.num_groups;
  const uint32_t* first = f.order;
  for (int64_t g = 0; g < p.num_groups; ++g) {
    const int64_t length = size + (g < remainder ? 1 : 0);
    uint32_t* slots = f.token + g * f.width;
    for (int64_t l = 0; l < f.width; l += 8) std::memcpy(slots + l, first + l, 8 * sizeof(uint32_t));
    for (int64_t l = length; l < f.width; ++l) slots[l] = static_cast<uint32_t>(p.tokens_per_frame);
    first += length;
  }
  const int64_t slots = p.num_groups * f.width;
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
  const float least = 0.5f * uniform_weight(p), most = 2.0f * uniform_weight(p);
  for (int64_t i = 0; i < padded16(slots); ++i) {
    const float raised = weight[i] < least ? least : weight[i];
    const float clamped = raised > most ? most : raised;
    weight[i] = score[i] > -__builtin_inff() ? clamped : 0.0f;
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
  cap_shares(f.share, f.open, p.group_cap, groups);
  for (int64_t g = 0; g < groups; ++g) f.log_share[g] = static_cast<float>(f.share[g]);
  log_weights(f.log_share, groups, f.log_share);
  uint32_t sum = 0;
  for (int64_t g = 0; g < groups; ++g) f.cumulative[g] = sum += static_cast<uint32_t>(share_weight(f.share[g]));
}

void draw_groups(const FrameSpace& f, const FrameDraws& d, int32_t* groups) {
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  const int64_t total = f.cumulative[f.open - 1], n = padded16(d.count);
  uint32_t column[noise_block], stream_sample[noise_block], bits[noise_block];
  for (uint32_t l = 0; l < noise_block; ++l) {
    column[l] = static_cast<uint32_t>(d.frame);
    stream_sample[l] = stream_word(stream_groups, static_cast<uint32_t>(d.first_sample) + l);
  }
  for (int64_t s = 0; s < n; s += noise_block) {
    random_block(column, stream_sample, row, bits);
    for (int l = 0; l < noise_block; ++l) {
      groups[s + l] = static_cast<int32_t>(share_threshold(bits[l], total));
      stream_sample[l] += noise_block;
    }
  }
  for (int64_t s = 0; s < n; s += slot_lanes) {
    Slots found = {}, threshold;
    std::memcpy(&threshold, groups + s, sizeof threshold);
    for (int64_t g = 0; g < f.open - 1; ++g) found -= static_cast<int32_t>(f.cumulative[g]) <= threshold;
    std::memcpy(groups + s, &found, sizeof found);
  }
}

// A few samples of a frame, step by step for all of them: each step reads what the last one wrote long before. Keys
// and weights of a sample lie twice in a row, so that the rivals of all its slots are one load.
struct SlotBlock {
  static constexpr int size = 512;
  alignas(64) uint32_t token[size];   // in the frame
  alignas(64) uint32_t column[size];  // in the video
  alignas(64) uint32_t stream_sample[size];
  alignas(64) uint32_t bits[size];
  alignas(64) float score[size];
  alignas(64) int32_t key[size];  // of score + noise, in the order of signed words
  alignas(64) int32_t rival_key[2 * size];
  alignas(64) float weight[2 * size];
  alignas(64) uint32_t drawn[2 * size];  // the sample's tokens that were drawn
  alignas(64) float log_prob[size];      // of each slot's draw, 0 if it was not drawn
};

template <int slots>
void load_slots(const FrameSpace& f, const FrameDraws& d, const int32_t* groups, int64_t first, int64_t count,
                uint32_t frame_column, SlotBlock& b) {
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at = s * slots, draw = first + s < d.count ? first + s : d.count - 1;  // a block may end in a repeat
    const int64_t group = groups[draw] * slots;
    const uint32_t name = stream_word(stream_tokens, static_cast<uint32_t>(d.first_sample + draw));
    std::memcpy(b.token + at, f.token + group, slots * sizeof(uint32_t));
    std::memcpy(b.score + at, f.log_weight + group, slots * sizeof(float));
    std::memcpy(b.weight + 2 * at, f.weight + group, slots * sizeof(float));
    std::memcpy(b.weight + 2 * at + slots, f.weight + group, slots * sizeof(float));
    for (int l = 0; l < slots; ++l) b.stream_sample[at + l] = name;
  }
  for (int64_t i = 0; i < count * slots; ++i) b.column[i] = frame_column + b.token[i];
}

template <int slots>
void perturb_slots(const NoiseRow& row, int64_t count, SlotBlock& b) {
  const int64_t n = count * slots;
  for (int64_t i = 0; i < n; i += noise_block) random_block(b.column + i, b.stream_sample + i, row, b.bits + i);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t perturbed = order_key(b.score[i] + gumbel_noise(b.bits[i]));
    b.key[i] = static_cast<int32_t>((b.score[i] > -__builtin_inff() ? perturbed : 0) ^ 0x80000000u);
  }
  for (int64_t s = 0; s < count; ++s) {
    const int32_t* key = b.key + s * slots;
    int32_t* rival = b.rival_key + 2 * s * slots;
    for (int l = 0; l < slots; ++l) rival[l] = key[l];
    for (int l = 0; l < slots; ++l) rival[slots + l] = key[l] + 1;  // to those after it: the lower token wins a tie
  }
}

// Appends the words whose slot_lanes are set in `drawn`.
inline __attribute__((always_inline)) uint32_t* list_drawn(const uint32_t* words, Slots drawn, uint32_t* out) {
#if defined(__AVX512VL__)
  const __m256i set = reinterpret_cast<__m256i>(drawn);
  const __mmask8 mask = _mm256_test_epi32_mask(set, set);
  const __m256i listed = _mm256_maskz_compress_epi32(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), listed);
  return out + __builtin_popcount(mask);
#else
  for (int l = 0; l < slot_lanes; ++l) {
    *out = words[l];
    out += drawn[l] & 1;
  }
  return out;
#endif
}

// Who of one sample is drawn, and with what probability: every slot meets every other slot once.
template <int slots>
inline __attribute__((always_inline)) void race_slots(SlotBlock& b, int64_t s, int32_t num_draw) {
  const int32_t* rivals = b.rival_key + 2 * s * slots;
  const float* weights = b.weight + 2 * s * slots;
  uint32_t* out = b.drawn + 2 * s * slots;
  for (int part = 0; part < slots; part += slot_lanes) {
    Slots key, rank = {}, rival;
    SlotValues weight, racing, other;
    std::memcpy(&key, rivals + part, sizeof key);
    std::memcpy(&weight, weights + part, sizeof weight);
    racing = weight;  // what is in the race when a token is drawn: itself and whom it beats
    for (int turn = 1; turn < slots; ++turn) {
      std::memcpy(&rival, rivals + part + turn, sizeof rival);
      std::memcpy(&other, weights + part + turn, sizeof other);
      const Slots loses = rival > key;
      rank -= loses;
      racing += reinterpret_cast<SlotValues>(reinterpret_cast<Slots>(other) & ~loses);
    }
    const Slots drawn = rank < num_draw;
    const SlotValues chance = weight / racing, certain = SlotValues{} + 1.0f;
    const Slots factor = (reinterpret_cast<Slots>(chance) & drawn) | (reinterpret_cast<Slots>(certain) & ~drawn);
    std::memcpy(b.log_prob + s * slots + part, &factor, sizeof factor);
    out = list_drawn(b.token + s * slots + part, drawn, out);
  }
}

template <int slots>
void draw_slots(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  constexpr int64_t samples = SlotBlock::size / slots;
  const uint32_t frame_column = static_cast<uint32_t>(d.frame * p.tokens_per_frame);
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  const int64_t k = p.num_draw;
  SlotBlock b;
  for (int64_t first = 0; first < d.count; first += samples) {
    const int64_t count = d.count - first < samples ? d.count - first : samples;
    const int64_t whole = padded16(count * slots) / slots;
    load_slots<slots>(f, d, groups, first, whole, frame_column, b);
    perturb_slots<slots>(row, whole, b);
    for (int64_t s = 0; s < count; ++s) race_slots<slots>(b, s, static_cast<int32_t>(k));
    for (int64_t i = 0; i < count * slots; ++i) b.log_prob[i] = ln_float(b.log_prob[i]);
    for (int64_t s = 0; s < count; ++s) {
      const uint32_t* drawn = b.drawn + 2 * s * slots;
      int64_t* tokens = d.tokens + (first + s) * d.token_stride;
      for (int64_t j = 0; j < k; ++j) tokens[j] = d.token_base + drawn[j];
      float* sum = b.log_prob + s * slots;
      for (int width = slots / 2; width > 0; width /= 2) {
        for (int l = 0; l < width; ++l) sum[l] += sum[l + width];
      }
      const int32_t group = groups[first + s];
      d.groups[(first + s) * d.frame_stride] = group;
      d.log_prob[(first + s) * d.frame_stride] = sum[0] + f.log_share[group];
    }
  }
}

void small_draws(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  if (f.width == 8) {
    draw_slots<8>(f, p, d, groups);
  } else {
    draw_slots<16>(f, p, d, groups);
  }
}

constexpr CombinationLoops combination_loop_table = {fill_exps, prepare, draw_groups, small_draws};

}  // namespace
}  // namespace cacovid::cpu
