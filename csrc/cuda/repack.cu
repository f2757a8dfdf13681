// Compaction of caches [B, H, N, D]: all tensors whose descriptions fit the arguments of a kernel in one launch.
#include <algorithm>

#include "tensors.cuh"

namespace cacovid::cuda {
namespace {

using cpu::CacheTensor;
using cpu::KeptRows;
using cpu::Placement;

// Tensors that are equal but for their memory and what they keep. Steps are bytes, steps of lists and tables entries.
struct CacheShape {
  Columns columns;
  Divisor per_head, heads;  // rows that a head keeps, heads of a batch row
  int64_t tokens, batch_step, head_step, row_step;
  int64_t target_step;  // from row to row where they lie without gaps
  int64_t keep_batch_step, keep_head_step, table_batch_step, table_head_step;
  int64_t kept, tail;  // rows of a head: kept ones, and those behind them that become zero
  Placement placement;
  uint32_t ragged_heads;  // of all batch rows, if lists have bounds

  __device__ __forceinline__ int64_t head_offset(uint32_t head) const {
    const uint32_t batch = heads.quotient(head);
    return batch * batch_step + heads.remainder(head, batch) * head_step;
  }
};

// The head with bounds[head] <= row < bounds[head + 1], and one of the tensor's whatever the bounds hold.
__device__ __forceinline__ uint32_t head_of(uint32_t row, const int32_t* bounds, uint32_t heads) {
  uint32_t low = 0, high = heads;
  while (low + 1 < high) {
    const uint32_t middle = (low + high) / 2;
    const bool behind = __ldg(bounds + middle) <= static_cast<int64_t>(row);
    low = behind ? middle : low;
    high = behind ? high : middle;
  }
  return low;
}

static_assert(sizeof(Tensors<CacheShape>) <= 4096, "the arguments of a kernel fit into 4 KiB");

struct CacheRows {
  static constexpr bool unturned_rows_stay = false;
  const CacheShape& s;
  const int64_t* index;
  const int32_t* cu_seqlens;
  const float *cos, *sin;
  const char* source;
  char* target;  // where row 0 would be, and those of the walk are
  int64_t target_step;
  bool in_order;

  __device__ __forceinline__ CacheRows(const CacheShape& s, const List& list, const char* source, char* to,
                                       const Walk& walk)
      : s(s),
        index(list.index),
        cu_seqlens(list.cu_seqlens),
        cos(list.cos),
        sin(list.sin),
        source(source),
        target(to),
        target_step(s.target_step),
        in_order(s.placement != Placement::elsewhere) {
    if (s.placement != Placement::in_heads) return;
    target_step = s.row_step;
    target += s.head_offset(walk.number) - walk.first * s.row_step;
  }

  __device__ __forceinline__ int64_t entry(uint32_t row) const {
    return entry_of(row, s.keep_batch_step, s.keep_head_step);
  }
  __device__ __forceinline__ Place place(uint32_t row, int64_t position) const {
    const uint32_t head = s.ragged_heads > 0 ? head_of(row, cu_seqlens, s.ragged_heads) : s.per_head.quotient(row);
    const bool inside = static_cast<uint64_t>(position) < static_cast<uint64_t>(s.tokens);
    const int64_t from = s.head_offset(head) + (inside ? position : 0) * s.row_step;
    return {inside ? from : -1, 0, false};
  }
  __device__ __forceinline__ int64_t target_of(uint32_t row, int32_t) const { return row * target_step; }
  __device__ __forceinline__ int64_t table(uint32_t row) const {
    return entry_of(row, s.table_batch_step, s.table_head_step);
  }

 private:
  __device__ __forceinline__ int64_t entry_of(uint32_t row, int64_t batch_step, int64_t head_step) const {
    if (s.ragged_heads > 0) return row;
    const uint32_t head = s.per_head.quotient(row), batch = s.heads.quotient(head);
    return batch * batch_step + s.heads.remainder(head, batch) * head_step + s.per_head.remainder(row, head);
  }
};

// Zeroes the rows behind those that a head keeps, from the block's first one on: every thread has done its last load.
template <class Access>
__device__ __forceinline__ void zero_tail(const Access& access, const CacheShape& s, char* tensor, const Walk& walk,
                                          int lanes_log2) {
  const Columns& c = s.columns;
  int64_t column = walk.column + (threadIdx.x & ((1u << lanes_log2) - 1));
  if (column >= (walk.pairs ? c.half : c.rest)) return;
  if (!walk.pairs) column += 2 * c.half;
  char* target = tensor + s.head_offset(walk.number) + column * c.target_step;
  for (int64_t row = s.kept + (threadIdx.x >> lanes_log2); row < s.kept + s.tail; row += blockDim.x >> lanes_log2) {
    access.store(target + row * s.row_step, {});
    if (walk.pairs) access.store(target + row * s.row_step + c.half * c.target_step, {});
  }
}

template <bool Turned>
__global__ void __launch_bounds__(most_threads, Turned ? 2 : 3)
    repack_kernel(const __grid_constant__ Tensors<CacheShape> tensors) {
  const int number = tensors.shape_of(blockIdx.x);
  const CacheShape& s = tensors.shapes[number];
  const Walks& walks = tensors.walks[number];
  const int lanes_log2 = static_cast<int>(walks.lanes_log2);
  const Walk walk = walk_of(walks, blockIdx.x);
  const List list = tensors.list(tensors.list_of[walk.tensor]);
  char* target = tensors.target(walk.tensor);
  const CacheRows rows(s, list, tensors.source(walk.tensor), target, walk);
  move_rows<Turned>(s.columns, rows, walk, lanes_log2);
  if (s.tail == 0) return;
  if (s.columns.width == 16) return zero_tail(Wide{}, s, target, walk, lanes_log2);
  zero_tail(Narrow{s.columns.width}, s, target, walk, lanes_log2);
}

// A tensor as its rows move: what is equal for all of its shape, and how much that is.
struct Task {
  CacheShape shape;
  Work work;

