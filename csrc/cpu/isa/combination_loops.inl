// Online combination space sampling: a frame's distribution, and draws from small groups of tokens.
#include "cacovid/combinations.h"
#include "isa/combination_loops.h"
#include "isa/noise_loops.inl"
#include "isa/rank_network.inl"
#include "race.h"

namespace cacovid::cpu {
namespace {

// Sixteen slots: the tokens of one group of up to 16, or of two groups of up to 8.
typedef uint32_t Slots __attribute__((vector_size(64)));
typedef float SlotValues __attribute__((vector_size(64)));
static_assert(slot_block == 16 && noise_block == 16, "a block of noise is a vector of slots");

// A ranking by the words of a network whose keys may have lost their low bits: neighbours that look equal are
// ordered by their full keys. False if there are too many of them.
inline bool repair_ranks(const uint32_t* keys, int64_t n, uint32_t* words) {
  int32_t alike = 0;
  for (int64_t r = 1; r < n; ++r) alike += words[r] >> 8 == words[r - 1] >> 8;
  if (alike > 16) return false;
  for (int64_t r = 1; alike > 0 && r < n; ++r) {
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

constexpr int64_t padded16(int64_t n) { return (n + 15) / 16 * 16; }

// One step of a sorting network inside a vector: lane l meets lane l ^ flip, and keeps the smaller word if its
// `bit` is clear, else the larger one.
template <uint32_t flip, uint32_t bit>
inline __attribute__((always_inline)) void meet(Slots& words) {
#if defined(__AVX512F__)
  const __m512i own = reinterpret_cast<__m512i>(words);
  words = reinterpret_cast<Slots>(across<flip, bit>(own, own));
#else
  const Slots lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Slots met = __builtin_shuffle(words, lane ^ flip);
  const Slots take = reinterpret_cast<Slots>(met < words) ^ reinterpret_cast<Slots>((lane & bit) != 0);
  words = (met & take) | (words & ~take);
#endif
}

// Sorts each half of 16 words, or all of them.
template <int run>
void sort_runs(uint32_t* words, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) {
    Slots v;
    std::memcpy(&v, words + i, sizeof v);
    meet<1, 1>(v);
    meet<3, 2>(v);
    meet<1, 1>(v);
    meet<7, 4>(v);
    meet<2, 2>(v);
    meet<1, 1>(v);
    if (run == 16) {
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
  const int64_t total = f.cumulative[f.open - 1];
  uint32_t column[noise_block], stream_sample[noise_block], threshold[noise_block];
  for (uint32_t l = 0; l < noise_block; ++l) {
    column[l] = static_cast<uint32_t>(d.frame);
    stream_sample[l] = stream_word(stream_groups, static_cast<uint32_t>(d.first_sample) + l);
  }
  for (int64_t s = 0; s < d.count; s += noise_block) {
    random_block(column, stream_sample, row, threshold);
    for (int l = 0; l < noise_block; ++l) {
      threshold[l] = static_cast<uint32_t>(share_threshold(threshold[l], total));
      stream_sample[l] += noise_block;
    }
    Slots found = {}, limit;
    std::memcpy(&limit, threshold, sizeof limit);
    for (int64_t g = 0; g < f.open - 1; ++g) found -= reinterpret_cast<Slots>(f.cumulative[g] <= limit);
    std::memcpy(groups + s, &found, sizeof found);
  }
}

// A few samples of a frame, step by step for all of them: each step reads what the last one wrote long before.
struct SlotBlock {
  static constexpr int size = 512;
  alignas(64) uint32_t token[size];   // in the frame
  alignas(64) uint32_t column[size];  // in the video
  alignas(64) uint32_t stream_sample[size];
  alignas(64) uint32_t key[size];    // random bits, then perturbed keys
  alignas(64) uint32_t drawn[size];  // tokens drawn from the slots of a vector, one sample after the other
  alignas(64) float score[size];
  alignas(64) float weight[size];
  alignas(64) float log_prob[size];  // of the sample, in each of its slots
};

template <int slots>
void load_slots(const FrameSpace& f, const FrameDraws& d, const int32_t* groups, int64_t first, int64_t count,
                uint32_t frame_column, SlotBlock& b) {
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at = s * slots, draw = first + s < d.count ? first + s : d.count - 1;  // a block may end in a repeat
    const int64_t group = groups[draw] * slots;
    const Slots sample = Slots{} + stream_word(stream_tokens, static_cast<uint32_t>(d.first_sample + draw));
    std::memcpy(b.token + at, f.token + group, slots * sizeof(uint32_t));
    std::memcpy(b.score + at, f.log_weight + group, slots * sizeof(float));
    std::memcpy(b.weight + at, f.weight + group, slots * sizeof(float));
    std::memcpy(b.stream_sample + at, &sample, slots * sizeof(uint32_t));
  }
  for (int64_t i = 0; i < count * slots; ++i) b.column[i] = frame_column + b.token[i];
}

// Writes the words whose lanes are set in `drawn` one after the other.
inline __attribute__((always_inline)) void list_drawn(const Slots& words, const Slots& drawn, uint32_t* out) {
#if defined(__AVX512F__)
  const __m512i set = reinterpret_cast<__m512i>(drawn);
  const __mmask16 mask = _mm512_test_epi32_mask(set, set);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(mask, reinterpret_cast<__m512i>(words)));
#else
  for (int l = 0; l < 16; ++l) {
    *out = words[l];
    out += drawn[l] & 1;
  }
#endif
}

// Who is drawn, and with what probability: every slot meets every other slot of its group once.
template <int slots>
void race_slots(SlotBlock& b, int64_t i, uint32_t num_draw) {
  const Slots lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Slots keys, tokens, rank = {};
  SlotValues weights;
  std::memcpy(&keys, b.key + i, sizeof keys);
  std::memcpy(&tokens, b.token + i, sizeof tokens);
  std::memcpy(&weights, b.weight + i, sizeof weights);
  SlotValues racing = weights;  // what is in the race when a token is drawn: itself and whom it beats
  for (uint32_t turn = 1; turn < slots; ++turn) {
    const Slots rival = (lane & ~(slots - 1u)) | ((lane + turn) & (slots - 1u));
    const Slots key = __builtin_shuffle(keys, rival) - reinterpret_cast<Slots>(rival < lane);  // the lower wins a tie
    const Slots loses = reinterpret_cast<Slots>(key > keys);
    rank -= loses;
    racing += reinterpret_cast<SlotValues>(reinterpret_cast<Slots>(__builtin_shuffle(weights, rival)) & ~loses);
  }
  const Slots drawn = reinterpret_cast<Slots>(rank < num_draw);
  list_drawn(tokens, drawn, b.drawn + i);
  const SlotValues chance = weights / racing, certain = SlotValues{} + 1.0f;
  const Slots factor = (reinterpret_cast<Slots>(chance) & drawn) | (reinterpret_cast<Slots>(certain) & ~drawn);
  std::memcpy(b.log_prob + i, &factor, sizeof factor);
}

template <int slots>
void sum_slots(float* values) {
  const Slots lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  SlotValues sum;
  std::memcpy(&sum, values, sizeof sum);
  for (uint32_t width = slots / 2; width > 0; width /= 2) sum += __builtin_shuffle(sum, lane ^ width);
  std::memcpy(values, &sum, sizeof sum);
}

template <int slots>
void draw_slots(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  constexpr int64_t samples = SlotBlock::size / slots, together = slot_block / slots;
  const uint32_t frame_column = static_cast<uint32_t>(d.frame * p.tokens_per_frame);
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  const int64_t k = p.num_draw;
  SlotBlock b;
  for (int64_t first = 0; first < d.count; first += samples) {
    const int64_t count = d.count - first < samples ? d.count - first : samples;
    const int64_t n = padded16(count * slots);
    load_slots<slots>(f, d, groups, first, n / slots, frame_column, b);
    for (int64_t i = 0; i < n; i += noise_block) random_block(b.column + i, b.stream_sample + i, row, b.key + i);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t perturbed = order_key(b.score[i] + gumbel_noise(b.key[i]));
      b.key[i] = b.score[i] > -__builtin_inff() ? perturbed : 0;
    }
    for (int64_t i = 0; i < n; i += 16) race_slots<slots>(b, i, static_cast<uint32_t>(k));
    for (int64_t i = 0; i < n; ++i) b.log_prob[i] = ln_float(b.log_prob[i]);
    for (int64_t i = 0; i < n; i += 16) sum_slots<slots>(b.log_prob + i);
    for (int64_t s = 0; s < count; ++s) {
      const uint32_t* drawn = b.drawn + s / together * slot_block + s % together * k;
      int64_t* tokens = d.tokens + (first + s) * d.token_stride;
      for (int64_t j = 0; j < k; ++j) tokens[j] = d.token_base + drawn[j];
      const int32_t group = groups[first + s];
      d.groups[(first + s) * d.frame_stride] = group;
      d.log_prob[(first + s) * d.frame_stride] = b.log_prob[s * slots] + f.log_share[group];
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
