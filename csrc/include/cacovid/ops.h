// The whole core API. No function allocates an output, aborts, or throws anything but std::bad_alloc; shapes are the
// caller's duty (python/ checks them), values never are: any score, index or NaN is memory-safe.
#pragma once

#include "cacovid/budget.h"
#include "cacovid/combinations.h"
#include "cacovid/policy_loss.h"
#include "cacovid/status.h"
#include "cacovid/tensor.h"

namespace cacovid::cpu {

// Videos of a call, packed one after another along the token axis.
struct Videos {
  const BudgetPlan* plans;
  int64_t count;
};

// ---- select -------------------------------------------------------------------------------------
// frame_scores [F] or [B, T] f32 | f16 | bf16 or undefined (all frames equal) -> counts [F] i64,
// frame_status [F] i32.
void allocate_budget(Tensor frame_scores, Videos videos, int64_t* counts, int32_t* frame_status);

// token_scores [N], [T, P] or [B, T, P] f32 | f16 | bf16 -> indices [sum of num_keep] i64, flat positions,
// ascending or by falling score; frame_counts [F] i64, fill included; frame_status [F] i32, what was odd about the
// scores of each frame, its own included.
void select_tokens(Tensor token_scores, Tensor frame_scores, Videos videos, bool by_score, int threads,
                   int64_t* indices, int64_t* frame_counts, int32_t* frame_status);

// scores [N] or [S, P]; segment s is [offsets[s], offsets[s + 1]) of the flat axis and keeps k[s] of them
// -> indices [sum of k] i64 flat positions, status [S] i32.
void segmented_topk(Tensor scores, const int64_t* offsets, const int64_t* k, int64_t segments, bool by_score,
                    int threads, int64_t* indices, int32_t* status);

// ---- sample -------------------------------------------------------------------------------------
// Whose noise a draw uses (philox.h).
struct DrawKey {
  uint64_t seed;
  uint32_t step, stream;
};

// logits [R, N] f32 | f16 | bf16 -> indices [samples, R, k] i64 in draw order, padded with -1 where fewer than k
// have a chance; log_prob [samples, R] of the ordered draw; status [R] i32.
void gumbel_topk(Tensor logits, int64_t k, int64_t samples, DrawKey key, int threads, int64_t* indices, float* log_prob,
                 int32_t* status);

// logits [R, N] f64 | f32 | f16 | bf16, indices [S, R, k] i64 -> log_prob [S, R] of the ordered draws.
void pl_log_prob(Tensor logits, Tensor indices, int threads, double* log_prob);
// grad [S, R] -> grad_logits [R, N].
void pl_log_prob_backward(const double* grad, Tensor logits, Tensor indices, int threads, double* grad_logits);
// direction [R, N], the gradient that reached grad_logits -> grad_grad [S, R], grad_logits [R, N].
void pl_log_prob_double_backward(const double* direction, const double* grad, Tensor logits, Tensor indices,
                                 int threads, double* grad_grad, double* grad_logits);

struct CombinationSamples {
  int64_t tokens, frames;  // token combinations (G) and frame combinations (Gf), each with the best as its first
  bool strict;             // frames: cap every probability at 3 / T, or the published floor of 1 / Gf^2
};
struct CombinationOutputs {
  int64_t* indices;            // [G, sum of frames * num_draw] flat token positions, ascending in each frame, then -1
  int64_t* groups;             // [G, F] group that was drawn, -1 in the first row
  float* log_prob;             // [G, F] ln of the probability of the group and the ordered draw inside it
  int64_t* frame_indices;      // [Gf, sum of num_frames] flat frame positions, ascending in each video, then -1
  float* frame_log_prob;       // [Gf, videos]
  int32_t* frame_status;       // [F] of every frame's token scores
  int32_t* frame_draw_status;  // [videos] of every video's frame scores; unused without frame combinations
};

// token_scores [N], [T, P] or [B, T, P], frame_scores [F] or [B, T], f32 | f16 | bf16; the key's stream is unused.
void sample_combinations(Tensor token_scores, Tensor frame_scores, const CombinationPlan* plans, int64_t videos,
                         CombinationSamples samples, DrawKey key, int threads, CombinationOutputs out);

// bits [n] -> standard Gumbel noise [n] (gumbel.h).
void gumbel_noise(const uint32_t* bits, int64_t n, float* noise);

// ---- score --------------------------------------------------------------------------------------
// hidden [N, D] f32 | f16 | bf16, frames of grid_thw [3 * videos] -> rrms [N], 1 / sqrt(mean square + eps) of
// every row; frame_mean [F, D], the mean row of every frame. One read of hidden.
void frame_pool(Tensor hidden, const int64_t* grid_thw, int64_t videos, float eps, int threads, float* rrms,
                float* frame_mean);

// ---- attention ----------------------------------------------------------------------------------
struct AttentionRule {
  float scale;    // of the products
  bool per_head;  // one row of scores for every key head, else their mean
};

// query [B, H, R, D], keys [B, K, L, D] f32 | f16 | bf16, both alike, K divides H; mask [B, L] b8 or undefined (no
// padding); row_positions [B, R] i64, the last key that a row sees, or undefined (all) -> scores [B, L], per_head
// [B, K, L]: mean over rows and heads of softmax(scale * query keys^T), over the rows that see a key.
void attention_scores(Tensor query, Tensor keys, Tensor mask, Tensor row_positions, AttentionRule rule, int threads,
                      float* scores);

// ---- gather -------------------------------------------------------------------------------------
// For every t: targets[t] = xs[t] with its axis dims[t] replaced by the index [kept] i64, contiguous, same bytes.
// Any dtype and strides. An index outside the axis reads nothing and gives zeros. `fresh`: the targets were
// just allocated.
void gather_rows(const Tensor* xs, const int32_t* dims, int64_t count, const int64_t* index, int64_t kept, bool fresh,
                 int threads, void* const* targets);

struct RowSum {
  int64_t outer, tokens, columns;  // the target's shape, token axis in the middle
};

// The adjoint: grads[t] [outer, kept, columns] contiguous, a float type -> targets[t] [outer, tokens, columns].
// Rows of one token are summed from +0 in ascending index position, in float32 (float64 for f64), rounded once.
void scatter_rows(const Tensor* grads, const RowSum* sums, int64_t count, const int64_t* index, int64_t kept,
                  bool fresh, int threads, void* const* targets);

// ---- repack -------------------------------------------------------------------------------------
// The rows that every head of a cache [B, H, N, D] keeps, for the tensors that share them.
struct KeptRows {
  const int64_t* index;       // positions: [b, h, per_head], or head after head where cu_seqlens is set
  const int32_t* cu_seqlens;  // [B * H + 1] bounds of the heads in `index`; null: per_head rows each
  int64_t per_head;
  int64_t total;                  // rows of all heads together where cu_seqlens is set
  int64_t batch_step, head_step;  // in lists of per_head rows, 0 where all batch rows or heads share one
  const float* cos;               // rotation of the keys, one row of `half` for every row kept; null: none
  const float* sin;
  int64_t table_batch_step, table_head_step;  // as batch_step and head_step, of the tables
  int64_t half;
};

enum class Placement : int32_t {
  elsewhere,  // into `target`, contiguous [B, H, per_head, D] or [total, D]
  in_heads,   // to the front of each head's rows
  in_front,   // to the front of the tensor, which is contiguous, laid out as `elsewhere`
};

struct CacheTensor {
  Tensor x;      // [B, H, N, D], any dtype and strides; a float type if rotated
  int64_t kept;  // which KeptRows
  bool rotated;
  Placement placement;
  void* target;
};

// Moves the kept rows of all tensors. A position outside [0, N) reads nothing and gives zeros. In place the
// positions of a head must ascend, else values, but never memory, are wrong. zero_tail: in_heads also zeroes
// the rows behind the kept ones. `fresh`: the targets were just allocated.
void repack_rows(const CacheTensor* tensors, int64_t count, const KeptRows* kept, bool zero_tail, bool fresh,
                 int threads);

// ---- paged --------------------------------------------------------------------------------------
// The sequences of a paged cache: logical block l of sequence b is the physical block block_table[b * width + l].
struct PagedSequences {
  int64_t count, blocks, block_size;
  const int32_t* block_table;      // [count, width]
  const int32_t* seq_lens;         // [count] rows in use before
  const int32_t* out_block_table;  // [count, out_width], blocks that the kept rows go to; null: block_table, in place
  int64_t width, out_width;        // out_width * block_size >= per_head of every KeptRows
};

struct PagedTensor {
  Tensor x;      // [blocks, block_size, H, D], any dtype and strides; a float type if rotated
  int64_t kept;  // which KeptRows, whose batch rows are the sequences; never with cu_seqlens
  bool rotated;
};

struct PagedOutputs {
  int32_t* block_table;   // [count, ceil(per_head / block_size)] of the kept rows, -1 behind the blocks in use
  int32_t* seq_lens;      // [count] entries of the first list's first head that are not -1
  int32_t* freed_blocks;  // [count, width] blocks that a sequence used and does not any more, then -1
  int32_t* num_freed;     // [count]
  int32_t* status;        // [count] status_out_of_bounds, or 0
};

// Row i that a head keeps, at position kept.index[i] of its sequence, moves to row i of the sequence, in blocks of
// the same tensors. An entry of -1 writes nothing. A position outside [0, seq_len), or in a block with an id outside
// [0, blocks), reads nothing, gives zeros and sets the status; a target block with such an id is not written and sets
// it too. In place a row that stays where it is, at an angle of zero (all cosines 1 and sines 0) if rotated, is not
// written; the positions of a head must ascend, and no block that is written may occur twice in the table, else
// values, but never memory, are wrong. All lists have the same per_head.
void repack_pages(const PagedTensor* tensors, int64_t tensor_count, const KeptRows* kept, int64_t lists,
                  const PagedSequences& sequences, int threads, const PagedOutputs& out);

// ---- policy_loss --------------------------------------------------------------------------------
// Masks of combinations as words: bit i % 32 of word i / 32 is token i. A row has ceil(tokens / 32) words; bits beyond
// its tokens are zero, and ignored where words are read.

// masks [R, N] bool or any integer type -> words [R, ceil(N / 32)] of what is not zero.
void pack_masks(Tensor masks, int threads, int32_t* words);
// indices [R, K] i64 -> words [R, ceil(tokens / 32)]; an index outside [0, tokens) marks nothing.
void pack_indices(Tensor indices, int64_t tokens, int threads, int32_t* words);

// words [B, G, ceil(tokens / 32)], rewards [B, G] any float type -> sums [B, 6, tokens] (policy_loss.h).
// Without `weights` the rows kept_weight and dropped_weight, which only the KL reads, are left as they are.
void policy_sums(const int32_t* words, Tensor rewards, int64_t tokens, bool balanced, bool weights, int threads,
                 double* sums);

// logits, old_logits [B, N, 2] (drop, keep) or [B, N], their difference; any float type; sums [B, 6, N] -> loss [1],
// the mean over B, and its gradient, of the shape of logits; both f64 if the logits are, else f32.
void policy_loss(Tensor logits, Tensor old_logits, const double* sums, PolicyRule rule, int threads, void* loss,
                 void* gradient);

// ---- engine -------------------------------------------------------------------------------------
// Asks for huge pages behind memory that nobody has touched yet: a first touch then costs one fault per
// 2 MiB, not per 4 KiB, and faults are five sixths of the time of a large copy to fresh memory.
void expect_writes(void* memory, int64_t bytes);

const char* isa_name();  // "baseline", "avx2" or "avx512": what this CPU runs (CACOVID_CPU_ISA caps it)

}  // namespace cacovid::cpu
