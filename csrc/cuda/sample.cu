// Gumbel top-k in one launch: a block per row and sample.
//
// Rows of up to 1024 items are sorted in shared memory, by as many threads as they have items up to 256: one warp for
// 32 items. Longer rows are searched digit by digit for the word that ends the winners, and only those are sorted:
// one pass over the row for every 8 bits until the winners are told apart, three as a rule. Their keys stay in shared
// memory up to 8192 items; beyond that each pass makes the noise again, some 200 instructions per item.
#include "block_sort.cuh"
#include "cacovid/gumbel.h"
#include "cacovid/philox.h"
#include "plackett_luce.cuh"
#include "scores.cuh"

namespace cacovid::cuda {
namespace {

constexpr int64_t most_sorted = 1024;  // items of a row
constexpr int sorting_threads = 256, searching_threads = 512;
constexpr int64_t most_cached = 8192;  // keys of a row
constexpr int64_t round_words = 2048;  // winners that are sorted at once
constexpr int digits = 256;

struct Race {
  Scores logits;
  int64_t rows, n, k, samples;
  int64_t first;  // of the launch, in rows of all samples
  uint64_t seed;
  const int64_t* added_steps;
  uint32_t step, stream;
  int64_t* indices;
  float* log_prob;
  int32_t* status;
};

// The row and sample of a block.
struct Heat {
  int64_t row, sample, at, logit_step;
  uint32_t step;
  const Race& race;

