// How the rows of tensors are shared out among blocks, each of which walks through some rows for some columns.
#pragma once

#include <algorithm>

#include "cacovid/divisor.h"

namespace cacovid::cuda {

constexpr int accesses = 4;            // of a thread in one step: so many loads are in flight
constexpr int most_threads = 256;      // of a block
constexpr int64_t enough_walks = 264;  // two for every multiprocessor of a large GPU
constexpr int64_t narrowest = 64;      // bytes of a row that a walk is worth: less, and memory is fetched twice

constexpr int64_t most_rows = 2147483647;  // of a tensor

// What has to be moved of one tensor. A row consists of pairs of accesses that are turned together, in two halves, and
// of accesses behind them.
struct Work {
  int64_t rows;
  int64_t walks;    // that move theirs in order; 0: any order will do
  int64_t ordered;  // rows of such a walk
  int64_t tail;     // rows that it only writes
  int64_t half, rest;
  int64_t width;  // bytes of an access
};

// The walks of some tensors of the same work.
struct Walks {
  uint32_t rows, rows_of_walk;
  Divisor walks, pieces;  // walks of a tensor; pieces that a row is cut into, one for each walk
  uint32_t pair_pieces;   // the first ones: of pairs, of 2^lanes_log2 accesses in each half
  uint32_t lanes_log2;    // threads that move one row side by side
  uint32_t first_block, first_tensor;
};

struct Walk {
  uint32_t tensor, number;  // which walk of the tensor's
  uint32_t first, last;     // its rows
  int64_t column;           // its first access of a row: of the pairs, or of what is behind them
  bool pairs;
};

CACOVID_HD Walk walk_of(const Walks& w, uint32_t block) {
  const uint32_t walk = w.pieces.quotient(block - w.first_block);
  const uint32_t piece = w.pieces.remainder(block - w.first_block, walk), tensor = w.walks.quotient(walk);
  const uint32_t number = w.walks.remainder(walk, tensor);
  const uint64_t first = static_cast<uint64_t>(number) * w.rows_of_walk, last = first + w.rows_of_walk;
  const bool pairs = piece < w.pair_pieces;
  return {w.first_tensor + tensor,
          number,
          static_cast<uint32_t>(first),
          static_cast<uint32_t>(last < w.rows ? last : w.rows),
          static_cast<int64_t>(piece - (pairs ? 0 : w.pair_pieces)) << w.lanes_log2,
          pairs};
}

inline int64_t ceil_divide(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Rows are cut into pieces where there are too few walks for a GPU, but not into ones that memory fetches twice.
inline uint32_t lanes_log2_of(const Work& work, int64_t tensors) {
  uint32_t log2 = 0;
  const int64_t across = std::max(work.half, work.rest);
  while (log2 < 5 && (int64_t{1} << log2) < across) ++log2;
  const auto walks = [&] {
    const int64_t lanes = int64_t{1} << log2;
    return tensors * work.walks * (ceil_divide(work.half, lanes) + ceil_divide(work.rest, lanes));
  };
  while (work.walks > 0 && log2 > 0 && (work.width << log2) > narrowest && walks() < enough_walks) --log2;
  return log2;
}

// As many threads as have something to move.
inline int threads_of(const Work& work, uint32_t lanes_log2) {
  const int64_t rows = work.walks > 0 ? std::max(work.ordered, work.tail) : work.rows;
  int threads = most_threads;
  while (threads > 32 && (threads / 2 >> lanes_log2) * accesses >= rows) threads /= 2;
  return threads;
}

inline Walks walks_of(const Work& work, uint32_t lanes_log2, int threads) {
  Walks w = {};
  const int64_t lanes = int64_t{1} << lanes_log2, pairs = ceil_divide(work.half, lanes);
  w.rows = static_cast<uint32_t>(work.rows);
  w.rows_of_walk = static_cast<uint32_t>(work.walks > 0 ? work.ordered : (threads >> lanes_log2) * accesses);
  w.walks = divisor(work.walks > 0 ? work.walks : ceil_divide(work.rows, w.rows_of_walk));
  w.pieces = divisor(pairs + ceil_divide(work.rest, lanes));
  w.pair_pieces = static_cast<uint32_t>(pairs);
  w.lanes_log2 = lanes_log2;
  return w;
}

}  // namespace cacovid::cuda
