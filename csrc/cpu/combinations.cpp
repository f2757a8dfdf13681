#include <algorithm>
#include <cmath>
#include <vector>

#include "cacovid/ops.h"
#include "cacovid/order.h"
#include "cacovid/philox.h"
#include "isa/combination_loops.h"
#include "plackett_luce.h"
#include "race.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t samples_per_task = 512;    // they share the frame's distribution
constexpr int64_t elements_per_task = 8192;  // about 10 us of noise: less does not pay for waking a thread

// Where a frame's scores lie and where its combinations go.
struct FrameTask {
  int64_t video;
  int64_t frame;  // in the video
  int64_t row;    // over all videos
  int64_t token;  // flat position of its first token
  int64_t out;    // column of its first drawn token
};

// Scratch of one thread for a frame's distribution.
FrameSpace frame_space(const CombinationPlan& p) {
  FrameSpace f = {};
  f.width = group_width(group_size(p, 0));
  const int64_t slots = padded(p.num_groups * f.width), groups = padded(p.num_groups);
  f.order = scratch<struct order_scratch, uint32_t>(padded(p.tokens_per_frame) + f.width);
  f.token = scratch<struct token_scratch, uint32_t>(slots);
  f.weight = scratch<struct weight_scratch, float>(slots);
  f.log_weight = scratch<struct log_weight_scratch, float>(slots);
  f.exps = scratch<struct exp_scratch, float>(slots);
  f.fixed = scratch<struct fixed_scratch, int64_t>(slots);
  f.share = scratch<struct share_scratch, double>(groups);
  f.log_share = scratch<struct log_share_scratch, float>(groups);
  f.cumulative = scratch<struct cumulative_scratch, uint32_t>(groups);
  return f;
}

// Sample 0: the best tokens of the frame.
void best_tokens(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d) {
  const int64_t found = std::min(p.num_draw, f.valid);
  for (int64_t j = 0; j < p.num_draw; ++j) d.tokens[j] = j < found ? d.token_base + f.order[j] : -1;
  std::sort(d.tokens, d.tokens + found);
  d.groups[0] = -1;
  d.log_prob[0] = 0.0f;
}

// ln of the probability of drawing ranks `drawn` of a group in their order. Weights of a group are within a factor
// of four, so that subtracting them loses nothing.
double log_prob_inside(const float* weights, int64_t length, const int64_t* drawn, int64_t count) {
  double remaining = 0.0, product = 1.0, result = 0.0;
  for (int64_t i = 0; i < length; ++i) remaining += static_cast<double>(weights[i]);
  for (int64_t j = 0; j < count; ++j) {
    const double weight = static_cast<double>(weights[drawn[j]]);
    product *= weight / remaining;
    remaining -= weight;
    if (product < 1e-200) {  // one logarithm for many draws
      result += std::log(product);
      product = 1.0;
    }
  }
  return result + std::log(product);
}

// Groups of any size, and frames with fewer candidates than a combination takes.
void large_draws(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  const int64_t k = p.num_draw, size = padded(f.width);
  uint32_t* keys = scratch<struct member_key_scratch, uint32_t>(size);
  uint32_t* columns = scratch<struct member_column_scratch, uint32_t>(size);
  int64_t* drawn = scratch<struct member_drawn_scratch, int64_t>(k);
  const uint32_t frame_column = static_cast<uint32_t>(d.frame * p.tokens_per_frame);
  const NoiseRow noise = {d.seed, static_cast<uint32_t>(d.video), d.step};
  for (int64_t s = 0; s < d.count; ++s) {
    const int64_t first = groups[s] * f.width;
    for (int64_t i = 0; i < size; ++i) {
      keys[i] = i < f.width ? order_key(f.log_weight[first + i]) : 0;
      columns[i] = i < f.width ? frame_column + f.token[first + i] : 0;
    }
    const Contestants from = {keys, columns, f.width, count_valid(keys, f.width)};
    draw(from, noise, stream_word(stream_tokens, static_cast<uint32_t>(d.first_sample + s)), 1, k, drawn, 0);
    const int64_t found = std::min(k, from.valid);
    int64_t* tokens = d.tokens + s * d.token_stride;
    for (int64_t j = 0; j < k; ++j) tokens[j] = j < found ? d.token_base + f.token[first + drawn[j]] : -1;
    std::sort(tokens, tokens + found);
    d.groups[s * d.frame_stride] = groups[s];
    const double inside = log_prob_inside(f.weight + first, f.width, drawn, found);
    d.log_prob[s * d.frame_stride] = static_cast<float>(static_cast<double>(f.log_share[groups[s]]) + inside);
  }
}

