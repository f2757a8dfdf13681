// Masks of combinations as words, the sums over them, and the policy loss with its gradient (policy_loss.h).
#include "cacovid/policy_loss.h"

#include "cacovid/division.h"
#include "launch.cuh"
#include "warp_sums.cuh"

namespace cacovid::cuda {
namespace {

constexpr int word_tokens = 32;

int64_t words_of(int64_t tokens) { return (tokens + word_tokens - 1) / word_tokens; }
int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// One element of any float type: its bits, and the number they are. Apart, so that several loads are in flight.
__device__ __forceinline__ uint64_t load_any(const void* data, DType dtype, int64_t at) {
  if (dtype == DType::f32) return __ldg(static_cast<const uint32_t*>(data) + at);
  if (dtype == DType::f64) return __ldg(static_cast<const uint64_t*>(data) + at);
  return __ldg(static_cast<const uint16_t*>(data) + at);
}
__device__ __forceinline__ double number_of(uint64_t bits, DType dtype) {
  double wide;
  std::memcpy(&wide, &bits, sizeof wide);
  const uint16_t half = static_cast<uint16_t>(bits);
  const float narrow = dtype == DType::f32    ? bits_to_float(static_cast<uint32_t>(bits))
                       : dtype == DType::bf16 ? load_float(bf16_t{half})
                                              : load_float(f16_t{half});
  return dtype == DType::f64 ? wide : static_cast<double>(narrow);
}

// ---- masks to words -----------------------------------------------------------------------------

constexpr int pack_warps = 4;

struct PackParams {
  const void* masks;
  int64_t item, row_stride, stride;  // item: bytes of an element
  int64_t tokens, row_words, row_tiles, tiles;
  uint32_t* words;
};

// A warp makes 32 words of a row, from word `first` on: every lane looks at one token of each, and loads all of them
// before it uses one.
template <class T>
__device__ __forceinline__ uint32_t pack_words(const PackParams& p, int64_t row, int64_t first, int lane) {
  const T* masks = static_cast<const T*>(p.masks) + row * p.row_stride;
  T values[warp_lanes];
#pragma unroll
  for (int w = 0; w < warp_lanes; ++w) {
    const int64_t token = (first + w) * word_tokens + lane;
    values[w] = token < p.tokens ? __ldg(masks + token * p.stride) : T{0};
  }
  uint32_t mine = 0;
#pragma unroll
  for (int w = 0; w < warp_lanes; ++w) {
    const uint32_t word = __ballot_sync(all_lanes, values[w] != 0);
    mine = lane == w ? word : mine;
  }
  return mine;
}

__global__ void __launch_bounds__(pack_warps* warp_lanes) pack_kernel(const __grid_constant__ PackParams p) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t tile = int64_t{blockIdx.x} * pack_warps + threadIdx.x / warp_lanes;
  if (tile >= p.tiles) return;
  const Division at = divide(tile, p.row_tiles);
  const int64_t row = at.quotient, first = at.remainder * warp_lanes;
  uint32_t mine = 0;
  switch (p.item) {
    case 1: mine = pack_words<uint8_t>(p, row, first, lane); break;
    case 2: mine = pack_words<uint16_t>(p, row, first, lane); break;
    case 4: mine = pack_words<uint32_t>(p, row, first, lane); break;
    default: mine = pack_words<int64_t>(p, row, first, lane); break;
  }
  if (first + lane < p.row_words) p.words[row * p.row_words + first + lane] = mine;
}

struct MarkParams {
  const int64_t* indices;
  int64_t row_stride, stride, kept, count, tokens, row_words;
  uint32_t* words;
};

__global__ void __launch_bounds__(256) mark_kernel(const __grid_constant__ MarkParams p) {
  const int64_t entry = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (entry >= p.count) return;
  const Division at = divide(entry, p.kept);
  const uint64_t token = static_cast<uint64_t>(__ldg(p.indices + at.quotient * p.row_stride + at.remainder * p.stride));
  if (token >= static_cast<uint64_t>(p.tokens)) return;
  atomicOr(p.words + at.quotient * p.row_words + token / word_tokens, 1u << token % word_tokens);
}

// ---- sums over combinations ---------------------------------------------------------------------

constexpr int weight_warps = 4;
constexpr int sum_threads = 64;  // tokens of a block

struct SumParams {
  const uint32_t* words;
  const void* rewards;
  DType reward_type;
  int64_t video_stride, stride;  // of the rewards
  int64_t videos, combinations, tokens, row_words, video_blocks;
  PolicyWeights even;      // of every combination, if not balanced
  PolicyWeights* weights;  // [videos, combinations], or null
  double* sums;
};

// The weights of one combination for each warp.
__global__ void __launch_bounds__(weight_warps* warp_lanes) weights_kernel(const __grid_constant__ SumParams p) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t row = int64_t{blockIdx.x} * weight_warps + threadIdx.x / warp_lanes;
  if (row >= p.videos * p.combinations) return;
  const int rest = static_cast<int>(p.tokens % word_tokens);
  int64_t count = 0;
#pragma unroll 4
  for (int64_t w = lane; w < p.row_words; w += warp_lanes) {
    const uint32_t valid = rest != 0 && w + 1 == p.row_words ? (1u << rest) - 1 : ~0u;
    count += __popc(__ldg(p.words + row * p.row_words + w) & valid);
  }
  count = warp_sum(count);
  if (lane == 0) p.weights[row] = policy_weights(count, p.tokens, p.combinations, true);
}

