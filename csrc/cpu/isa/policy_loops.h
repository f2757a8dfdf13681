// The hot loops of the policy loss, compiled once per instruction set from policy_loops.inl.
#pragma once

#include "cacovid/policy_loss.h"
#include "isa/hot_loops.h"

namespace cacovid::cpu {

constexpr int64_t word_tokens = 32;
constexpr int64_t policy_block = 512;  // most tokens of one call of `terms`

// A row of packed masks and what its tokens add to a sum.
struct WeightedRow {
  const uint32_t* words;
  double kept, dropped;
};

// The log-odds of one video's tokens: single numbers, or the difference of the second and the first of a pair.
struct OddsRow {
  const void* data;
  DType dtype;
  bool pairs;
  int64_t stride, pair_stride;  // in elements
};

struct PolicyTokens {
  OddsRow odds, old_odds;
  const double* sums;  // [6, tokens]
  int64_t tokens;
  PolicyRule rule;
  double scale;    // of the gradient
  void* gradient;  // f64 if the odds are, else f32; [tokens] or [tokens, 2]
};

struct PolicyLoops {
  // Bit i % 32 of words[i / 32] is set where one of n bytes is not zero; the other bits of the last word are not.
  void (*pack_bytes)(const uint8_t* bytes, int64_t n, uint32_t* words);

  int64_t (*count_bits)(const uint32_t* words, int64_t count);

  // For 32 tokens, from +0 and in the order of the rows: kept[i] adds row.kept where bit i of row.words[word] is set,
  // dropped[i] adds row.dropped where it is not.
  void (*add_rows)(const WeightedRow* rows, int64_t count, int64_t word, double* kept, double* dropped);

  // Writes the gradient of tokens [first, first + n) and returns their loss; n <= policy_block.
  double (*terms)(const PolicyTokens& tokens, int64_t first, int64_t n);
};

inline const PolicyLoops& policy_loops() { return *hot_loops().policy; }

}  // namespace cacovid::cpu
