// What a selection writes about the tokens that it keeps.
#pragma once

#include "cacovid/order.h"
#include "launch.cuh"
#include "memory.cuh"

namespace cacovid::cuda {

constexpr int row_loads = 4;  // in flight in every lane that copies rows

// Outputs of a launch, and how wide the rows that it copies are accessed.
struct KeptOutputs {
  SelectOutputs to;
  int64_t kept;     // K, of all videos
  int64_t columns;  // accesses of a row
  uint32_t pieces;  // of a row, a warp's accesses each
  int32_t width;    // bytes of an access
  bool words;

  KeptOutputs(const SelectOutputs& out, int64_t kept, bool words)
      : to(out), kept(kept), columns(0), pieces(0), width(1), words(words) {
    const KeptTokens& t = out.tokens;
    if (t.source == nullptr || t.row_bytes == 0) return;
    width = widest(reinterpret_cast<uintptr_t>(t.source) | reinterpret_cast<uintptr_t>(t.target) |
                   static_cast<uint64_t>(t.step_bytes | t.row_bytes));
    width = width == 8 ? 4 : width == 2 ? 1 : width;  // three kinds of loops are enough: rows are mostly aligned
    columns = t.row_bytes / width;
    pieces = static_cast<uint32_t>((columns - 1) / (row_loads * warp_lanes) + 1);
  }
};

// Some kept tokens of one frame, ascending, as numbers from token `first` of all on.
struct KeptList {
  const uint16_t* numbers;  // in shared memory
  uint32_t count;
  int64_t first;
  int64_t out;        // place of the first among all kept tokens
  uint32_t frame;     // its number in the video
  uint32_t in_video;  // what token `first` is of its video,
  uint32_t in_frame;  // and of the frame
};

// Rank words in the order of signed integers.
__device__ __forceinline__ int64_t signed_word(uint32_t key, uint32_t index) {
  return static_cast<int64_t>(rank_word(key ^ 0x80000000u, index));
}

// Writes them by `threads` threads, of which this is number `thread`. `key_of(number)` is asked for rank words.
template <class KeyOf>
__device__ __forceinline__ void store_list(const KeptOutputs& kept, const KeptList& list, uint32_t width,
                                           uint32_t thread, uint32_t threads, KeyOf key_of) {
  for (uint32_t j = thread; j < list.count; j += threads) {
    const uint32_t number = list.numbers[j];
    const int64_t out = list.out + j;
    if (kept.to.indices != nullptr) {
      kept.to.indices[out] = kept.words ? signed_word(key_of(number), list.in_video + number) : list.first + number;
    }
    if (kept.to.positions != nullptr) {
      const uint32_t token = list.in_frame + number, row = token / width;
      kept.to.positions[out] = list.frame;
      kept.to.positions[kept.kept + out] = row;
      kept.to.positions[2 * kept.kept + out] = token - row * width;
    }
  }
}

// Copies their rows, piece by piece: a warp moves `row_loads` accesses per lane of one row at a time, and every
// workers-th piece.
template <int Width>
__device__ __forceinline__ void copy_rows(const KeptOutputs& kept, const KeptList& list, uint32_t worker,
                                          uint32_t workers, uint32_t lane) {
  using Access = typename Word<Width>::type;
  const KeptTokens& t = kept.to.tokens;
  const char* source = static_cast<const char*>(t.source) + list.first * t.step_bytes;
  char* target = static_cast<char*>(t.target) + list.out * t.row_bytes;
  for (uint32_t piece = worker; piece < list.count * kept.pieces; piece += workers) {
    const uint32_t row = piece / kept.pieces;
    const int64_t column = int64_t{piece - row * kept.pieces} * (row_loads * warp_lanes) + lane;
    const Access* from = reinterpret_cast<const Access*>(source + list.numbers[row] * t.step_bytes) + column;
    Access* to = reinterpret_cast<Access*>(target + row * t.row_bytes) + column;
    const int64_t left = kept.columns - column;
    Access value[row_loads] = {};
#pragma unroll
    for (int i = 0; i < row_loads; ++i) {
      if (i * warp_lanes < left) value[i] = load_once(from + i * warp_lanes);
    }
#pragma unroll
    for (int i = 0; i < row_loads; ++i) {
      if (i * warp_lanes < left) to[i * warp_lanes] = value[i];
    }
  }
}

__device__ __forceinline__ void copy_list(const KeptOutputs& kept, const KeptList& list, uint32_t worker,
                                          uint32_t workers, uint32_t lane) {
  switch (kept.width) {
    case 16: copy_rows<16>(kept, list, worker, workers, lane); break;
    case 4: copy_rows<4>(kept, list, worker, workers, lane); break;
    default: copy_rows<1>(kept, list, worker, workers, lane); break;
  }
}

}  // namespace cacovid::cuda
