// Compaction of paged caches [blocks, block_size, H, D]: rows and tables of all sequences in one launch. The first
// blocks of the grid see to the tables, one for each sequence.
#include <algorithm>

#include "cacovid/status.h"
#include "tensors.cuh"

namespace cacovid::cuda {
namespace {

using cpu::KeptRows;
using cpu::PagedOutputs;
using cpu::PagedSequences;
using cpu::PagedTensor;

// Tensors that are equal but for their memory and what they keep. Steps are bytes, steps of lists and tables entries.
struct PageShape {
  Columns columns;
  int64_t block_step, slot_step, head_step;
  int64_t keep_batch_step, keep_head_step, table_batch_step, table_head_step;
};

// The sequences, and which physical block holds a row of one; -1 for none.
struct Sequences {
  const int32_t *block_table, *target_table, *seq_lens;
  int64_t width, target_width;
  Divisor per_head, heads, block_size;
  uint32_t blocks;
  bool in_place;

  // Both read the table whatever the row is: a branch would hold up the loads behind it.
  __device__ __forceinline__ int32_t source(uint32_t sequence, int64_t position) const {
    const int64_t length = __ldg(seq_lens + sequence), room = width * block_size.by;
    const bool inside = position >= 0 && position < length && position < room;
    const int32_t id = block_of(block_table, width, sequence, inside ? static_cast<uint32_t>(position) : 0);
    return inside ? id : -1;
  }
  __device__ __forceinline__ int32_t target(uint32_t sequence, uint32_t row) const {
    return block_of(target_table, target_width, sequence, row);
  }
  __device__ __forceinline__ int32_t block_of(const int32_t* table, int64_t columns, uint32_t sequence,
                                              uint32_t row) const {
    const int32_t id = __ldg(table + sequence * columns + block_size.quotient(row));
    return static_cast<uint32_t>(id) < blocks ? id : -1;
  }
  __device__ __forceinline__ uint32_t slot_of(uint32_t row) const {
    return block_size.remainder(row, block_size.quotient(row));
  }
  __device__ __forceinline__ uint32_t blocks_for(uint32_t rows) const {
    return block_size.quotient(rows) + (slot_of(rows) > 0 ? 1 : 0);
  }
};

constexpr uint8_t own_sequences = 1, own_heads = 2;  // whether a list has entries for every sequence, for every head

struct Pages {
  Tensors<PageShape> tensors;
  Sequences sequences;
  PagedOutputs out;
  uint32_t count, rows;  // of sequences; of every list
  bool first;            // launch of the call
  uint8_t lists[most_lists];
};
static_assert(sizeof(Pages) <= 4096, "the arguments of a kernel fit into 4 KiB");

struct PageRows {
  static constexpr bool unturned_rows_stay = true;
  const PageShape& shape;
  const Sequences& s;
  const int64_t* index;
  const float *cos, *sin;
  const char* source;
  char* target;
  bool in_order;

  // Of a row of a tensor, all sequences and heads counted through.
  struct Own {
    uint32_t sequence, head, row;
  };
  __device__ __forceinline__ Own own(uint32_t row) const {
    const uint32_t list = s.per_head.quotient(row), sequence = s.heads.quotient(list);
    return {sequence, s.heads.remainder(list, sequence), s.per_head.remainder(row, list)};
  }
  __device__ __forceinline__ int64_t offset(int32_t block, uint32_t row, uint32_t head) const {
    return block * shape.block_step + s.slot_of(row) * shape.slot_step + head * shape.head_step;
  }