void draw_tokens(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d) {
  int32_t* groups = scratch<struct group_scratch, int32_t>(padded(d.count));
  combination_loops().draw_groups(f, d, groups);
  const bool small = f.width <= slot_block && f.valid >= p.num_draw;
  small ? combination_loops().small_draws(f, p, d, groups) : large_draws(f, p, d, groups);
}

// The weights that a video's frames are drawn by, 0 without a chance, and the frames by rank.
void frame_weights(const Tensor& scores, int64_t first, const CombinationPlan& p, int64_t samples, bool strict,
                   uint32_t* order, float* weight, int32_t& status) {
  const int64_t n = p.frames;
  uint32_t* keys = scratch<struct frame_key_scratch, uint32_t>(n);
  float* score = scratch<struct frame_score_scratch, float>(n);
  double* share = scratch<struct frame_share_scratch, double>(n);
  for (int64_t i = 0; i < n; ++i) {
    score[i] = element_of(scores, first + i);
    keys[i] = order_key(score[i]);
  }
  rank_by_sorting(keys, n, order);
  const int64_t valid = count_valid(keys, n);
  status = (keys[order[n - 1]] == key_nan ? status_nan : 0) | (keys[order[0]] == key_posinf ? status_posinf : 0) |
           (valid < p.num_frames ? status_short : 0);
  combination_loops().exps(score, n, score[order[0]], score);
  int64_t total = 0;
  for (int64_t i = 0; i < n; ++i) total += to_fixed(static_cast<double>(score[i]));
  const double inverse = 1.0 / from_fixed(std::max<int64_t>(total, 1));
  for (int64_t r = 0; r < n; ++r) share[r] = static_cast<double>(score[order[r]]) * inverse;
  const double floor = 1.0 / static_cast<double>(samples * samples);
  if (strict) {
    cap_shares(ShareArray{share, n}, std::max<int64_t>(valid, 1), 3.0 / static_cast<double>(n));
  } else {
    for (int64_t r = 0; r < valid; ++r) share[r] = std::max(share[r], floor);
  }
  for (int64_t r = 0; r < n; ++r) weight[order[r]] = r < valid ? static_cast<float>(share[r]) : 0.0f;
}

// Frame combinations of one video: sample s at frames + s * stride and log_prob[s * videos].
void draw_frames(const Tensor& scores, int64_t first, const CombinationPlan& p, int64_t video, int64_t samples,
                 bool strict, DrawKey key, int64_t* frames, int64_t stride, float* log_prob, int64_t videos,
                 int32_t& status) {
  const int64_t n = p.frames, k = p.num_frames;
  uint32_t* order = scratch<struct frame_order_scratch, uint32_t>(n);
  float* weight = scratch<struct frame_weight_scratch, float>(n);
  double* items = scratch<struct frame_item_scratch, double>(n);
  uint32_t* keys = scratch<struct frame_race_scratch, uint32_t>(padded(n));
  frame_weights(scores, first, p, samples, strict, order, weight, status);
  for (int64_t i = 0; i < n; ++i) items[i] = std::log(static_cast<double>(weight[i]));
  noise_loops().log_weights(weight, n, weight);
  for (int64_t i = 0; i < padded(n); ++i) keys[i] = i < n ? order_key(weight[i]) : 0;
  PlackettLuce distribution = distribution_of(items, n);
  const Contestants from = {keys, position_columns(n), n, count_valid(keys, n)};
  const NoiseRow noise = {key.seed, static_cast<uint32_t>(video), key.step};
  const int64_t found = std::min(k, from.valid);
  for (int64_t s = 0; s < samples; ++s) {
    int64_t* drawn = frames + s * stride;
    if (s == 0) {
      for (int64_t j = 0; j < k; ++j) drawn[j] = j < found ? int64_t{order[j]} : -1;
    } else {
      draw(from, noise, stream_word(stream_frames, static_cast<uint32_t>(s)), 1, k, drawn, 0);
    }
    log_prob[s * videos] = s == 0 ? 0.0f : static_cast<float>(distribution.log_prob(drawn, k));
    std::sort(drawn, drawn + found);
    for (int64_t j = 0; j < found; ++j) drawn[j] += first;
  }
}

