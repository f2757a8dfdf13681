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
  int64_t frame;      // in the video
  int64_t row;        // over all videos
  int64_t token;      // flat position of its first token
  int64_t out;        // column of its first drawn token
  const uint32_t* start;
};

// Scratch of one thread for a frame's distribution.
FrameSpace frame_space(const CombinationPlan& p, const uint32_t* start) {
  const int64_t tokens = padded(p.tokens_per_frame) + most_slots, groups = padded(p.num_groups);
  FrameSpace f = {};
  f.order = scratch<struct order_scratch, uint32_t>(tokens);
  f.weight = scratch<struct weight_scratch, double>(tokens);
  f.slot_weight = scratch<struct slot_weight_scratch, float>(tokens);
  f.log_weight = scratch<struct log_weight_scratch, float>(tokens);
  f.share = scratch<struct share_scratch, double>(groups);
  f.log_share = scratch<struct log_share_scratch, float>(groups);
  f.cumulative = scratch<struct cumulative_scratch, uint32_t>(groups);
  f.exps = scratch<struct exp_scratch, double>(tokens);
  f.fixed = scratch<struct fixed_scratch, int64_t>(tokens);
  f.start = start;
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
double log_prob_inside(const double* weight, int64_t length, const int64_t* drawn, int64_t count) {
  double remaining = 0.0, product = 1.0, result = 0.0;
  for (int64_t i = 0; i < length; ++i) remaining += weight[i];
  for (int64_t j = 0; j < count; ++j) {
    product *= weight[drawn[j]] / remaining;
    remaining -= weight[drawn[j]];
    if (product < 1e-200) {  // one logarithm for many draws
      result += std::log(product);
      product = 1.0;
    }
  }
  return result + std::log(product);
}

// Groups of any size, and frames with fewer candidates than a combination takes.
void large_draws(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d, const int32_t* groups) {
  const int64_t k = p.num_draw, most = p.tokens_per_frame / p.num_groups + 1;
  uint32_t* keys = scratch<struct member_key_scratch, uint32_t>(padded(most));
  uint32_t* columns = scratch<struct member_column_scratch, uint32_t>(padded(most));
  int64_t* drawn = scratch<struct member_drawn_scratch, int64_t>(k);
  const NoiseRow noise = {d.seed, static_cast<uint32_t>(d.video), d.step};
  for (int64_t s = 0; s < d.count; ++s) {
    const int64_t first = f.start[groups[s]], length = f.start[groups[s] + 1] - first;
    for (int64_t i = 0; i < padded(length); ++i) {
      keys[i] = i < length ? order_key(f.log_weight[first + i]) : 0;
      columns[i] = i < length ? static_cast<uint32_t>(d.frame * p.tokens_per_frame) + f.order[first + i] : 0;
    }
    const Contestants from = {keys, columns, length, count_valid(keys, length)};
    draw(from, noise, stream_word(stream_tokens, static_cast<uint32_t>(d.first_sample + s)), 1, k, drawn, 0);
    const int64_t found = std::min(k, from.valid);
    int64_t* tokens = d.tokens + s * d.token_stride;
    for (int64_t j = 0; j < k; ++j) tokens[j] = j < found ? d.token_base + f.order[first + drawn[j]] : -1;
    std::sort(tokens, tokens + found);
    d.groups[s * d.frame_stride] = groups[s];
    const double inside = log_prob_inside(f.weight + first, length, drawn, found);
    d.log_prob[s * d.frame_stride] = static_cast<float>(std::log(f.share[groups[s]]) + inside);
  }
}

void draw_tokens(const FrameSpace& f, const CombinationPlan& p, const FrameDraws& d) {
  int32_t* groups = scratch<struct group_scratch, int32_t>(d.count);
  combination_loops().draw_groups(f, d, groups);
  const bool small = p.tokens_per_frame <= most_slots * p.num_groups && f.valid >= p.num_draw;
  small ? combination_loops().small_draws(f, p, d, groups) : large_draws(f, p, d, groups);
}

// Weights of a video's frames in ranked order; returns how many have a chance.
int64_t frame_weights(const Tensor& scores, int64_t first, const CombinationPlan& p, int64_t samples, bool strict,
                      uint32_t* order, double* weight, int32_t& status) {
  const int64_t n = p.frames;
  uint32_t* keys = scratch<struct frame_key_scratch, uint32_t>(n);
  double* x = scratch<struct frame_score_scratch, double>(n);
  for (int64_t i = 0; i < n; ++i) keys[i] = order_key(element_of(scores, first + i));
  rank_by_sorting(keys, n, order);
  const int64_t valid = count_valid(keys, n);
  const bool infinite = keys[order[0]] == key_posinf;
  status |= (keys[order[n - 1]] == key_nan ? status_nan : 0) | (infinite ? status_posinf : 0);
  for (int64_t r = 0; r < n; ++r) {
    x[r] = static_cast<double>(element_of(scores, first + order[r]));
    if (infinite) x[r] = keys[order[r]] == key_posinf ? 0.0 : -INFINITY;
  }
  noise_loops().exp_below(x, n, x[0], weight);
  int64_t total = 0;
  for (int64_t r = 0; r < n; ++r) total += to_fixed(weight[r]);
  const double norm = from_fixed(std::max<int64_t>(total, 1));
  const double floor = 1.0 / (static_cast<double>(samples) * static_cast<double>(samples));
  for (int64_t r = 0; r < n; ++r) {
    weight[r] = weight[r] / norm;
    if (!strict && weight[r] < floor) weight[r] = floor;
  }
  if (strict) cap_shares(weight, std::max<int64_t>(valid, 1), 3.0 / static_cast<double>(n));
  std::fill(weight + valid, weight + n, 0.0);
  return valid;
}

// Frame combinations of one video: sample s at frames + s * stride.
void draw_frames(const Tensor& scores, int64_t first, const CombinationPlan& p, int64_t video, int64_t samples,
                 bool strict, DrawKey key, int64_t* frames, int64_t stride, float* log_prob, int64_t videos,
                 int32_t& status) {
  const int64_t n = p.frames, k = p.num_frames;
  uint32_t* order = scratch<struct frame_order_scratch, uint32_t>(padded(n));
  double* weight = scratch<struct frame_weight_scratch, double>(n);
  float* log_weight = scratch<struct frame_log_scratch, float>(n);
  uint32_t* keys = scratch<struct frame_race_scratch, uint32_t>(padded(n));
  const int64_t valid = frame_weights(scores, first, p, samples, strict, order, weight, status);
  if (valid < k) status |= status_short;
  noise_loops().log_weights(weight, n, log_weight);
  for (int64_t r = 0; r < padded(n); ++r) keys[r] = r < valid ? order_key(log_weight[r]) : 0;
  std::fill(order + n, order + padded(n), 0);
  double* items = scratch<struct frame_item_scratch, double>(n);
  for (int64_t r = 0; r < n; ++r) items[r] = std::log(weight[r]);
  PlackettLuce distribution = distribution_of(items, n);
  const Contestants from = {keys, order, n, valid};
  const NoiseRow noise = {key.seed, static_cast<uint32_t>(video), key.step};
  const int64_t found = std::min(k, valid);
  for (int64_t s = 0; s < samples; ++s) {
    int64_t* drawn = frames + s * stride;
    if (s == 0) {
      for (int64_t j = 0; j < k; ++j) drawn[j] = j < found ? j : -1;
    } else {
      draw(from, noise, stream_word(stream_frames, static_cast<uint32_t>(s)), 1, k, drawn, 0);
    }
    log_prob[s * videos] = s == 0 ? 0.0f : static_cast<float>(distribution.log_prob(drawn, k));
    for (int64_t j = 0; j < found; ++j) drawn[j] = first + order[drawn[j]];
    std::sort(drawn, drawn + found);
  }
}

void list_frames(const CombinationPlan* plans, int64_t videos, std::vector<FrameTask>& tasks,
                 std::vector<uint32_t>& starts) {
  size_t groups = 0;
  for (int64_t v = 0; v < videos; ++v) groups += static_cast<size_t>(plans[v].num_groups) + 1;
  starts.resize(groups);
  int64_t row = 0, token = 0, out = 0;
  uint32_t* start = starts.data();
  for (int64_t v = 0; v < videos; ++v) {
    const CombinationPlan& p = plans[v];
    for (int64_t g = 0; g <= p.num_groups; ++g) start[g] = static_cast<uint32_t>(group_start(p, g));
    for (int64_t f = 0; f < p.frames; ++f, ++row, token += p.tokens_per_frame, out += p.num_draw) {
      tasks.push_back({v, f, row, token, out, start});
    }
    start += p.num_groups + 1;
  }
}

}  // namespace

