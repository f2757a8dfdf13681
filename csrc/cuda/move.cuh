// A block walks through rows and moves some columns of each. In order no row is overwritten before it is read:
//
// - Positions of a list ascend, so row r of the result comes from row r or from one behind it, and sources ascend.
// - So what a later step reads lies behind everything that this step writes.
// - What this step itself reads is in registers before its first store: that is what the barrier is for. The stores
// need
//   none behind them, since later loads touch none of their rows.
//
// Lists that break the rule move wrong rows, but all of them inside the tensor.
#pragma once

#include "launch.cuh"
#include "rotate.cuh"
#include "walk.h"

namespace cacovid::cuda {

// How a row is accessed: `half` accesses and their counterparts, which are turned, then `rest` others.
struct Columns {
  int32_t width;  // bytes of an access
  DType dtype;    // of what is turned
  int64_t half, rest;
  int64_t source_step, target_step;  // bytes from access to access
};

// Where a row that is kept is, in bytes behind the first one or -1 for a row of zeros, and what its kind of rows needs
// to know of where it goes, -1 if it is not written.
struct Place {
  int64_t source;
  int32_t target;
  bool same;  // it goes to where it is
};

template <bool InOrder, class Access>
__device__ __forceinline__ Access load(const char* from) {
  // What other threads write may not be read past the coherent caches.
  if constexpr (InOrder) return *reinterpret_cast<const Access*>(from);
  return load_once(reinterpret_cast<const Access*>(from));
}

// What a thread moves of a walk: in every step `Count` rows that are `apart` rows from each other.
template <class Rows, int Count>
struct Steps {
  const Rows& rows;
  uint32_t first, last, apart;
  int64_t column;
  bool inside;  // the column is
  Place place[Count];

  __device__ __forceinline__ Steps(const Rows& rows, const Walk& walk, int lanes_log2, int64_t columns)
      : rows(rows), first(walk.first + (threadIdx.x >> lanes_log2)), last(walk.last), apart(blockDim.x >> lanes_log2) {
    column = walk.column + (threadIdx.x & ((1u << lanes_log2) - 1));
    inside = column < columns;
    find();
  }
  __device__ __forceinline__ uint32_t row(int i) const { return first + i * apart; }
  __device__ __forceinline__ bool writes(int i) const { return inside && place[i].target >= 0; }
  __device__ __forceinline__ void find() {
#pragma unroll
    for (int i = 0; i < Count; ++i) place[i] = row(i) < last ? rows.place(row(i)) : Place{-1, -1, false};
  }
};

template <int Width, bool InOrder, class Rows>
__device__ __forceinline__ void copy_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  using Access = typename Word<Width>::type;
  Steps<Rows, accesses> steps(rows, walk, lanes_log2, columns.rest);
  const int64_t column = 2 * columns.half + steps.column;
  const char* source = rows.source + column * columns.source_step;
  char* target = rows.target + column * columns.target_step;
  for (uint32_t done = walk.first; done < walk.last; done += accesses * steps.apart) {
    Access value[accesses];
    int32_t to[accesses];
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      const Place& place = steps.place[i];
      const bool writes = steps.writes(i) && !(InOrder && place.same);
      value[i] = writes && place.source >= 0 ? load<InOrder, Access>(source + place.source) : Access{};
      to[i] = writes ? place.target : -1;
    }
    steps.first += accesses * steps.apart;
    if constexpr (InOrder) {
      steps.find();
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if (to[i] >= 0) *reinterpret_cast<Access*>(target + rows.target_of(steps.row(i - accesses), to[i])) = value[i];
    }
  }
}

// Whether the angles of a row that goes to where it is are all zero; the lanes of a warp ask together.
template <class Rows>
__device__ __forceinline__ bool stays(const Rows& rows, uint32_t row, bool same, int64_t half, int lanes_log2) {
  const int lane = threadIdx.x % warp_lanes, lanes = 1 << lanes_log2;
  const int64_t at = same ? rows.table(row) * half : 0;
  bool turned = false;
  for (int64_t j = lane & (lanes - 1); same && j < half; j += lanes) {
    turned = turned || __ldg(rows.cos + at + j) != 1.0f || __ldg(rows.sin + at + j) != 0.0f;
  }
  const unsigned votes = __ballot_sync(0xffffffffu, turned) >> (lane & ~(lanes - 1));
  return same && (votes & (0xffffffffu >> (warp_lanes - lanes))) == 0;
}