void list_frames(const CombinationPlan* plans, int64_t videos, std::vector<FrameTask>& tasks) {
  int64_t row = 0, token = 0, out = 0;
  for (int64_t v = 0; v < videos; ++v) {
    for (int64_t f = 0; f < plans[v].frames; ++f, ++row) {
      tasks.push_back({v, f, row, token, out});
      token += plans[v].tokens_per_frame;
      out += plans[v].num_draw;
    }
  }
}

}  // namespace

void sample_combinations(Tensor token_scores, Tensor frame_scores, const CombinationPlan* plans, int64_t videos,
                         CombinationSamples samples, DrawKey key, int threads, CombinationOutputs out) {
  thread_local std::vector<FrameTask> tasks;
  tasks.clear();
  list_frames(plans, videos, tasks);
  const FrameTask* all = tasks.data();
  const int64_t frames = static_cast<int64_t>(tasks.size());
  const int64_t tokens = frames > 0 ? all[frames - 1].out + plans[all[frames - 1].video].num_draw : 0;
  const int64_t chunks = (samples.tokens + samples_per_task - 1) / samples_per_task;
  int64_t work = 1;
  for (int64_t v = 0; v < videos; ++v) {
    const int64_t slots = plans[v].tokens_per_frame / plans[v].num_groups + 1;
    work = std::max(work, plans[v].tokens_per_frame + slots * std::min(samples.tokens, samples_per_task));
  }
  parallel_for(frames * chunks, elements_per_task / work + 1, threads, [=](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const FrameTask& task = all[i / chunks];
      const CombinationPlan& p = plans[task.video];
      const int64_t first = i % chunks * samples_per_task, last = std::min(samples.tokens, first + samples_per_task);
      KeyRow keys = {scratch<struct key_scratch, uint32_t>(padded(p.tokens_per_frame + 1)), 0, 0, status_ok};
      const Row scores = row_of(token_scores, task.row, task.token);
      hot_loops().load_keys(scores.data, token_scores.dtype, scores.stride, p.tokens_per_frame, keys);
      keys.keys[p.tokens_per_frame] = 0;  // stands for the slots without a token
      FrameSpace space = frame_space(p);
      combination_loops().prepare(keys, p, space);
      FrameDraws draws = {first,
                          last - first,
                          task.frame,
                          task.video,
                          key.seed,
                          key.step,
                          task.token,
                          out.indices + first * tokens + task.out,
                          tokens,
                          out.groups + first * frames + task.row,
                          out.log_prob + first * frames + task.row,
                          frames};
      if (first == 0) {
        out.frame_status[task.row] = keys.status | (space.valid < p.num_draw ? status_short : 0);
        best_tokens(space, p, draws);
        draws = {1,
                 last - 1,
                 draws.frame,
                 draws.video,
                 draws.seed,
                 draws.step,
                 draws.token_base,
                 draws.tokens + tokens,
                 tokens,
                 draws.groups + frames,
                 draws.log_prob + frames,
                 frames};
      }
      draw_tokens(space, p, draws);
    }
  });
  if (samples.frames == 0) return;
  int64_t frame_columns = 0, row = 0, column = 0;
  for (int64_t v = 0; v < videos; ++v) frame_columns += plans[v].num_frames;
  for (int64_t v = 0; v < videos; ++v) {
    draw_frames(frame_scores, row, plans[v], v, samples.frames, samples.strict, key, out.frame_indices + column,
                frame_columns, out.frame_log_prob + v, videos, out.frame_draw_status[v]);
    row += plans[v].frames;
    column += plans[v].num_frames;
  }
}

}  // namespace cacovid::cpu