__device__ __forceinline__ double load_reward(const SumParams& p, int64_t video, int64_t g) {
  return number_of(load_any(p.rewards, p.reward_type, video * p.video_stride + g * p.stride), p.reward_type);
}

// What a combination adds to the sums of a token that it keeps and of one that it drops.
struct Addends {
  double earned_kept, earned_dropped, kept, dropped;
  bool better;
};

// A block adds up the combinations for one token per thread, 32 combinations at a time: each lane of the first warp
// prepares one of them.
__global__ void __launch_bounds__(sum_threads) sums_kernel(const __grid_constant__ SumParams p) {
  Addends* addends = shared_memory<Addends>();
  const int lane = threadIdx.x % warp_lanes;
  const Division at = divide(blockIdx.x, p.video_blocks);
  const int64_t video = at.quotient, token = at.remainder * sum_threads + threadIdx.x;
  const int64_t word = token / word_tokens;
  const uint32_t* words = p.words + video * p.combinations * p.row_words;
  const bool prepares = threadIdx.x < warp_lanes;
  double mean = 0.0, deviation = 0.0;
  if (prepares) {
    double total = 0.0, squares = 0.0;
    for (int64_t g = lane; g < p.combinations; g += reward_lanes) total += load_reward(p, video, g);
    mean = warp_sum(total) / static_cast<double>(p.combinations);
    for (int64_t g = lane; g < p.combinations; g += reward_lanes) {
      const double distance = load_reward(p, video, g) - mean;
      squares += distance * distance;
    }
    deviation = sqrt(reward_variance(warp_sum(squares), p.combinations));
  }
  double sums[policy_sums_rows] = {};
  for (int64_t first = 0; first < p.combinations; first += warp_lanes) {
    const int64_t mine = first + lane;
    const bool exists = mine < p.combinations;
    const uint32_t loaded = exists && word < p.row_words ? __ldg(words + mine * p.row_words + word) : 0;
    if (prepares && exists) {
      const PolicyWeights w = p.weights != nullptr ? p.weights[video * p.combinations + mine] : p.even;
      const double advantage = policy_advantage(load_reward(p, video, mine), mean, deviation);
      addends[lane] = {w.kept * advantage, w.dropped * advantage, w.kept, w.dropped, advantage > 0.0};
    }
    __syncthreads();
    const int64_t left = p.combinations - first;
    const int count = left < warp_lanes ? static_cast<int>(left) : warp_lanes;
    for (int g = 0; g < count; ++g) {
      const bool kept = (__shfl_sync(all_lanes, loaded, g) >> lane & 1u) != 0;
      const Addends add = addends[g];
      const double earned_kept = kept ? add.earned_kept : 0.0, earned_dropped = kept ? 0.0 : add.earned_dropped;
      if (add.better) {  // the same for the whole block
        sums[kept_better] += earned_kept;
        sums[dropped_better] += earned_dropped;
      } else {
        sums[kept_worse] += earned_kept;
        sums[dropped_worse] += earned_dropped;
      }
      sums[kept_weight] += kept ? add.kept : 0.0;
      sums[dropped_weight] += kept ? 0.0 : add.dropped;
    }
    __syncthreads();
  }
  if (token >= p.tokens) return;
  double* out = p.sums + video * policy_sums_rows * p.tokens + token;
#pragma unroll
  for (int row = 0; row < policy_sums_rows; ++row) out[row * p.tokens] = sums[row];
}

