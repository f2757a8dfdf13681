#include <algorithm>
#include <cmath>
#include <vector>

#include "cacovid/ops.h"
#include "isa/policy_loops.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t bytes_per_task = 128 << 10;  // about 5 us of reading: less does not pay for waking a thread
constexpr int64_t adds_per_task = 32 << 10;    // of a word's tokens for one combination, a nanosecond each
constexpr int64_t terms_per_task = 4;          // blocks, 2 us each

int64_t words_of(int64_t tokens) { return (tokens + word_tokens - 1) / word_tokens; }

uint32_t valid_bits(int64_t tokens) { return tokens % word_tokens == 0 ? ~0u : (1u << tokens % word_tokens) - 1; }

template <class T>
void pack_wide(const T* mask, int64_t stride, int64_t n, uint32_t* words) {
  for (int64_t i = 0; i < n; i += word_tokens) {
    uint8_t bytes[word_tokens];
    const int64_t count = std::min(word_tokens, n - i);
    for (int64_t j = 0; j < count; ++j) bytes[j] = mask[(i + j) * stride] != 0;
    policy_loops().pack_bytes(bytes, count, words + i / word_tokens);
  }
}

void pack_row(const Tensor& masks, int64_t row, uint32_t* words) {
  const void* data = offset(masks, row * masks.strides[0]);
  const int64_t stride = masks.strides[1], n = masks.sizes[1];
  switch (item_size(masks.dtype)) {
    case 8: return pack_wide(static_cast<const int64_t*>(data), stride, n, words);
    case 4: return pack_wide(static_cast<const int32_t*>(data), stride, n, words);
    case 2: return pack_wide(static_cast<const int16_t*>(data), stride, n, words);
    default:
      if (stride == 1) return policy_loops().pack_bytes(static_cast<const uint8_t*>(data), n, words);
      return pack_wide(static_cast<const uint8_t*>(data), stride, n, words);
  }
}

double load_reward(const Tensor& rewards, int64_t video, int64_t g) {
  const int64_t at = video * rewards.strides[0] + g * rewards.strides[1];
  if (rewards.dtype == DType::f64) return rewards.as<double>()[at];
  return static_cast<double>(load_element({rewards.data, 1}, rewards.dtype, at));
}

double lane_sum(const std::vector<double>& x) {
  double lanes[reward_lanes] = {};
  for (size_t i = 0; i < x.size(); ++i) lanes[i % reward_lanes] += x[i];
  for (int64_t half = reward_lanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) lanes[l] += lanes[l + half];
  }
  return lanes[0];
}

std::vector<double> advantages_of(const Tensor& rewards, int64_t video) {
  const int64_t g = rewards.sizes[1];
  std::vector<double> x(static_cast<size_t>(g)), squares(static_cast<size_t>(g));
  for (int64_t i = 0; i < g; ++i) x[i] = load_reward(rewards, video, i);
  const double mean = lane_sum(x) / static_cast<double>(g);
  for (int64_t i = 0; i < g; ++i) squares[i] = (x[i] - mean) * (x[i] - mean);
  const double deviation = std::sqrt(reward_variance(lane_sum(squares), g));
  for (double& reward : x) reward = policy_advantage(reward, mean, deviation);
  return x;
}

// The combinations of one video by what they add to: those above the mean, the others, and all by weight alone.
struct WeightedRows {
  std::vector<WeightedRow> better, worse, all;

  WeightedRows(const uint32_t* words, const Tensor& rewards, int64_t video, int64_t tokens, bool balanced) {
    const std::vector<double> advantages = advantages_of(rewards, video);
    const int64_t g = rewards.sizes[1], row_words = words_of(tokens);
    for (auto* rows : {&better, &worse, &all}) rows->reserve(static_cast<size_t>(g));
    for (int64_t i = 0; i < g; ++i, words += row_words) {
      const uint32_t last = words[row_words - 1] & valid_bits(tokens);
      const int64_t count =
          balanced ? policy_loops().count_bits(words, row_words - 1) + policy_loops().count_bits(&last, 1) : 0;
      const PolicyWeights w = policy_weights(count, tokens, g, balanced);
      const double a = advantages[static_cast<size_t>(i)];
      (a > 0.0 ? better : worse).push_back({words, w.kept * a, w.dropped * a});
      all.push_back({words, w.kept, w.dropped});
    }
  }
};

}  // namespace