  __device__ explicit Heat(const Race& race) : race(race) {
    const Division d = divide(race.first + blockIdx.x, race.rows);
    row = d.remainder;
    sample = d.quotient;
    at = race.logits.row(row, 0);
    logit_step = race.logits.step();
    step = race.step + (race.added_steps == nullptr ? 0 : static_cast<uint32_t>(*race.added_steps));
  }
  __device__ __forceinline__ float logit(int64_t i) const { return race.logits.load(at + i * logit_step); }
  // Order key of logit + noise; 0 where the probability is zero.
  __device__ __forceinline__ uint32_t key(int64_t i, float logit) const {
    const uint32_t bits = random_bits(race.seed, static_cast<uint32_t>(i), static_cast<uint32_t>(row), step,
                                      stream_word(race.stream, static_cast<uint32_t>(sample)));
    return perturbed_key(order_key(logit), bits);
  }
  __device__ __forceinline__ bool exists() const { return sample < race.samples; }
  __device__ __forceinline__ int64_t* indices() const { return race.indices + (sample * race.rows + row) * race.k; }
  // By the whole block, what every thread has seen of the row.
  __device__ __forceinline__ void store_status(bool nan, bool posinf, int64_t valid) const {
    const bool any_nan = __syncthreads_or(nan), any_posinf = __syncthreads_or(posinf);
    if (sample == 0 && threadIdx.x == 0) {
      race.status[row] =
          (any_nan ? status_nan : 0) | (any_posinf ? status_posinf : 0) | (valid < race.k ? status_short : 0);
    }
  }
  __device__ __forceinline__ void store_log_prob(double value) const {
    if (exists() && threadIdx.x == 0) race.log_prob[sample * race.rows + row] = static_cast<float>(value);
  }
};

// ---- short rows ---------------------------------------------------------------------------------

constexpr int64_t sorted_bytes(int64_t n) {
  return padded_run(n) * 16 + sorting_threads / warp_lanes * static_cast<int64_t>(sizeof(WarpReport)) + n * 4 + 4;
}

__global__ void __launch_bounds__(sorting_threads) sort_kernel(const __grid_constant__ Race race) {
  const Heat heat(race);
  const int n = static_cast<int>(race.n), k = static_cast<int>(race.k);
  uint64_t* words = shared_memory<uint64_t>();
  uint64_t* other = words + padded_run(n);
  WarpReport* reports = reinterpret_cast<WarpReport*>(other + padded_run(n));
  float* logits = reinterpret_cast<float*>(reports + sorting_threads / warp_lanes);
  int32_t* valid_items = reinterpret_cast<int32_t*>(logits + n);
  bool nan = false, posinf = false;
  for (int i = threadIdx.x; i < padded_run(n); i += blockDim.x) {
    uint64_t word = 0;
    if (i < n) {
      const float logit = heat.logit(i);
      logits[i] = logit;
      nan = nan || logit != logit;
      posinf = posinf || logit == INFINITY;
      word = rank_word(heat.key(i, logit), static_cast<uint32_t>(i));
    }
    words[i] = word;
  }
  __syncthreads();
  const uint64_t* ranked = sort_falling(words, other, n);
  if (n == 0 && threadIdx.x == 0) *valid_items = 0;
  for (int r = threadIdx.x; r < n; r += blockDim.x) {
    const bool chance = ranked[r] >> 32 != 0;
    if (chance && (r + 1 == n || ranked[r + 1] >> 32 == 0)) *valid_items = r + 1;
    if (!chance && r == 0) *valid_items = 0;
  }
  __syncthreads();
  const int valid = *valid_items, found = min(k, valid);
  if (heat.sample == 0) heat.store_status(nan, posinf, valid);
  if (!heat.exists()) return;
  int64_t* indices = heat.indices();
  for (int j = threadIdx.x; j < k; j += blockDim.x) indices[j] = j < found ? int64_t{rank_index(ranked[j])} : -1;
  Weight undrawn;
  for (int r = found + threadIdx.x; r < valid; r += blockDim.x) {
    const float logit = logits[rank_index(ranked[r])];
    if (logit < INFINITY) undrawn = undrawn + Weight::of(logit);
  }
  heat.store_log_prob(
      log_prob_of_winners(found, [&](int64_t j) { return logits[rank_index(ranked[j])]; }, undrawn, reports));
}

// ---- long rows ----------------------------------------------------------------------------------

// What a searching block shares beside its buffers.
struct Search {
  WarpReport reports[searching_threads / warp_lanes];
  uint32_t histogram[digits];
  uint32_t collected;
  int32_t digit;
  uint32_t above, inside;  // words with larger digits, and with this one
};

constexpr int64_t searched_bytes(int64_t n, int64_t k) {
  return static_cast<int64_t>(sizeof(Search)) + padded_run(k < round_words ? k : round_words) * 16 +
         (n <= most_cached ? n * 4 : 0);
}

// The digit that holds the wanted-th largest word, by the first warp: eight digits per lane, the largest first.
__device__ inline void find_digit(Search& s, uint32_t wanted) {
  const int lane = threadIdx.x % warp_lanes;
  uint32_t own = 0;
  for (int i = 0; i < digits / warp_lanes; ++i) own += s.histogram[digits - 1 - (lane * (digits / warp_lanes) + i)];
  uint32_t above = running_sum(own, lane) - own;
  if (above >= wanted || above + own < wanted) return;
  for (int i = 0; i < digits / warp_lanes; ++i) {
    const int digit = digits - 1 - (lane * (digits / warp_lanes) + i);
    const uint32_t inside = s.histogram[digit];
    if (above + inside >= wanted) {
      s.digit = digit;
      s.above = above;
      s.inside = inside;
      return;
    }
    above += inside;
  }
}

__global__ void __launch_bounds__(searching_threads, 1) search_kernel(const __grid_constant__ Race race) {
  const Heat heat(race);
  const int64_t n = race.n, buffer = padded_run(race.k < round_words ? race.k : round_words);
  uint64_t* words = shared_memory<uint64_t>();
  uint64_t* other = words + buffer;
  Search& s = *reinterpret_cast<Search*>(other + buffer);
  uint32_t* cache = n <= most_cached ? reinterpret_cast<uint32_t*>(&s + 1) : nullptr;  // item i: always one thread's
  const auto word_of = [&](int64_t i) {
    const uint32_t key = cache != nullptr ? cache[i] : heat.key(i, heat.logit(i));
    return key == 0 ? 0 : rank_word(key, static_cast<uint32_t>(i));
  };

  bool nan = false, posinf = false;
  uint32_t chances = 0;
  if (threadIdx.x == 0) s.collected = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < n; i += searching_threads) {
    const float logit = heat.logit(i);
    nan = nan || logit != logit;
    posinf = posinf || logit == INFINITY;
    chances += logit > -INFINITY;
    if (cache != nullptr) cache[i] = heat.key(i, logit);
  }
  atomicAdd(&s.collected, chances);
  __syncthreads();
  const int64_t valid = s.collected, found = valid < race.k ? valid : race.k;
  if (heat.sample == 0) heat.store_status(nan, posinf, valid);
  if (!heat.exists()) return;
  int64_t* indices = heat.indices();
  uint64_t bound = ~uint64_t{0};  // words from here on have been written
  for (int64_t done = 0; done < found;) {
    const uint32_t wanted = static_cast<uint32_t>(found - done < round_words ? found - done : round_words);
    uint64_t prefix = 0;
    uint32_t left = wanted;
    for (int shift = 56; shift >= 0; shift -= 8) {
      __syncthreads();
      for (int i = threadIdx.x; i < digits; i += searching_threads) s.histogram[i] = 0;
      __syncthreads();
      for (int64_t i = threadIdx.x; i < n; i += searching_threads) {
        const uint64_t word = word_of(i);
        const bool alike = shift == 56 || (word ^ prefix) >> (shift + 8) == 0;
        if (word != 0 && word < bound && alike) atomicAdd(&s.histogram[word >> shift & (digits - 1)], 1u);
      }
      __syncthreads();
      if (threadIdx.x < warp_lanes) find_digit(s, left);
      __syncthreads();
      prefix |= static_cast<uint64_t>(s.digit) << shift;
      left -= s.above;
      if (s.inside == left) break;  // all that begin like this are wanted
    }
    if (threadIdx.x == 0) s.collected = 0;
    for (int64_t i = threadIdx.x; i < padded_run(wanted); i += searching_threads) words[i] = 0;
    __syncthreads();
    for (int64_t i = threadIdx.x; i < n; i += searching_threads) {
      const uint64_t word = word_of(i);
      if (word >= prefix && word < bound && word != 0) words[atomicAdd(&s.collected, 1u)] = word;
    }
    __syncthreads();
    const uint64_t* ranked = sort_falling(words, other, static_cast<int>(wanted));
    for (int64_t j = threadIdx.x; j < wanted; j += searching_threads) indices[done + j] = rank_index(ranked[j]);
    done += wanted;
    bound = prefix;
    __syncthreads();
  }
  for (int64_t j = found + threadIdx.x; j < race.k; j += searching_threads) indices[j] = -1;
  Weight undrawn;
  for (int64_t i = threadIdx.x; i < n; i += searching_threads) {
    const uint64_t word = word_of(i);
    const float logit = heat.logit(i);
    if (word != 0 && word < bound && logit < INFINITY) undrawn = undrawn + Weight::of(logit);
  }
  heat.store_log_prob(
      log_prob_of_winners(found, [&](int64_t j) { return heat.logit(indices[j]); }, undrawn, s.reports));
}

}  // namespace