  __device__ __forceinline__ int64_t entry(uint32_t row) const {
    const Own o = own(row);
    return o.sequence * shape.keep_batch_step + o.head * shape.keep_head_step + o.row;
  }
  __device__ __forceinline__ Place place(uint32_t row, int64_t position) const {
    const Own o = own(row);
    const int32_t to = s.target(o.sequence, o.row), from = s.source(o.sequence, position);
    const int64_t at = offset(from, from >= 0 ? static_cast<uint32_t>(position) : 0, o.head);
    return {from >= 0 ? at : -1, position == -1 ? -1 : to, s.in_place && from >= 0 && position == o.row};
  }
  __device__ __forceinline__ int64_t target_of(uint32_t row, int32_t block) const {
    const Own o = own(row);
    return offset(block, o.row, o.head);
  }
  __device__ __forceinline__ int64_t table(uint32_t row) const {
    const Own o = own(row);
    return o.sequence * shape.table_batch_step + o.head * shape.table_head_step + o.row;
  }
};

// The sum over all threads of the block.
__device__ __forceinline__ uint32_t block_sum(uint32_t value) {
  uint32_t* sums = shared_memory<uint32_t>();
  const uint32_t sum = __reduce_add_sync(0xffffffffu, value);
  if (threadIdx.x % warp_lanes == 0) sums[threadIdx.x / warp_lanes] = sum;
  __syncthreads();
  uint32_t all = 0;
  for (uint32_t w = 0; w < blockDim.x / warp_lanes; ++w) all += sums[w];
  return all;
}

// `count` entries of a table from `first` on, then -1 up to `columns`.
__device__ __forceinline__ void copy_front(int32_t* to, const int32_t* from, int64_t count, int64_t columns) {
  for (int64_t i = threadIdx.x; i < columns; i += blockDim.x) to[i] = i < count ? __ldg(from + i) : -1;
}

// What becomes of the tables of a sequence.
__device__ __forceinline__ void account(const Pages& p, uint32_t sequence) {
  const Sequences& s = p.sequences;
  const uint32_t rows = p.rows;
  bool outside = false;
  for (int l = 0; l < p.tensors.list_count; ++l) {
    const uint32_t heads = p.lists[l] & own_heads ? s.heads.by : 1, entries = heads * rows;
    const int64_t* index = p.tensors.list(l).index + (p.lists[l] & own_sequences ? int64_t{sequence} * entries : 0);
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < entries; i += blockDim.x) {
      const int64_t position = __ldg(index + i);
      const uint32_t row = s.per_head.remainder(i, s.per_head.quotient(i));
      const bool found = s.source(sequence, position) >= 0 && s.target(sequence, row) >= 0;
      outside = outside || (position != -1 && !found);
    }
  }
  const int32_t status = __syncthreads_or(outside) ? status_out_of_bounds : status_ok;
  if (!p.first) {
    if (threadIdx.x == 0) p.out.status[sequence] |= status;
    return;
  }
  const int64_t* index = p.tensors.list(0).index;
  if (p.lists[0] & own_sequences) index += int64_t{sequence} * rows * (p.lists[0] & own_heads ? s.heads.by : 1);
  uint32_t kept = 0;
  for (uint32_t i = threadIdx.x; i < rows; i += blockDim.x) kept += __ldg(index + i) != -1 ? 1 : 0;
  kept = block_sum(kept);

  const int32_t length = __ldg(s.seq_lens + sequence);
  const int64_t used = s.blocks_for(kept), columns = s.blocks_for(rows);
  const int64_t before = s.blocks_for(length > 0 ? static_cast<uint32_t>(length) : 0);
  const int64_t used_before = before < s.width ? before : s.width;
  const int64_t stay = s.in_place ? (used < used_before ? used : used_before) : 0;
  copy_front(p.out.block_table + sequence * columns, s.target_table + sequence * s.target_width, used, columns);
  copy_front(p.out.freed_blocks + sequence * s.width, s.block_table + sequence * s.width + stay, used_before - stay,
             s.width);
  if (threadIdx.x > 0) return;
  p.out.seq_lens[sequence] = static_cast<int32_t>(kept);
  p.out.num_freed[sequence] = static_cast<int32_t>(used_before - stay);
  p.out.status[sequence] = status;
}

template <bool Turned>
__global__ void __launch_bounds__(most_threads, Turned ? 2 : 3) paged_kernel(const __grid_constant__ Pages pages) {
  if (blockIdx.x < pages.count) return account(pages, blockIdx.x);
  const Tensors<PageShape>& tensors = pages.tensors;
  const int number = tensors.shape_of(blockIdx.x);
  const PageShape& shape = tensors.shapes[number];
  const Walks& walks = tensors.walks[number];
  const int lanes_log2 = static_cast<int>(walks.lanes_log2);
  const Walk walk = walk_of(walks, blockIdx.x);
  const List list = tensors.list(tensors.list_of[walk.tensor]);
  char* memory = tensors.source(walk.tensor);
  const PageRows rows = {shape,    pages.sequences, list.index, list.cos,
                         list.sin, memory,          memory,     pages.sequences.in_place};
  move_rows<Turned>(shape.columns, rows, walk, lanes_log2);
}

// A tensor as its rows move: what is equal for all of its shape, and how much that is.
struct Task {
  PageShape shape;
  Work work;

