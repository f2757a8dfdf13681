// Drawing without replacement: the k largest of the perturbed scores, in falling order (Gumbel top-k).
#pragma once

#include "isa/noise_loops.h"

namespace cacovid::cpu {

// Scores to draw from, as order keys; -inf and NaN have probability zero.
struct Contestants {
  const uint32_t* keys;     // padded(n)
  const uint32_t* columns;  // padded(n); who each is to the generator
  int64_t n;
  int64_t valid;  // how many have a chance
};

// 0, 1, 2, ... for contestants that are named by their position; padded(n) of them.
const uint32_t* position_columns(int64_t n);

// Positions of n keys by falling key, the lower position first among equals.
void rank_by_sorting(const uint32_t* keys, int64_t n, uint32_t* order);

void sort_ascending(uint32_t* words, int64_t n);

int64_t count_valid(const uint32_t* keys, int64_t n);

// Draws `count` <= batch_rows samples, the first with `stream_sample`, the next with one more, and so on.
// Sample s writes k positions in [0, n) to out + s * out_stride, the winner first, then -1 where fewer than k
// have a chance. Ties go to the lower position.
void draw(const Contestants& from, const NoiseRow& noise, uint32_t stream_sample, int64_t count, int64_t k,
          int64_t* out, int64_t out_stride);

}  // namespace cacovid::cpu