int gumbel_topk(Tensor logits, int64_t k, int64_t samples, cpu::DrawKey key, const int64_t* added_steps,
                int64_t* indices, float* log_prob, int32_t* status, Stream stream) {
  Race race = {};
  race.logits = Scores(logits);
  race.rows = logits.sizes[0];
  race.n = logits.sizes[1];
  race.k = k;
  race.samples = samples;
  race.seed = key.seed;
  race.added_steps = added_steps;
  race.step = key.step;
  race.stream = key.stream;
  race.indices = indices;
  race.log_prob = log_prob;
  race.status = status;
  const bool sorted = race.n <= most_sorted;
  const int64_t items = padded_run(race.n > 0 ? race.n : 1);
  const int threads = sorted ? static_cast<int>(items < sorting_threads ? items : sorting_threads) : searching_threads;
  const int64_t bytes = sorted ? sorted_bytes(race.n) : searched_bytes(race.n, k);
  const int64_t heats = race.rows * (samples > 0 ? samples : 1);  // without samples, rows have a status
  for (; race.first < heats; race.first += most_blocks) {
    const int64_t left = heats - race.first;
    const int error = launch(stream, sorted ? sort_kernel : search_kernel, left < most_blocks ? left : most_blocks,
                             threads, static_cast<size_t>(bytes), race);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace cacovid::cuda