// ---- loss and gradient --------------------------------------------------------------------------

constexpr int loss_threads = 128, total_threads = 256;

struct Odds {
  const void* data;
  DType dtype;
  bool pairs;
  int64_t video_stride, stride, pair_stride;

  Odds() = default;
  explicit Odds(const Tensor& t)
      : data(t.data),
        dtype(t.dtype),
        pairs(t.ndim == 3),
        video_stride(t.strides[0]),
        stride(t.strides[1]),
        pair_stride(t.strides[2]) {}

  struct Bits {
    uint64_t keep, drop;
  };
  __device__ __forceinline__ Bits load(int64_t video, int64_t token) const {
    const int64_t at = video * video_stride + token * stride;
    return {load_any(data, dtype, pairs ? at + pair_stride : at), pairs ? load_any(data, dtype, at) : 0};
  }
  __device__ __forceinline__ double of(Bits bits) const {
    const double keep = number_of(bits.keep, dtype);
    return pairs ? keep - number_of(bits.drop, dtype) : keep;
  }
};

struct LossParams {
  Odds odds, old_odds;
  const double* sums;
  PolicyRule rule;
  double scale;
  int64_t tokens, video_blocks, blocks;
  double* parts;  // [blocks], the loss of each
  void *loss, *gradient;
};

// Over the threads of a block, for its first thread.
template <int Threads>
__device__ __forceinline__ double block_sum(double x) {
  double* of_warps = shared_memory<double>();
  x = warp_sum(x);
  if (threadIdx.x % warp_lanes == 0) of_warps[threadIdx.x / warp_lanes] = x;
  __syncthreads();
  double total = 0.0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < Threads / warp_lanes; ++w) total += of_warps[w];
  }
  return total;
}

template <class T>
__device__ __forceinline__ void store_gradient(T* out, int64_t token, bool pairs, double gradient) {
  if (pairs) out[2 * token] = static_cast<T>(-gradient);
  out[pairs ? 2 * token + 1 : token] = static_cast<T>(gradient);
}

template <bool WithDivergence>
__global__ void __launch_bounds__(loss_threads, 4) loss_kernel(const __grid_constant__ LossParams p) {
  const Division at = divide(blockIdx.x, p.video_blocks);
  const int64_t video = at.quotient, token = at.remainder * loss_threads + threadIdx.x;
  double loss = 0.0;
  if (token < p.tokens) {
    double sums[policy_sums_rows] = {};
#pragma unroll
    for (int row = 0; row < (WithDivergence ? policy_sums_rows : kept_weight); ++row) {
      sums[row] = __ldg(p.sums + (video * policy_sums_rows + row) * p.tokens + token);
    }
    const Odds::Bits bits = p.odds.load(video, token), old_bits = p.old_odds.load(video, token);
    const PolicyTerm term = policy_term<WithDivergence>(p.odds.of(bits), p.old_odds.of(old_bits), sums, p.rule);
    loss = term.loss;
    const double gradient = term.gradient * p.scale;
    const int64_t to = video * p.tokens + token;
    if (p.odds.dtype == DType::f64) {
      store_gradient(static_cast<double*>(p.gradient), to, p.odds.pairs, gradient);
    } else {
      store_gradient(static_cast<float*>(p.gradient), to, p.odds.pairs, gradient);
    }
  }
  loss = block_sum<loss_threads>(loss);
  if (threadIdx.x == 0) p.parts[blockIdx.x] = loss;
}

