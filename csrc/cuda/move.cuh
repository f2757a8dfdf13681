// A block walks through rows and moves some columns of each. In order no row is overwritten before it is read:
//
// - Positions of a list ascend, so row r of the result comes from row r or from one behind it, and sources ascend.
// - So what a later step reads lies behind everything that this step writes.
// - What this step itself reads is in registers before its first store: that is what the barrier is for. The stores
//   need none behind them, since later loads touch none of their rows.
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

// How 16 bytes are accessed, and how 1, 2, 4 or 8 are: the latter are rare, so that one loop does for all of them.
struct Wide {
  using Value = uint4;
  __device__ __forceinline__ Value load(const char* from) const {
    return load_before_writes(reinterpret_cast<const uint4*>(from));
  }
  __device__ __forceinline__ void store(char* to, Value x) const { *reinterpret_cast<uint4*>(to) = x; }
};
struct Narrow {
  using Value = uint64_t;
  int32_t width;

  __device__ __forceinline__ Value load(const char* from) const {
    switch (width) {
      case 8: return *reinterpret_cast<const uint64_t*>(from);
      case 4: return *reinterpret_cast<const uint32_t*>(from);
      case 2: return *reinterpret_cast<const uint16_t*>(from);
      default: return *reinterpret_cast<const uint8_t*>(from);
    }
  }
  __device__ __forceinline__ void store(char* to, Value x) const {
    switch (width) {
      case 8: *reinterpret_cast<uint64_t*>(to) = x; break;
      case 4: *reinterpret_cast<uint32_t*>(to) = static_cast<uint32_t>(x); break;
      case 2: *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(x); break;
      default: *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(x); break;
    }
  }
};

// And how pairs are turned: all of an access of 16 bytes, or one of any type.
template <class T>
struct WideTurn : Wide {
  static constexpr int count = 16 / sizeof(T);
  __device__ __forceinline__ void turn(Value& low, Value& high, const float* cos, const float* sin) const {
    rotate<T>(low, high, cos, sin);
  }
};
struct NarrowTurn : Narrow {
  static constexpr int count = 1;
  DType dtype;

  __device__ __forceinline__ NarrowTurn(int32_t width, DType dtype) : Narrow{width}, dtype(dtype) {}
  __device__ __forceinline__ void turn(Value& low, Value& high, const float* cos, const float* sin) const {
    switch (dtype) {
      case DType::f64: return turn_one<double>(low, high, cos, sin);
      case DType::bf16: return turn_one<bf16_t>(low, high, cos, sin);
      case DType::f16: return turn_one<f16_t>(low, high, cos, sin);
      default: return turn_one<float>(low, high, cos, sin);
    }
  }

 private:
  template <class T>
  __device__ __forceinline__ static void turn_one(Value& low, Value& high, const float* cos, const float* sin) {
    using Bits = typename Word<sizeof(T)>::type;
    Bits a, b;
    std::memcpy(&a, &low, sizeof a);
    std::memcpy(&b, &high, sizeof b);
    rotate<T>(a, b, cos, sin);
    std::memcpy(&low, &a, sizeof a);
    std::memcpy(&high, &b, sizeof b);
  }
};

// What a thread moves of a walk that is not empty: in every step `Count` rows that are `apart` rows from each other.
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
  __device__ __forceinline__ bool writes(int i) const { return inside && row(i) < last && place[i].target >= 0; }
  __device__ __forceinline__ bool same(int i) const { return row(i) < last && place[i].same; }

  // All loads before the first use of one, and no branch between them: their latencies are to overlap.
  __device__ __forceinline__ void find() {
    int64_t position[Count];
#pragma unroll
    for (int i = 0; i < Count; ++i) position[i] = __ldg(rows.index + rows.entry(known(i)));
#pragma unroll
    for (int i = 0; i < Count; ++i) place[i] = rows.place(known(i), position[i]);
  }

  __device__ __forceinline__ void advance(bool more) {
    first += Count * apart;
    if (more) find();
  }

 private:
  __device__ __forceinline__ uint32_t known(int i) const { return row(i) < last ? row(i) : last - 1; }
};

template <class Access, class Rows>
__device__ __forceinline__ void copy_rows(const Access& access, const Columns& columns, const Rows& rows,
                                          const Walk& walk, int lanes_log2) {
  Steps<Rows, accesses> steps(rows, walk, lanes_log2, columns.rest);
  const int64_t column = 2 * columns.half + steps.column;
  const char* source = rows.source + column * columns.source_step;
  char* target = rows.target + column * columns.target_step;
  for (uint32_t done = walk.first; done < walk.last;) {
    typename Access::Value value[accesses];
    int32_t to[accesses];
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      const Place& place = steps.place[i];
      const bool writes = steps.writes(i) && !place.same;
      value[i] = writes && place.source >= 0 ? access.load(source + place.source) : typename Access::Value{};
      to[i] = writes ? place.target : -1;
    }
    done += accesses * steps.apart;
    steps.advance(done < walk.last);
    if (rows.in_order) __syncthreads();
#pragma unroll
    for (int i = 0; i < accesses; ++i) {
      if (to[i] >= 0) access.store(target + rows.target_of(steps.row(i - accesses), to[i]), value[i]);
    }
  }
}

