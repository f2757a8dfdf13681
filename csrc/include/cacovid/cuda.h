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