template <class T, int Count, bool InOrder, class Rows>
__device__ __forceinline__ void turn_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  using Access = typename Word<Count * sizeof(T)>::type;
  constexpr int pairs = accesses / 2;
  Steps<Rows, pairs> steps(rows, walk, lanes_log2, columns.half);
  const int64_t half = columns.half * Count;
  const int64_t source_half = columns.half * columns.source_step, target_half = columns.half * columns.target_step;
  const char* source = rows.source + steps.column * columns.source_step;
  char* target = rows.target + steps.column * columns.target_step;
  for (uint32_t done = walk.first; done < walk.last; done += pairs * steps.apart) {
    Access low[pairs], high[pairs];
    int32_t to[pairs];
    bool turns[pairs];
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const Place& place = steps.place[i];
      bool writes = steps.writes(i);
      if constexpr (InOrder && Rows::unturned_rows_stay) {
        writes = !stays(rows, steps.row(i), place.same, half, lanes_log2) && writes;
      }
      turns[i] = writes && place.source >= 0;
      low[i] = turns[i] ? load<InOrder, Access>(source + place.source) : Access{};
      high[i] = turns[i] ? load<InOrder, Access>(source + place.source + source_half) : Access{};
      to[i] = writes ? place.target : -1;
    }
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      if (!turns[i]) continue;
      const int64_t at = rows.table(steps.row(i)) * half + steps.column * Count;
      rotate<T>(low[i], high[i], rows.cos + at, rows.sin + at);
    }
    steps.first += pairs * steps.apart;
    steps.find();
    if constexpr (InOrder) __syncthreads();
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      if (to[i] < 0) continue;
      char* at = target + rows.target_of(steps.row(i - pairs), to[i]);
      *reinterpret_cast<Access*>(at) = low[i];
      *reinterpret_cast<Access*>(at + target_half) = high[i];
    }
  }
}

template <bool InOrder, class Rows>
__device__ __forceinline__ void copy_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  switch (columns.width) {
    case 16: return copy_rows<16, InOrder>(columns, rows, walk, lanes_log2);
    case 8: return copy_rows<8, InOrder>(columns, rows, walk, lanes_log2);
    case 4: return copy_rows<4, InOrder>(columns, rows, walk, lanes_log2);
    case 2: return copy_rows<2, InOrder>(columns, rows, walk, lanes_log2);
    default: return copy_rows<1, InOrder>(columns, rows, walk, lanes_log2);
  }
}

template <class T, bool InOrder, class Rows>
__device__ __forceinline__ void turn_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  if (columns.width == 16) return turn_rows<T, 16 / sizeof(T), InOrder>(columns, rows, walk, lanes_log2);
  turn_rows<T, 1, InOrder>(columns, rows, walk, lanes_log2);
}

template <bool InOrder, class Rows>
__device__ __forceinline__ void turn_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  switch (columns.dtype) {
    case DType::f64: return turn_rows<double, InOrder>(columns, rows, walk, lanes_log2);
    case DType::bf16: return turn_rows<bf16_t, InOrder>(columns, rows, walk, lanes_log2);
    case DType::f16: return turn_rows<f16_t, InOrder>(columns, rows, walk, lanes_log2);
    default: return turn_rows<float, InOrder>(columns, rows, walk, lanes_log2);
  }
}

// Moves the rows of a walk. Rows: the addresses `source` and `target`; place(row), whether the row is written, and
// where that is behind the target; the tables `cos` and `sin`, and the row of them that turns a row.
template <bool Turned, bool InOrder, class Rows>
__device__ __forceinline__ void move_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  if constexpr (Turned) {
    if (walk.pairs) return turn_rows<InOrder>(columns, rows, walk, lanes_log2);
  }
  copy_rows<InOrder>(columns, rows, walk, lanes_log2);
}

// The widest accesses that a row of x, `bits` or-ed together of every address and step it is found by, and its tables
// allow. Targets lie as x does, or in rows without gaps.
inline Columns columns_of(const Tensor& x, uint64_t bits, const cpu::KeptRows* angles, bool target_as_source) {
  const int64_t item = item_size(x.dtype), columns = x.sizes[3], half = angles == nullptr ? 0 : angles->half;
  const bool dense = columns == 1 || x.strides[3] == 1;
  int64_t width =
      dense ? widest(bits | static_cast<uint64_t>(columns * item) | static_cast<uint64_t>(half * item)) : item;
  if (half > 0) {
    const uint64_t tables = reinterpret_cast<uintptr_t>(angles->cos) | reinterpret_cast<uintptr_t>(angles->sin);
    const int64_t table_width = std::min<int64_t>(width / item * 4, 16);
    if (width < 16 || widest(tables) < table_width) width = item;
  }
  const int64_t step = dense ? width : x.strides[3] * item, elements = width / item;
  return {static_cast<int32_t>(width),     x.dtype, half / elements,
          (columns - 2 * half) / elements, step,    target_as_source ? step : width};
}

}  // namespace cacovid::cuda