void sample_combinations(Tensor token_scores, Tensor frame_scores, const CombinationPlan* plans, int64_t videos,
                         CombinationSamples samples, DrawKey key, int threads, CombinationOutputs out) {
  thread_local std::vector<FrameTask> tasks;
  thread_local std::vector<uint32_t> starts;
  tasks.clear();
  list_frames(plans, videos, tasks, starts);
  const FrameTask* all = tasks.data();
  const int64_t frames = static_cast<int64_t>(tasks.size());
  const int64_t tokens = frames > 0 ? all[frames - 1].out + plans[all[frames - 1].video].num_draw : 0;
  const int64_t chunks = (samples.tokens + samples_per_task - 1) / samples_per_task;
  int32_t* flags = scratch<struct flag_scratch, int32_t>(frames);
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
      KeyRow keys = {scratch<struct key_scratch, uint32_t>(padded(p.tokens_per_frame)), 0, 0, status_ok};
      const Row scores = row_of(token_scores, task.row, task.token);
      hot_loops().load_keys(scores.data, token_scores.dtype, scores.stride, p.tokens_per_frame, keys);
      FrameSpace space = frame_space(p, task.start);
      combination_loops().prepare(keys, p, space);
      FrameDraws draws = {first,    last - first,
                          task.frame, task.video, key.seed, key.step,
                          task.token, out.indices + first * tokens + task.out, tokens,
                          out.groups + first * frames + task.row, out.log_prob + first * frames + task.row, frames};
      if (first == 0) {
        flags[task.row] = keys.status | (space.valid < p.num_draw ? status_short : 0);
        best_tokens(space, p, draws);
        draws = {1, last - 1, draws.frame, draws.video, draws.seed, draws.step, draws.token_base,
                 draws.tokens + tokens, tokens, draws.groups + frames, draws.log_prob + frames, frames};
      }
      draw_tokens(space, p, draws);
    }
  });
  int64_t frame_columns = 0, row = 0, column = 0;
  for (int64_t v = 0; v < videos; ++v) frame_columns += plans[v].num_frames;
  for (int64_t v = 0; v < videos; ++v) {
    out.status[v] = status_ok;
    for (int64_t f = 0; f < plans[v].frames; ++f) out.status[v] |= flags[row + f];
    if (samples.frames > 0) {
      draw_frames(frame_scores, row, plans[v], v, samples.frames, samples.strict, key, out.frame_indices + column,
                  frame_columns, out.frame_log_prob + v, videos, out.status[v]);
    }
    row += plans[v].frames;
    column += plans[v].num_frames;
  }
}

}  // namespace cacovid::cpu
