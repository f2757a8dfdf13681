// Online combination space sampling: a frame's distribution, and draws from small groups of tokens.
#include "cacovid/combinations.h"
#include "isa/combination_loops.h"
#include "isa/noise_loops.inl"
#include "isa/rank_network.inl"
#include "race.h"

namespace cacovid::cpu {
namespace {

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

// exp(score - best) by rank; where a score is +inf, 1 for those and 0 for all others.
void ranked_exps(const KeyRow& row, int64_t n, FrameSpace& f) {
  f.valid = n;
  if (row.smallest <= key_neginf) {
    while (f.valid > 0 && row.keys[f.order[f.valid - 1]] <= key_neginf) --f.valid;
  }
  if (row.largest == key_posinf) {
    for (int64_t r = 0; r < n; ++r) f.exps[r] = row.keys[f.order[r]] == key_posinf ? 1.0 : 0.0;
  } else {
    const double best = static_cast<double>(key_score(row.largest));
    for (int64_t r = 0; r < n; ++r) f.log_weight[r] = key_score(row.keys[f.order[r]]);
    for (int64_t r = 0; r < n; ++r) f.exps[r] = exp_exact(static_cast<double>(f.log_weight[r]) - best);
  }
  for (int64_t r = 0; r < n; ++r) f.fixed[r] = to_fixed(f.exps[r]);
}

void prepare(const KeyRow& row, const CombinationPlan& p, FrameSpace& f) {
  const int64_t n = p.tokens_per_frame, groups = p.num_groups;
  rank_tokens(row, n, f.order);
  ranked_exps(row, n, f);
  int64_t all = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t inside = 0;
    for (uint32_t r = f.start[g]; r < f.start[g + 1]; ++r) inside += f.fixed[r];
    f.share[g] = from_fixed(inside);
    all += inside;
  }
  const double total = from_fixed(all > 0 ? all : 1);
  for (int64_t g = 0; g < groups; ++g) f.share[g] = f.share[g] / total;
  for (int64_t g = 0; g < groups; ++g) {
    const double scale = weight_scale(f.share[g], total);
    for (uint32_t r = f.start[g]; r < f.start[g + 1]; ++r) f.weight[r] = f.exps[r] * scale;
  }
  for (int64_t r = 0; r < n; ++r) f.weight[r] = token_weight(f.weight[r], p);
  for (int64_t r = f.valid; r < n; ++r) f.weight[r] = 0.0;
  log_weights(f.weight, n, f.log_weight);
  for (int64_t r = 0; r < n; ++r) f.slot_weight[r] = static_cast<float>(f.weight[r]);
  f.open = open_groups(p, f.valid);
  cap_shares(f.share, f.open, p.group_cap);
  for (int64_t g = 0; g < f.open; ++g) f.log_share[g] = ln_float(static_cast<float>(f.share[g]));
  uint32_t sum = 0;
  for (int64_t g = 0; g < f.open; ++g) f.cumulative[g] = sum += static_cast<uint32_t>(share_weight(f.share[g]));
  for (int64_t g = f.open; g < padded(groups); ++g) f.cumulative[g] = sum;
}

void draw_groups(const FrameSpace& f, const FrameDraws& d, int32_t* groups) {
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  const int64_t total = f.cumulative[f.open - 1];
  uint32_t columns[noise_block], stream_samples[noise_block], threshold[noise_block];
  for (int l = 0; l < noise_block; ++l) columns[l] = static_cast<uint32_t>(d.frame);
  for (int64_t s = 0; s < d.count; s += noise_block) {
    const uint32_t first = stream_word(stream_groups, static_cast<uint32_t>(d.first_sample + s));
    for (uint32_t l = 0; l < noise_block; ++l) stream_samples[l] = first + l;
    random_block(columns, stream_samples, row, threshold);
    for (int l = 0; l < noise_block; ++l) {
      threshold[l] = static_cast<uint32_t>(share_threshold(threshold[l], total));
    }
    int32_t found[noise_block] = {};
    for (int64_t g = 0; g < f.open - 1; ++g) {
      for (int l = 0; l < noise_block; ++l) found[l] += f.cumulative[g] <= threshold[l];
    }
    for (int64_t l = 0; l < noise_block && s + l < d.count; ++l) groups[s + l] = found[l];
  }
}

// Sixteen slots: the tokens of one group of up to 16, or of two groups of up to 8.
typedef uint32_t Slots __attribute__((vector_size(64)));
typedef float SlotValues __attribute__((vector_size(64)));
static_assert(most_slots == 16 && noise_block == 16, "a block of noise is a vector of slots");

// A few samples of a frame, step by step for all of them: each step reads what the last one wrote long before.
struct SlotBlock {
  static constexpr int size = 512;
  alignas(64) uint32_t token[size];          // in the frame
  alignas(64) uint32_t column[size];         // in the video
  alignas(64) uint32_t stream_sample[size];
  alignas(64) uint32_t key[size];            // random bits, then perturbed keys
  alignas(64) uint32_t place[size];          // in the output; `slots` and beyond for what is not drawn
  alignas(64) float score[size];
  alignas(64) float weight[size];
  alignas(64) float log_prob[size];          // of the sample, in each of its slots
};

template <int slots>
void load_slots(const FrameSpace& f, const FrameDraws& d, const int32_t* groups, int64_t first, int64_t count,
                uint32_t frame_column, SlotBlock& b) {
  for (int64_t s = 0; s < count; ++s) {
    const int64_t at = s * slots, draw = first + s < d.count ? first + s : d.count - 1;  // a block may end in a repeat
    const uint32_t start = f.start[groups[draw]], end = f.start[groups[draw] + 1];
    const uint32_t sample = stream_word(stream_tokens, static_cast<uint32_t>(d.first_sample + draw));
    std::memcpy(b.token + at, f.order + start, slots * sizeof(uint32_t));
    std::memcpy(b.score + at, f.log_weight + start, slots * sizeof(float));
    std::memcpy(b.weight + at, f.slot_weight + start, slots * sizeof(float));
    for (int l = 0; l < slots; ++l) b.stream_sample[at + l] = sample;
    for (int64_t l = end - start; l < slots; ++l) {
      b.score[at + l] = -__builtin_inff();
      b.weight[at + l] = 0.0f;
    }
  }
  for (int64_t i = 0; i < count * slots; ++i) b.column[i] = frame_column + b.token[i];
}

// Who is drawn, and with what probability: every slot meets every other slot of its group once.
template <int slots>
void race_slots(SlotBlock& b, int64_t i, uint32_t num_draw) {
  const Slots lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  Slots keys, tokens, rank = {}, place = {};
  SlotValues weights;
  std::memcpy(&keys, b.key + i, sizeof keys);
  std::memcpy(&tokens, b.token + i, sizeof tokens);
  std::memcpy(&weights, b.weight + i, sizeof weights);
  SlotValues beaten = weights;  // what was still in the race when a token was drawn: itself and whom it beats
  for (uint32_t turn = 1; turn < slots; ++turn) {
    const Slots rival = (lane & ~(slots - 1u)) | ((lane + turn) & (slots - 1u));
    // A better-ranked rival wins a tie.
    const Slots favoured = __builtin_shuffle(keys, rival) - reinterpret_cast<Slots>(rival < lane);
    const Slots loses = reinterpret_cast<Slots>(favoured > keys);
    rank -= loses;
    beaten += reinterpret_cast<SlotValues>(reinterpret_cast<Slots>(__builtin_shuffle(weights, rival)) & ~loses);
  }
  const Slots drawn = reinterpret_cast<Slots>(rank < num_draw);
  tokens |= ~drawn;
  for (uint32_t turn = 1; turn < slots; ++turn) {
    const Slots rival = (lane & ~(slots - 1u)) | ((lane + turn) & (slots - 1u));
    place -= reinterpret_cast<Slots>(__builtin_shuffle(tokens, rival) < tokens);
  }
  place |= ~drawn & slots;
  const SlotValues one = SlotValues{} + 1.0f;
  const SlotValues chance = reinterpret_cast<SlotValues>((reinterpret_cast<Slots>(weights / beaten) & drawn) |
                                                         (reinterpret_cast<Slots>(one) & ~drawn));
  std::memcpy(b.place + i, &place, sizeof place);
  std::memcpy(b.log_prob + i, &chance, sizeof chance);
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
  constexpr int64_t samples = SlotBlock::size / slots;
  const uint32_t frame_column = static_cast<uint32_t>(d.frame * p.tokens_per_frame);
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  SlotBlock b;
  for (int64_t first = 0; first < d.count; first += samples) {
    const int64_t count = d.count - first < samples ? d.count - first : samples;
    const int64_t n = (count * slots + 15) / 16 * 16;
    load_slots<slots>(f, d, groups, first, n / slots, frame_column, b);
    for (int64_t i = 0; i < n; i += noise_block) random_block(b.column + i, b.stream_sample + i, row, b.key + i);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t perturbed = order_key(b.score[i] + gumbel_noise(b.key[i]));
      b.key[i] = b.score[i] > -__builtin_inff() ? perturbed : 0;
    }
    for (int64_t i = 0; i < n; i += 16) race_slots<slots>(b, i, static_cast<uint32_t>(p.num_draw));
    for (int64_t i = 0; i < n; ++i) b.log_prob[i] = ln_float(b.log_prob[i]);
    for (int64_t i = 0; i < n; i += 16) sum_slots<slots>(b.log_prob + i);
    for (int64_t s = 0; s < count; ++s) {
      int64_t sorted[2 * slots];
      for (int l = 0; l < slots; ++l) sorted[b.place[s * slots + l]] = d.token_base + b.token[s * slots + l];
      int64_t* tokens = d.tokens + (first + s) * d.token_stride;
      for (int64_t j = 0; j < p.num_draw; ++j) tokens[j] = sorted[j];
      const int32_t group = groups[first + s];
      d.groups[(first + s) * d.frame_stride] = group;
      d.log_prob[(first + s) * d.frame_stride] = b.log_prob[s * slots] + f.log_share[group];
    }
  }
}

void small_draws(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  if (p.tokens_per_frame <= 8 * p.num_groups) {
    draw_slots<8>(f, p, d, groups);
  } else {
    draw_slots<16>(f, p, d, groups);
  }
}

constexpr CombinationLoops combination_loop_table = {prepare, draw_groups, small_draws};

}  // namespace
}  // namespace cacovid::cpu
