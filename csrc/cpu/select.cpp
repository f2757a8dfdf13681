#include <algorithm>
#include <vector>

#include "cacovid/ops.h"
#include "cacovid/order.h"
#include "isa/hot_loops.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

struct key_scratch;
struct mask_scratch;
struct pick_scratch;
struct word_scratch;

constexpr int64_t frames_per_task = 32;  // about 5 us of work: less does not pay for waking a thread

// Where a frame's tokens lie, what it keeps, and where the results go. Every field follows from the
// counts alone, so frames are independent of each other.
struct FrameTask {
  int64_t row;         // frame number over all videos
  int64_t token;       // flat position of its first token
  int64_t ranked;      // tokens kept by score
  int64_t unranked;    // tokens of earlier frames of the video that were not kept by score
  int64_t first_pick;  // uniform picks of earlier frames
  int64_t picks;
  int64_t out;     // kept tokens before this frame
  int64_t length;  // its tokens
  UniformFill fill;
};

void list_frames(Videos videos, const int64_t* counts, std::vector<FrameTask>& tasks) {
  int64_t row = 0, token = 0, out = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    const UniformFill fill(p);
    int64_t unranked = 0, pick = 0;
    for (int64_t f = 0; f < p.frames; ++f, ++row, token += p.tokens_per_frame) {
      const int64_t next = unranked + p.tokens_per_frame - counts[row];
      const int64_t last_pick = fill.below(next);
      tasks.push_back({row, token, counts[row], unranked, pick, last_pick - pick, out, p.tokens_per_frame, fill});
      out += counts[row] + last_pick - pick;
      unranked = next;
      pick = last_pick;
    }
  }
}

// A few rows of n scores whose best positions are searched together, as bit masks.
class TopRows {
 public:
  TopRows(int64_t n, int64_t count) : n_(n), count_(count) {
    uint32_t* keys = scratch<key_scratch, uint32_t>(count * padded(n));
    uint64_t* masks = scratch<mask_scratch, uint64_t>(count * padded(n) / key_block);
    for (int64_t r = 0; r < count; ++r) {
      rows_[r].keys = keys + r * padded(n);
      masks_[r] = masks + r * padded(n) / key_block;
    }
  }
  int32_t load(int64_t r, Row scores, DType dtype, int64_t k) {
    k_[r] = k;
    hot_loops().load_keys(scores.data, dtype, scores.stride, n_, rows_[r]);
    return rows_[r].status;
  }
  void find() { hot_loops().top_masks(rows_, n_, count_, k_, masks_); }
  uint64_t* mask(int64_t r) { return masks_[r]; }

 private:
  int64_t n_, count_;
  KeyRow rows_[batch_rows];
  uint64_t* masks_[batch_rows];
  int64_t k_[batch_rows];
};

// Adds the frame's uniform picks among the tokens that were not ranked, then lists what is kept.
void emit_frame(const FrameTask& task, uint64_t* mask, int64_t* out) {
  int32_t* picks = scratch<pick_scratch, int32_t>(task.picks);
  for (int64_t j = 0; j < task.picks; ++j) {
    picks[j] = static_cast<int32_t>(task.fill[task.first_pick + j] - task.unranked);
  }
  hot_loops().set_ranked_zeros(mask, picks, task.picks);
  hot_loops().list_bits(mask, task.length, task.token, out);
}

// Reorders flat positions by falling score, the lower position first among equals.
void sort_by_score(const Tensor& scores, int64_t row, int64_t start, int64_t row_length, int64_t* positions,
                   int64_t count) {
  uint64_t* words = scratch<word_scratch, uint64_t>(count);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t in_segment = positions[i] - start;
    const int64_t frame = in_segment / row_length, column = in_segment % row_length;
    const Row r = row_of(scores, row + frame, start + frame * row_length);
    const float score = load_element(r, scores.dtype, column);
    words[i] = rank_word(order_key(score), static_cast<uint32_t>(in_segment));
  }
  std::sort(words, words + count, [](uint64_t a, uint64_t b) { return a > b; });
  for (int64_t i = 0; i < count; ++i) positions[i] = start + rank_index(words[i]);
}

}  // namespace

void select_tokens(Tensor token_scores, Tensor frame_scores, Videos videos, bool by_score, int threads,
                   int64_t* indices, int64_t* frame_counts, int32_t* frame_status) {
  allocate_budget(frame_scores, videos, frame_counts, frame_status);
  thread_local std::vector<FrameTask> tasks;
  tasks.clear();
  list_frames(videos, frame_counts, tasks);
  const FrameTask* all = tasks.data();
  const int64_t rows = static_cast<int64_t>(tasks.size());
  parallel_for(rows, frames_per_task, threads, [=](int64_t first, int64_t last) {
    for (int64_t i = first, rows = 0; i < last; i += rows) {
      const int64_t n = all[i].length;
      for (rows = 1; rows < batch_rows && i + rows < last && all[i + rows].length == n;) ++rows;
      TopRows top(n, rows);
      for (int64_t r = 0; r < rows; ++r) {
        const FrameTask& task = all[i + r];
        frame_status[i + r] |= top.load(r, row_of(token_scores, task.row, task.token), token_scores.dtype, task.ranked);
      }
      top.find();
      for (int64_t r = 0; r < rows; ++r) emit_frame(all[i + r], top.mask(r), indices + all[i + r].out);
    }
  });
  int64_t row = 0, token = 0, out = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    const BudgetPlan& p = videos.plans[v];
    if (by_score) sort_by_score(token_scores, row, token, p.tokens_per_frame, indices + out, p.num_keep);
    for (int64_t f = 0; f < p.frames; ++f, ++row) frame_counts[row] += all[row].picks;
    token += p.frames * p.tokens_per_frame;
    out += p.num_keep;
  }
}

void segmented_topk(Tensor scores, const int64_t* offsets, const int64_t* k, int64_t segments, bool by_score,
                    int threads, int64_t* indices, int32_t* status) {
  int64_t* outs = scratch<struct out_scratch, int64_t>(segments + 1);
  outs[0] = 0;
  for (int64_t s = 0; s < segments; ++s) outs[s + 1] = outs[s] + k[s];
  parallel_for(segments, frames_per_task, threads, [=](int64_t first, int64_t last) {
    const auto length = [&](int64_t s) { return offsets[s + 1] - offsets[s]; };
    for (int64_t i = first, rows = 0; i < last; i += rows) {
      for (rows = 1; rows < batch_rows && i + rows < last && length(i + rows) == length(i);) ++rows;
      TopRows top(length(i), rows);
      for (int64_t s = i; s < i + rows; ++s) {
        status[s] = top.load(s - i, row_of(scores, s, offsets[s]), scores.dtype, k[s]);
      }
      top.find();
      for (int64_t s = i; s < i + rows; ++s) {
        int64_t* out = indices + outs[s];
        hot_loops().list_bits(top.mask(s - i), length(s), offsets[s], out);
        if (by_score) sort_by_score(scores, s, offsets[s], length(s), out, k[s]);
      }
    }
  });
}

}  // namespace cacovid::cpu
