// Online combination space sampling: which group a frame gives, and which of its tokens.
#include "isa/combination_space.inl"

namespace cacovid::cpu {
namespace {

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

// A few samples of a frame, step by step for all of them: each step reads what the last one wrote long before.
struct SlotBlock {
  static constexpr int size = 512;
  alignas(64) uint32_t token[size];   // in the frame
  alignas(64) uint32_t column[size];  // in the video
  alignas(64) uint32_t stream_sample[size];
  alignas(64) uint32_t bits[size];
  alignas(64) float score[size];
  alignas(64) float weight[size];
  alignas(64) int32_t key[size];          // of score + noise, in the order of signed words
  alignas(64) uint32_t drawn[size + 16];  // num_draw tokens of every sample, one sample after the other
  alignas(64) float log_prob[size];       // one of every sample
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
    std::memcpy(b.weight + at, f.weight + group, slots * sizeof(float));
    for (int l = 0; l < slots; ++l) b.stream_sample[at + l] = name;
  }
  for (int64_t i = 0; i < count * slots; ++i) b.column[i] = frame_column + b.token[i];
}

void perturb_slots(const NoiseRow& row, int64_t n, SlotBlock& b) {
  for (int64_t i = 0; i < n; i += noise_block) random_block(b.column + i, b.stream_sample + i, row, b.bits + i);
  for (int64_t i = 0; i < n; ++i) {
    const int32_t word = static_cast<int32_t>(float_to_bits(b.score[i] + gumbel_noise(b.bits[i])));
    b.key[i] = word ^ (word >> 31 & 0x7fffffff);  // -inf, a slot without a chance, is the smallest
  }
}

// The races of the samples [0, count): every slot of a sample meets every other one. What was still in the race when a
// token was drawn, that is itself and whom it beats, gives its chance; the lower token wins a tie.
#if defined(__AVX512F__)
// Two samples of 8 slots or one of 16 in a vector.
template <int slots>
void race_slots(int64_t count, int64_t num_draw, SlotBlock& b) {
  const Slots lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const __m512i least = _mm512_set1_epi32(slots - static_cast<int32_t>(num_draw));  // wins that are enough
  const __m512i one = _mm512_set1_epi32(1);
  uint32_t* out = b.drawn;
  for (int64_t s = 0; s < count; s += slot_lanes / slots, out += slot_lanes / slots * num_draw) {
    const __m512i key = _mm512_load_si512(b.key + s * slots);
    const __m512 weight = _mm512_load_ps(b.weight + s * slots);
    __m512i wins = _mm512_setzero_si512();
    __m512 racing = weight;
    for (int turn = 1; turn < slots; ++turn) {
      const Slots rival = (lane & ~(slots - 1)) | ((lane + turn) & (slots - 1));
      const __m512i from = reinterpret_cast<__m512i>(rival), lower = reinterpret_cast<__m512i>(rival < lane);
      const __m512i other = _mm512_sub_epi32(_mm512_maskz_permutexvar_epi32(0xffff, from, key), lower);
      const __mmask16 beats = _mm512_cmple_epi32_mask(other, key);
      wins = _mm512_mask_add_epi32(wins, beats, wins, one);
      racing = _mm512_mask_add_ps(racing, beats, racing, _mm512_maskz_permutexvar_ps(0xffff, from, weight));
    }
    const __mmask16 drawn = _mm512_cmpge_epi32_mask(wins, least);
    _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(drawn, _mm512_load_si512(b.token + s * slots)));
    alignas(64) float chance[16];
    _mm512_store_ps(chance, _mm512_mask_div_ps(_mm512_set1_ps(1.0f), drawn, weight, racing));
    for (int l = 0; l < 16; ++l) chance[l] = ln_float(chance[l]);
    SlotValues sum;
    std::memcpy(&sum, chance, sizeof sum);
    for (int width = slots / 2; width > 0; width /= 2) sum += __builtin_shuffle(sum, lane ^ width);
    b.log_prob[s] = sum[0];
    if (slots == 8) b.log_prob[s + 1] = sum[8];
  }
}
#else
// Keys and weights of a sample lie twice in a row, so that the rivals of all its slots are one load; written for all
// samples before the first is read.
template <int slots>
void race_slots(int64_t count, int64_t num_draw, SlotBlock& b) {
  int32_t all_keys[2 * SlotBlock::size];
  float all_weights[2 * SlotBlock::size];
  for (int64_t s = 0; s < count; ++s) {
    for (int l = 0; l < slots; ++l) all_keys[2 * s * slots + l] = b.key[s * slots + l];
    for (int l = 0; l < slots; ++l) all_keys[(2 * s + 1) * slots + l] = b.key[s * slots + l] + 1;
    std::memcpy(all_weights + 2 * s * slots, b.weight + s * slots, slots * sizeof(float));
    std::memcpy(all_weights + (2 * s + 1) * slots, b.weight + s * slots, slots * sizeof(float));
  }
  float all_wins[SlotBlock::size];
  uint32_t* out = b.drawn;
  for (int64_t s = 0; s < count; ++s) {
    const int32_t* keys = all_keys + 2 * s * slots;
    const float* weights = all_weights + 2 * s * slots;
    float* wins = all_wins + s * slots;
    for (int part = 0; part < slots; part += slot_lanes) {
      Slots key, rank = {}, rival;
      SlotValues weight, racing, other;
      std::memcpy(&key, keys + part, sizeof key);
      std::memcpy(&weight, weights + part, sizeof weight);
      racing = weight;
      for (int turn = 1; turn < slots; ++turn) {
        std::memcpy(&rival, keys + part + turn, sizeof rival);
        std::memcpy(&other, weights + part + turn, sizeof other);
        const Slots loses = rival > key;
        rank -= loses;
        racing += reinterpret_cast<SlotValues>(reinterpret_cast<Slots>(other) & ~loses);
      }
      const Slots drawn = rank < static_cast<int32_t>(num_draw);
      const SlotValues chance = weight / racing, certain = SlotValues{} + 1.0f;
      const Slots factor = (reinterpret_cast<Slots>(chance) & drawn) | (reinterpret_cast<Slots>(certain) & ~drawn);
      std::memcpy(wins + part, &factor, sizeof factor);
      for (int l = 0; l < slot_lanes; ++l) {
        *out = b.token[s * slots + part + l];
        out += drawn[l] & 1;
      }
    }
  }
  for (int64_t i = 0; i < count * slots; ++i) all_wins[i] = ln_float(all_wins[i]);
  for (int64_t s = 0; s < count; ++s) {
    float* wins = all_wins + s * slots;
    for (int width = slots / 2; width > 0; width /= 2) {
      for (int l = 0; l < width; ++l) wins[l] += wins[l + width];
    }
    b.log_prob[s] = wins[0];
  }
}
#endif