// Whether the angles of a row that goes to where it is are all zero; the lanes of a warp ask together.
template <class Rows>
__device__ __forceinline__ bool stays(const Rows& rows, uint32_t row, bool same, int64_t half, int lanes_log2) {
  const int lane = threadIdx.x % warp_lanes, lanes = 1 << lanes_log2;
  const int64_t at = same ? rows.table(row) * half : 0;
  bool turned = false;
#pragma unroll 1
  for (int64_t j = lane & (lanes - 1); same && j < half; j += lanes) {
    turned = turned || __ldg(rows.cos + at + j) != 1.0f || __ldg(rows.sin + at + j) != 0.0f;
  }
  const unsigned votes = __ballot_sync(0xffffffffu, turned) >> (lane & ~(lanes - 1));
  return same && (votes & (0xffffffffu >> (warp_lanes - lanes))) == 0;
}

template <class Access, class Rows>
__device__ __forceinline__ void turn_rows(const Access& access, const Columns& columns, const Rows& rows,
                                          const Walk& walk, int lanes_log2) {
  constexpr int pairs = accesses / 2;
  Steps<Rows, pairs> steps(rows, walk, lanes_log2, columns.half);
  const int64_t half = columns.half * Access::count;
  const int64_t source_half = columns.half * columns.source_step, target_half = columns.half * columns.target_step;
  const char* source = rows.source + steps.column * columns.source_step;
  char* target = rows.target + steps.column * columns.target_step;
  for (uint32_t done = walk.first; done < walk.last;) {
    typename Access::Value low[pairs], high[pairs];
    int32_t to[pairs];
    bool turns[pairs];
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      const Place& place = steps.place[i];
      bool writes = steps.writes(i);
      if constexpr (Rows::unturned_rows_stay) {
        writes = !stays(rows, steps.row(i), steps.same(i), half, lanes_log2) && writes;
      }
      turns[i] = writes && place.source >= 0;
      low[i] = turns[i] ? access.load(source + place.source) : typename Access::Value{};
      high[i] = turns[i] ? access.load(source + place.source + source_half) : typename Access::Value{};
      to[i] = writes ? place.target : -1;
    }
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      if (!turns[i]) continue;
      const int64_t at = rows.table(steps.row(i)) * half + steps.column * Access::count;
      access.turn(low[i], high[i], rows.cos + at, rows.sin + at);
    }
    done += pairs * steps.apart;
    steps.advance(done < walk.last);
    if (rows.in_order) __syncthreads();
#pragma unroll
    for (int i = 0; i < pairs; ++i) {
      if (to[i] < 0) continue;
      char* at = target + rows.target_of(steps.row(i - pairs), to[i]);
      access.store(at, low[i]);
      access.store(at + target_half, high[i]);
    }
  }
}

// Moves the rows of a walk. Rows: whether they move in order; the addresses `source` and `target`; `index`, the entry
// of a row in it, and what place(row, position) that is; target_of(row, place.target), bytes behind the target; the
// tables `cos` and `sin`, and the row of them that turns a row.
template <bool Turned, class Rows>
__device__ __forceinline__ void move_rows(const Columns& columns, const Rows& rows, const Walk& walk, int lanes_log2) {
  if (walk.first == walk.last) return;
  const bool wide = columns.width == 16;
  if constexpr (Turned) {
    if (walk.pairs) {
      if (!wide) return turn_rows(NarrowTurn(columns.width, columns.dtype), columns, rows, walk, lanes_log2);
      switch (columns.dtype) {
        case DType::f64: return turn_rows(WideTurn<double>{}, columns, rows, walk, lanes_log2);
        case DType::bf16: return turn_rows(WideTurn<bf16_t>{}, columns, rows, walk, lanes_log2);
        case DType::f16: return turn_rows(WideTurn<f16_t>{}, columns, rows, walk, lanes_log2);
        default: return turn_rows(WideTurn<float>{}, columns, rows, walk, lanes_log2);
      }
    }
  }
  if (wide) return copy_rows(Wide{}, columns, rows, walk, lanes_log2);
  copy_rows(Narrow{columns.width}, columns, rows, walk, lanes_log2);
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