  Task(const PagedTensor& t, const KeptRows& kept, const PagedSequences& s) : shape{}, work{} {
    const Tensor& x = t.x;
    const int64_t item = item_size(x.dtype);
    uint64_t bits = reinterpret_cast<uintptr_t>(x.data);
    int64_t steps[3];
    for (int d = 0; d < 3; ++d) {
      steps[d] = x.sizes[d] > 1 ? x.strides[d] * item : 0;
      bits |= static_cast<uint64_t>(steps[d]);
    }
    shape.columns = columns_of(x, bits, t.rotated ? &kept : nullptr, true);
    shape.block_step = steps[0];
    shape.slot_step = steps[1];
    shape.head_step = steps[2];
    shape.keep_batch_step = kept.batch_step * kept.per_head;
    shape.keep_head_step = kept.head_step * kept.per_head;
    if (shape.columns.half > 0) {
      shape.table_batch_step = kept.table_batch_step * kept.per_head;
      shape.table_head_step = kept.table_head_step * kept.per_head;
    }
    work.rows = s.count * x.sizes[2] * kept.per_head;
    if (s.out_block_table == nullptr) {
      work.walks = s.count * x.sizes[2];
      work.ordered = kept.per_head;
    }
    work.half = shape.columns.half;
    work.rest = shape.columns.rest;
    work.width = shape.columns.width;
  }
  bool idle() const { return work.half + work.rest == 0 || work.rows == 0; }
};

class Launches {
 public:
  Launches(const PagedSequences& s, int64_t per_head, int64_t heads, const PagedOutputs& out, Stream stream)
      : sequences_{s.width > 0 ? s.block_table : s.out_block_table,  // one that can be read
                   s.out_block_table == nullptr ? s.block_table : s.out_block_table,
                   s.seq_lens,
                   s.width,
                   s.out_block_table == nullptr ? s.width : s.out_width,
                   divisor(std::max<int64_t>(per_head, 1)),
                   divisor(std::max<int64_t>(heads, 1)),
                   divisor(s.block_size),
                   static_cast<uint32_t>(std::min<int64_t>(s.blocks, int64_t{1} << 31)),
                   s.out_block_table == nullptr},
        per_head_(per_head),
        count_(s.count),
        out_(out),
        stream_(stream) {}

  // Adds a tensor that uses the list, or the list alone; returns the number of a CUDA error.
  int add(const KeptRows& list, const Task* task, void* memory) {
    const auto fits = [&] {
      return packer_.add_list(list) && (task == nullptr || packer_.add_tensor(task->shape, task->work, memory, memory));
    };
    if (fits()) return 0;
    const int error = enqueue();
    if (error == 0) fits();
    return error;
  }
  int enqueue() {
    if (packer_.empty()) return 0;
    const auto plan = packer_.take(count_);
    Pages pages = {plan.tensors, sequences_, out_, static_cast<uint32_t>(count_), static_cast<uint32_t>(per_head_),
                   first_,       {}};
    bool turned = false;
    for (const PageShape& s : pages.tensors.shapes) turned = turned || s.columns.half > 0;
    for (size_t l = 0; l < plan.lists.size(); ++l) {
      const KeptRows& k = *plan.lists[l];
      pages.lists[l] = static_cast<uint8_t>((k.batch_step > 0 ? own_sequences : 0) | (k.head_step > 0 ? own_heads : 0));
    }
    first_ = false;
    const auto kernel = turned ? paged_kernel<true> : paged_kernel<false>;
    return launch(stream_, kernel, plan.blocks, plan.threads, most_threads / warp_lanes * sizeof(uint32_t), pages);
  }

 private:
  Packer<PageShape> packer_;
  Sequences sequences_;
  int64_t per_head_, count_;
  PagedOutputs out_;
  Stream stream_;
  bool first_ = true;
};

}  // namespace

int repack_pages(const PagedTensor* tensors, int64_t tensor_count, const KeptRows* kept, int64_t lists,
                 const PagedSequences& sequences, const PagedOutputs& out, Stream stream) {
  if (tensor_count == 0 || lists == 0 || sequences.count == 0) return 0;
  const int64_t heads = tensors[0].x.sizes[2], per_head = kept[0].per_head;
  if (sequences.count * heads * per_head > most_rows) return cudaErrorInvalidValue;
  Launches launches(sequences, per_head, heads, out, stream);
  for (int64_t l = 0; l < lists; ++l) {
    if (const int error = launches.add(kept[l], nullptr, nullptr)) return error;
    for (int64_t t = 0; t < tensor_count; ++t) {
      if (tensors[t].kept != l) continue;
      const Task task(tensors[t], kept[l], sequences);
      if (task.idle()) continue;
      if (const int error = launches.add(kept[l], &task, tensors[t].x.data)) return error;
    }
  }
  return launches.enqueue();
}

}  // namespace cacovid::cuda