template <int slots>
void draw_slots(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& draws, const int32_t* groups) {
  constexpr int64_t samples = SlotBlock::size / slots;
  const FrameDraws d = draws;  // copies, which stores to the outputs cannot change
  const int64_t k = p.num_draw;
  const uint32_t frame_column = static_cast<uint32_t>(d.frame * p.tokens_per_frame);
  const NoiseRow row = {d.seed, static_cast<uint32_t>(d.video), d.step};
  SlotBlock b;
  for (int64_t first = 0; first < d.count; first += samples) {
    const int64_t count = d.count - first < samples ? d.count - first : samples;
    const int64_t n = padded16(count * slots);
    load_slots<slots>(f, d, groups, first, n / slots, frame_column, b);
    perturb_slots(row, n, b);
    race_slots<slots>(count, k, b);
    for (int64_t s = 0; s < count; ++s) {
      const uint32_t* drawn = b.drawn + s * k;
      int64_t* tokens = d.tokens + (first + s) * d.token_stride;
      const int64_t out = (first + s) * d.frame_stride;
      const int32_t group = groups[first + s];
#if defined(__AVX512F__)
      for (int64_t j = 0; j < k; j += 8) {
        const __mmask8 rest = static_cast<__mmask8>(k - j < 8 ? (1 << (k - j)) - 1 : 0xff);
        const __m256i eight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(drawn + j));
        _mm512_mask_storeu_epi64(
            tokens + j, rest,
            _mm512_add_epi64(_mm512_maskz_cvtepu32_epi64(0xff, eight), _mm512_set1_epi64(d.token_base)));
      }
#else
      for (int64_t j = 0; j < k; ++j) tokens[j] = d.token_base + drawn[j];
#endif
      d.groups[out] = group;
      d.log_prob[out] = b.log_prob[s] + f.log_share[group];
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