__global__ void __launch_bounds__(total_threads) total_kernel(const __grid_constant__ LossParams p) {
  double total = 0.0;
  for (int64_t i = threadIdx.x; i < p.blocks; i += total_threads) total += p.parts[i];
  total = block_sum<total_threads>(total) * p.scale;
  if (threadIdx.x != 0) return;
  if (p.odds.dtype == DType::f64) {
    *static_cast<double*>(p.loss) = total;
  } else {
    *static_cast<float*>(p.loss) = static_cast<float>(total);
  }
}

}  // namespace

int pack_masks(Tensor masks, int32_t* words, Stream stream) {
  PackParams p = {};
  p.masks = masks.data;
  p.item = item_size(masks.dtype);
  p.row_stride = masks.strides[0];
  p.stride = masks.strides[1];
  p.tokens = masks.sizes[1];
  p.row_words = words_of(p.tokens);
  p.row_tiles = ceil_div(p.row_words, warp_lanes);
  p.tiles = masks.sizes[0] * p.row_tiles;
  p.words = reinterpret_cast<uint32_t*>(words);
  return launch(stream, pack_kernel, ceil_div(p.tiles, pack_warps), pack_warps * warp_lanes, 0, p);
}

int pack_indices(Tensor indices, int64_t tokens, int32_t* words, Stream stream) {
  MarkParams p = {};
  p.indices = indices.as<int64_t>();
  p.row_stride = indices.strides[0];
  p.stride = indices.strides[1];
  p.kept = indices.sizes[1];
  p.count = indices.numel();
  p.tokens = tokens;
  p.row_words = words_of(tokens);
  p.words = reinterpret_cast<uint32_t*>(words);
  return launch(stream, mark_kernel, ceil_div(p.count, 256), 256, 0, p);
}

int policy_sums(const int32_t* words, Tensor rewards, int64_t tokens, bool balanced, double* weights, double* sums,
                Stream stream) {
  static_assert(sizeof(PolicyWeights) == 2 * sizeof(double), "weights are pairs of numbers");
  SumParams p = {};
  p.words = reinterpret_cast<const uint32_t*>(words);
  p.rewards = rewards.data;
  p.reward_type = rewards.dtype;
  p.video_stride = rewards.strides[0];
  p.stride = rewards.strides[1];
  p.videos = rewards.sizes[0];
  p.combinations = rewards.sizes[1];
  p.tokens = tokens;
  p.row_words = words_of(tokens);
  p.video_blocks = ceil_div(tokens, sum_threads);
  p.sums = sums;
  if (balanced) {
    p.weights = reinterpret_cast<PolicyWeights*>(weights);
    const int64_t rows = p.videos * p.combinations;
    const int error = launch(stream, weights_kernel, ceil_div(rows, weight_warps), weight_warps * warp_lanes, 0, p);
    if (error != 0) return error;
  } else {
    p.even = policy_weights(0, tokens, p.combinations, false);
  }
  return launch(stream, sums_kernel, p.videos * p.video_blocks, sum_threads, warp_lanes * sizeof(Addends), p);
}

int64_t policy_loss_parts(int64_t videos, int64_t tokens) { return videos * ceil_div(tokens, loss_threads); }

int policy_loss(Tensor logits, Tensor old_logits, const double* sums, PolicyRule rule, double* parts, void* loss,
                void* gradient, Stream stream) {
  LossParams p = {};
  p.odds = Odds(logits);
  p.old_odds = Odds(old_logits);
  p.sums = sums;
  p.rule = rule;
  p.scale = 1.0 / static_cast<double>(logits.sizes[0]);
  p.tokens = logits.sizes[1];
  p.video_blocks = ceil_div(p.tokens, loss_threads);
  p.blocks = policy_loss_parts(logits.sizes[0], p.tokens);
  p.parts = parts;
  p.loss = loss;
  p.gradient = gradient;
  const auto kernel = rule.kl_weight != 0.0 ? loss_kernel<true> : loss_kernel<false>;
  const int error = launch(stream, kernel, p.blocks, loss_threads, loss_threads / warp_lanes * sizeof(double), p);
  if (error != 0) return error;
  return launch(stream, total_kernel, p.blocks > 0 ? 1 : 0, total_threads, total_threads / warp_lanes * sizeof(double),
                p);
}

}  // namespace cacovid::cuda