  Task(const CacheTensor& t, const KeptRows& kept, bool zero) : shape{}, work{} {
    const Tensor& x = t.x;
    const int64_t item = item_size(x.dtype), all_heads = x.sizes[0] * x.sizes[1];
    const bool ragged = kept.cu_seqlens != nullptr, in_heads = t.placement == Placement::in_heads;
    uint64_t bits = reinterpret_cast<uintptr_t>(x.data) | reinterpret_cast<uintptr_t>(t.target);
    int64_t steps[3];
    for (int d = 0; d < 3; ++d) {
      steps[d] = x.sizes[d] > 1 ? x.strides[d] * item : 0;
      bits |= static_cast<uint64_t>(steps[d]);
    }
    shape.columns = columns_of(x, bits, t.rotated ? &kept : nullptr, in_heads);
    shape.kept = ragged ? 0 : kept.per_head;
    shape.per_head = divisor(std::max<int64_t>(shape.kept, 1));
    shape.heads = divisor(std::max<int64_t>(x.sizes[1], 1));
    shape.tokens = x.sizes[2];
    shape.batch_step = steps[0];
    shape.head_step = steps[1];
    shape.row_step = steps[2];
    shape.target_step = x.sizes[3] * item;
    shape.keep_batch_step = kept.batch_step * kept.per_head;
    shape.keep_head_step = kept.head_step * kept.per_head;
    if (shape.columns.half > 0) {
      shape.table_batch_step = kept.table_batch_step * kept.per_head;
      shape.table_head_step = kept.table_head_step * kept.per_head;
    }
    shape.tail = zero && in_heads ? x.sizes[2] - kept.per_head : 0;
    shape.placement = t.placement;
    shape.ragged_heads = ragged ? static_cast<uint32_t>(all_heads) : 0;
    work.rows = ragged ? kept.total : all_heads * kept.per_head;
    if (t.placement != Placement::elsewhere) {
      work.ordered = in_heads ? kept.per_head : work.rows;
      work.walks = in_heads ? all_heads : 1;
      work.tail = shape.tail;
    }
    work.half = shape.columns.half;
    work.rest = shape.columns.rest;
    work.width = shape.columns.width;
  }
  bool idle() const { return work.half + work.rest == 0 || work.rows + work.walks * work.tail == 0; }
};

int enqueue(Packer<CacheShape>& packer, Stream stream) {
  const auto plan = packer.take(0);
  bool turned = false;
  for (const CacheShape& s : plan.tensors.shapes) turned = turned || s.columns.half > 0;
  const auto kernel = turned ? repack_kernel<true> : repack_kernel<false>;
  return launch(stream, kernel, plan.blocks, plan.threads, 0, plan.tensors);
}

}  // namespace

int repack_rows(const CacheTensor* tensors, int64_t count, const KeptRows* kept, bool zero_tail, Stream stream) {
  std::vector<const CacheTensor*> order;  // by list, so that a launch needs few of them
  for (int64_t t = 0; t < count; ++t) order.push_back(tensors + t);
  std::stable_sort(order.begin(), order.end(),
                   [](const CacheTensor* a, const CacheTensor* b) { return a->kept < b->kept; });
  Packer<CacheShape> packer;
  for (const CacheTensor* t : order) {
    const KeptRows& list = kept[t->kept];
    const Task task(*t, list, zero_tail);
    if (task.idle()) continue;
    if (task.work.rows > most_rows) return cudaErrorInvalidValue;
    const auto add = [&] {
      return packer.add_list(list) && packer.add_tensor(task.shape, task.work, t->x.data, t->target);
    };
    if (add()) continue;
    if (const int error = enqueue(packer, stream)) return error;
    add();
  }
  return packer.empty() ? 0 : enqueue(packer, stream);
}

}  // namespace cacovid::cuda
