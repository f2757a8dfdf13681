// Gather of rows: a warp moves a tile of four accesses per lane, so that four loads of every lane are in flight.
#include "cacovid/token_rows.h"
#include "launch.cuh"
#include "memory.cuh"

namespace cacovid::cuda {
namespace {

constexpr int most_tensors = 8;  // of one launch: their descriptions are a kernel's arguments
constexpr int accesses = 4;      // of a lane
constexpr int warps = 8;         // of a block

// One tensor, cut into tiles of `rows` entries of the index and `columns` accesses of each.
struct Tiles {
  TokenRows tokens;
  int32_t width;         // bytes of an access
  int32_t lanes_log2;    // lanes that move one row side by side
  int32_t across_log2;   // accesses of a lane along a row; the others go to further rows
  int64_t rows_of_tile;  // 32 / lanes * accesses / across
  int64_t columns;       // accesses of a row
  int64_t row_tiles, column_tiles;
  int64_t first;  // number of its first tile
};

struct Tensors {
  Tiles each[most_tensors];
  int32_t count;
  int64_t tiles;
  const int64_t* index;
  int64_t kept;
};
static_assert(sizeof(Tensors) <= 4096, "the arguments of a kernel fit into 4 KiB");

Tiles cut(const TokenRows& tokens, int64_t kept, int64_t first) {
  uint64_t bits = reinterpret_cast<uintptr_t>(tokens.source) | reinterpret_cast<uintptr_t>(tokens.target) |
                  static_cast<uint64_t>(tokens.source_step | tokens.target_step | tokens.bytes);
  for (int32_t a = 0; a < tokens.count; ++a) {
    bits |= static_cast<uint64_t>(tokens.axes[a].source_stride | tokens.axes[a].target_stride);
  }
  Tiles t = {tokens, widest(bits), 0, 0, 0, 0, 0, 0, first};
  t.columns = tokens.bytes / t.width;
  while ((1 << t.lanes_log2) < warp_lanes && (1 << t.lanes_log2) < t.columns) ++t.lanes_log2;
  while ((1 << t.across_log2) < accesses && (warp_lanes << t.across_log2) < t.columns) ++t.across_log2;
  t.rows_of_tile = (warp_lanes >> t.lanes_log2) * (accesses >> t.across_log2);
  const int64_t columns_of_tile = int64_t{1} << (t.lanes_log2 + t.across_log2);
  t.row_tiles = (kept + t.rows_of_tile - 1) / t.rows_of_tile;
  t.column_tiles = (t.columns + columns_of_tile - 1) / columns_of_tile;
  return t;
}

// Where a lane begins.
struct Start {
  const char* source;  // of token 0
  char* target;        // of entry 0 of the index
  int64_t row, column;
};

__device__ __forceinline__ Start start_of(const Tiles& t, int64_t tile, int lane) {
  const Division by_column = divide(tile, t.column_tiles);
  const Division by_row = divide(by_column.quotient, t.row_tiles);
  const TokenRows::Offsets at = t.tokens.segment(by_row.quotient);
  return {t.tokens.source + at.source, t.tokens.target + at.target,
          by_row.remainder * t.rows_of_tile + (lane >> t.lanes_log2),
          (by_column.remainder << (t.lanes_log2 + t.across_log2)) + (lane & ((1 << t.lanes_log2) - 1))};
}

template <int Width>
__device__ __forceinline__ void move_tile(const Tiles& t, const Start& start, const int64_t* index, int64_t kept) {
  using Access = typename Word<Width>::type;
  const int lanes = 1 << t.lanes_log2, rows = warp_lanes >> t.lanes_log2;
  Access value[accesses];
  char* target[accesses];
#pragma unroll
  for (int i = 0; i < accesses; ++i) {
    const int64_t row = start.row + (i >> t.across_log2) * rows;
    const int64_t column = start.column + (i & ((1 << t.across_log2) - 1)) * lanes;
    const bool wanted = row < kept && column < t.columns;
    const int64_t token = wanted ? __ldg(index + row) : -1;
    const bool inside = static_cast<uint64_t>(token) < static_cast<uint64_t>(t.tokens.tokens);
    const char* source = start.source + (inside ? token : 0) * t.tokens.source_step + column * Width;
    value[i] = inside ? load_once(reinterpret_cast<const Access*>(source)) : Access{};
    target[i] = wanted ? start.target + row * t.tokens.target_step + column * Width : nullptr;
  }
#pragma unroll
  for (int i = 0; i < accesses; ++i) {
    if (target[i] != nullptr) *reinterpret_cast<Access*>(target[i]) = value[i];
  }
}

__global__ void __launch_bounds__(warps* warp_lanes) gather_kernel(const __grid_constant__ Tensors tensors) {
  const int lane = threadIdx.x % warp_lanes;
  const int64_t step = int64_t{gridDim.x} * warps;
  for (int64_t tile = int64_t{blockIdx.x} * warps + threadIdx.x / warp_lanes; tile < tensors.tiles; tile += step) {
    int number = 0;
    while (number + 1 < tensors.count && tile >= tensors.each[number + 1].first) ++number;
    const Tiles& t = tensors.each[number];
    const Start start = start_of(t, tile - t.first, lane);
    switch (t.width) {
      case 16: move_tile<16>(t, start, tensors.index, tensors.kept); break;
      case 8: move_tile<8>(t, start, tensors.index, tensors.kept); break;
      case 4: move_tile<4>(t, start, tensors.index, tensors.kept); break;
      case 2: move_tile<2>(t, start, tensors.index, tensors.kept); break;
      default: move_tile<1>(t, start, tensors.index, tensors.kept); break;
    }
  }
}

}  // namespace

int gather_rows(const Tensor* xs, const int32_t* dims, int64_t count, const int64_t* index, int64_t kept,
                void* const* targets, Stream stream) {
  Tensors tensors = {};
  tensors.index = index;
  tensors.kept = kept;
  for (int64_t i = 0; i < count; ++i) {
    const TokenRows tokens(xs[i], dims[i], targets[i], kept);
    if (tokens.bytes * tokens.segments * kept > 0) {
      tensors.each[tensors.count] = cut(tokens, kept, tensors.tiles);
      const Tiles& t = tensors.each[tensors.count++];
      tensors.tiles += t.tokens.segments * t.row_tiles * t.column_tiles;
    }
    if (tensors.count < most_tensors && i + 1 < count) continue;
    const int64_t blocks = (tensors.tiles + warps - 1) / warps;
    const int error =
        launch(stream, gather_kernel, blocks < most_blocks ? blocks : most_blocks, warps * warp_lanes, 0, tensors);
    if (error != 0) return error;
    tensors.count = 0;
    tensors.tiles = 0;
  }
  return 0;
}

}  // namespace cacovid::cuda
