// The CUDA half of the core, with the conventions of ops.h: tensors are on the device of the stream. Every function
// enqueues its kernels and returns; it neither allocates nor waits, and leaves the current device as it was. What it
// returns is 0 or the number of a CUDA error.
#pragma once

#include "cacovid/ops.h"

namespace cacovid::cuda {

struct Stream {
  int device;
  void* handle;  // a cudaStream_t
};

const char* error_text(int error);

// Of CUDA, 1000 * major + 10 * minor: what the installed driver serves, 0 without one, and what this library needs a
// driver of the same major version for.
struct Versions {
  int driver, runtime;
};
Versions versions();

// ---- sample -------------------------------------------------------------------------------------
// As cpu::gumbel_topk, in one launch. `added_steps`, an int64 on the device or null, is added to the key's step modulo
// 2^32. Log-probabilities agree to about float32's precision.
int gumbel_topk(Tensor logits, int64_t k, int64_t samples, cpu::DrawKey key, const int64_t* added_steps,
                int64_t* indices, float* log_prob, int32_t* status, Stream stream);

constexpr int64_t most_combination_tokens = 2048;  // of a frame
constexpr int64_t most_combination_frames = 2048;  // of a video, where there are frame combinations

// As cpu::sample_combinations, within those limits: one launch for every 36 videos. Steps and log-probabilities as
// above.
//
// packed [G, words], or null: the tokens of every combination as bits, frame after frame. A frame of P tokens has
// ceil(P / 32) words of its own, `words` is their sum over all frames; token i of a frame is bit i % 32 of its word
// i / 32, bits from P on are 0. So every word belongs to one frame: it is written once, by whoever draws that frame,
// and who reads a frame of all combinations finds its tokens in as few words as possible, at one column of each row.
int sample_combinations(Tensor token_scores, Tensor frame_scores, const CombinationPlan* plans, int64_t videos,
                        cpu::CombinationSamples samples, cpu::DrawKey key, const int64_t* added_steps,
                        const cpu::CombinationOutputs& out, uint32_t* packed, Stream stream);

// ---- select -------------------------------------------------------------------------------------
// Entries of int64 scratch that videos of very many frames need; 0 for all others.
int64_t budget_scratch(cpu::Videos videos);

// As cpu::allocate_budget. `scratch`: budget_scratch(videos) entries, null for none.
int allocate_budget(Tensor frame_scores, cpu::Videos videos, int64_t* scratch, int64_t* counts, int32_t* frame_status,
                    Stream stream);

// Rows of a tensor [N, D], step_bytes apart, of which the kept ones become the contiguous target [K, D].
struct KeptTokens {
  const void* source;  // null: not wanted
  int64_t step_bytes;
  void* target;
  int64_t row_bytes;
};

// What a selection of K of N tokens in F frames writes; null pointers are not wanted.
struct SelectOutputs {
  int64_t* indices;       // [K] flat positions, ascending
  int64_t* frame_counts;  // [F] kept tokens
  int32_t* frame_status;  // [F]
  bool* mask;             // [N] whether a token is kept; every element is written
  int64_t* positions;     // [3, K] frame, row and column of every kept token within its video
  int32_t* cu_seqlens;    // [videos + 1] kept tokens of the videos before; no video, nothing written
  KeptTokens tokens;
};

// As cpu::select_tokens, in one launch for every 16 videos that differ, one more for each that needs scratch.
// widths [videos] on the host: columns of a frame, for the positions. `words`: `indices` gets rank words (order.h) of
// (score, position in its video) that order as signed integers, the greatest first, in the order of positions.
int select_tokens(Tensor token_scores, Tensor frame_scores, cpu::Videos videos, const int64_t* widths, bool words,
                  int64_t* scratch, const SelectOutputs& out, Stream stream);

// As cpu::segmented_topk, in one launch for every 16 runs of segments of one length and k. `words`: as above, the
// positions counted from the start of the segment.
int segmented_topk(Tensor scores, const int64_t* offsets, const int64_t* k, int64_t segments, bool words,
                   int64_t* indices, int32_t* status, Stream stream);

// ---- policy_loss --------------------------------------------------------------------------------
// As cpu::pack_masks, in one launch.
int pack_masks(Tensor masks, int32_t* words, Stream stream);
// As cpu::pack_indices, in one launch, into words that are zero.
int pack_indices(Tensor indices, int64_t tokens, int32_t* words, Stream stream);

// As cpu::policy_sums, the same bits. weights: scratch of [B, G, 2], unused (and one launch less) if not balanced.
int policy_sums(const int32_t* words, Tensor rewards, int64_t tokens, bool balanced, double* weights, double* sums,
                Stream stream);

// As cpu::policy_loss, in two launches; the gradient has the same bits. parts: scratch of policy_loss_parts numbers.
int64_t policy_loss_parts(int64_t videos, int64_t tokens);
int policy_loss(Tensor logits, Tensor old_logits, const double* sums, PolicyRule rule, double* parts, void* loss,
                void* gradient, Stream stream);

// ---- gather -------------------------------------------------------------------------------------
// As cpu::gather_rows: one launch for every 8 tensors.
int gather_rows(const Tensor* xs, const int32_t* dims, int64_t count, const int64_t* index, int64_t kept,
                void* const* targets, Stream stream);

// ---- repack -------------------------------------------------------------------------------------
// As cpu::repack_rows, except that rows of a tensor number at most 2^31 - 1, that `total` alone says how many rows a
// ragged list has, and that bounds may be anything: wrong ones move wrong rows, but touch no other memory. In place
// with ragged lists total may be at most B * H * N. One launch for all tensors of up to 4 shapes (what they keep, as a
// count, included), as long as their pointers fit: 224 tensors, or with lists of their own and tables of angles 64
// layers of keys and values in place. A head (a tensor, if packed to its front) is moved in place by one block, or by
// one block for each piece of its columns.
int repack_rows(const cpu::CacheTensor* tensors, int64_t count, const cpu::KeptRows* kept, bool zero_tail,
                Stream stream);

// ---- paged --------------------------------------------------------------------------------------
// As cpu::repack_pages, except that rows of a tensor number at most 2^31 - 1. One launch moves rows and writes tables,
// for as many tensors as one of repack_rows; where there are several, the later ones only add to the status. In place a
// head of a sequence is moved by one block, or by one block for each piece of its columns. With out_block_table no
// block that is written may be read, else values, but never memory, are wrong.
int repack_pages(const cpu::PagedTensor* tensors, int64_t tensor_count, const cpu::KeptRows* kept, int64_t lists,
                 const cpu::PagedSequences& sequences, const cpu::PagedOutputs& out, Stream stream);

}  // namespace cacovid::cuda