void pack_masks(Tensor masks, int threads, int32_t* words) {
  const int64_t rows = masks.sizes[0], n = masks.sizes[1], row_words = words_of(n);
  const int64_t grain = bytes_per_task / std::max<int64_t>(n * item_size(masks.dtype), 1) + 1;
  parallel_for(rows, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) pack_row(masks, r, reinterpret_cast<uint32_t*>(words) + r * row_words);
  });
}

void pack_indices(Tensor indices, int64_t tokens, int threads, int32_t* words) {
  const int64_t rows = indices.sizes[0], k = indices.sizes[1], row_words = words_of(tokens);
  const int64_t grain = bytes_per_task / std::max<int64_t>(8 * k + 4 * row_words, 1) + 1;
  parallel_for(rows, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      uint32_t* row = reinterpret_cast<uint32_t*>(words) + r * row_words;
      std::fill(row, row + row_words, 0u);
      const int64_t* index = indices.as<int64_t>() + r * indices.strides[0];
      for (int64_t j = 0; j < k; ++j) {
        const uint64_t i = static_cast<uint64_t>(index[j * indices.strides[1]]);
        if (i < static_cast<uint64_t>(tokens)) row[i / word_tokens] |= 1u << i % word_tokens;
      }
    }
  });
}

void policy_sums(const int32_t* words, Tensor rewards, int64_t tokens, bool balanced, bool weights, int threads,
                 double* sums) {
  const int64_t videos = rewards.sizes[0], g = rewards.sizes[1], row_words = words_of(tokens);
  const int64_t grain = adds_per_task / std::max<int64_t>(g * word_tokens, 1) + 1;
  for (int64_t v = 0; v < videos; ++v) {
    const WeightedRows rows(reinterpret_cast<const uint32_t*>(words) + v * g * row_words, rewards, v, tokens, balanced);
    double* out = sums + v * policy_sums_rows * tokens;
    parallel_for(row_words, grain, threads, [=, &rows](int64_t first, int64_t last) {
      for (int64_t word = first; word < last; ++word) {
        double* to = out + word * word_tokens;
        const auto add = [=](const std::vector<WeightedRow>& of, PolicySum kept_row, PolicySum dropped_row) {
          const int64_t n = tokens - word * word_tokens, count = static_cast<int64_t>(of.size());
          if (n >= word_tokens) {
            return policy_loops().add_rows(of.data(), count, word, to + kept_row * tokens, to + dropped_row * tokens);
          }
          double kept[word_tokens], dropped[word_tokens];
          policy_loops().add_rows(of.data(), count, word, kept, dropped);
          std::copy(kept, kept + n, to + kept_row * tokens);
          std::copy(dropped, dropped + n, to + dropped_row * tokens);
        };
        add(rows.better, kept_better, dropped_better);
        add(rows.worse, kept_worse, dropped_worse);
        if (weights) add(rows.all, kept_weight, dropped_weight);
      }
    });
  }
}

namespace {

OddsRow odds_of(const Tensor& logits, int64_t video) {
  const bool pairs = logits.ndim == 3;
  return {offset(logits, video * logits.strides[0]), logits.dtype, pairs, logits.strides[1],
          pairs ? logits.strides[2] : 0};
}

}  // namespace

void policy_loss(Tensor logits, Tensor old_logits, const double* sums, PolicyRule rule, int threads, void* loss,
                 void* gradient) {
  const int64_t videos = logits.sizes[0], tokens = logits.sizes[1];
  const int64_t blocks = (tokens + policy_block - 1) / policy_block;
  const bool wide = logits.dtype == DType::f64;
  const double scale = 1.0 / static_cast<double>(videos);
  double* parts = scratch<struct loss_scratch, double>(videos * blocks);  // of fixed blocks: one order of additions
  parallel_for(videos * blocks, terms_per_task, threads, [=](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t v = task / blocks, begin = task % blocks * policy_block;
      const int64_t at = v * tokens * (logits.ndim == 3 ? 2 : 1) * (wide ? 8 : 4);
      const PolicyTokens of = {odds_of(logits, v),
                               odds_of(old_logits, v),
                               sums + v * policy_sums_rows * tokens,
                               tokens,
                               rule,
                               scale,
                               static_cast<char*>(gradient) + at};
      parts[task] = policy_loops().terms(of, begin, std::min(policy_block, tokens - begin));
    }
  });
  double total = 0.0;
  for (int64_t i = 0; i < videos * blocks; ++i) total += parts[i];
  if (wide) {
    *static_cast<double*>(loss) = total * scale;
  } else {
    *static_cast<float*>(loss) = static_cast<float>(total * scale);
  }
}

}  // namespace cacovid::cpu
