#include <algorithm>
#include <cstring>
#include <vector>

#include "cacovid/ops.h"
#include "isa/row_loops.h"
#include "row_tasks.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

struct sources_scratch;
struct row_scratch;

// Where rows of sequences lie: block and slot of a position, and the physical block of a logical one.
struct Places {
  const PagedSequences& s;
  int shift = -1;  // log2 of the block size where it is a power of two: a division per row would cost as much as a copy

  explicit Places(const PagedSequences& sequences) : s(sequences) {
    for (int bit = 0; bit < 32; ++bit) {
      if (s.block_size == int64_t{1} << bit) shift = bit;
    }
  }
  bool in_place() const { return s.out_block_table == nullptr; }
  int64_t block_of(int64_t row) const { return shift >= 0 ? row >> shift : row / s.block_size; }
  int64_t slot_of(int64_t row) const { return row - block_of(row) * s.block_size; }

  // Physical block, -1 where there is none.
  int64_t physical(const int32_t* table, int64_t width, int64_t sequence, int64_t row) const {
    const int64_t id = table[sequence * width + block_of(row)];
    return id >= 0 && id < s.blocks ? id : -1;
  }
  int64_t source(int64_t sequence, int64_t position) const {
    const int64_t rows = std::min<int64_t>(s.seq_lens[sequence], s.width * s.block_size);
    return position >= 0 && position < rows ? physical(s.block_table, s.width, sequence, position) : -1;
  }
  int64_t target(int64_t sequence, int64_t row) const {
    return in_place() ? physical(s.block_table, s.width, sequence, row)
                      : physical(s.out_block_table, s.out_width, sequence, row);
  }
};

struct PageMover {
  const Places& places;
  PagedTensor t;
  const KeptRows& kept;
  int64_t item = item_size(t.x.dtype);

  // Heads that keep the same rows and lie side by side are moved as one long row.
  PageMover(const Places& p, const PagedTensor& tensor, const KeptRows& k) : places(p), t(tensor), kept(k) {
    Tensor& x = t.x;
    const bool together = x.strides[3] == 1 && x.strides[2] == x.sizes[3];
    if (kept.head_step == 0 && !t.rotated && together) {
      x.sizes[3] *= x.sizes[2];
      x.sizes[2] = 1;
    }
  }

  int64_t heads() const { return t.x.sizes[2]; }
  int64_t columns() const { return t.x.sizes[3]; }
  int64_t row_bytes() const { return columns() * item; }
  bool dense() const { return t.x.strides[3] == 1 || columns() == 1; }

  // Rows that move in order: in place a later one may land where an earlier one lay.
  RowTasks tasks() const {
    const int64_t rows = row_bytes() > 0 ? places.s.count * heads() * kept.per_head : 0;
    return {rows, std::max<int64_t>(places.in_place() ? kept.per_head : rows_worth_a_thread(row_bytes()), 1)};
  }

  // Rows are numbered so that slots of a block follow each other; steps in bytes. Where no such number fits the
  // strides, `blocks_apart` is 0 and rows move one by one.
  struct Numbers {
    int64_t row_step, blocks_apart;
  };
  Numbers numbers() const {
    const int64_t block_step = t.x.strides[0], row_step = t.x.strides[1];
    if (places.s.block_size == 1) return {block_step * item, 1};
    return {row_step * item, row_step > 0 && block_step % row_step == 0 ? block_step / row_step : 0};
  }

  char* address(int64_t head, int64_t block, int64_t slot) const {
    const int64_t at = block * t.x.strides[0] + slot * t.x.strides[1] + head * t.x.strides[2];
    return static_cast<char*>(t.x.data) + at * item;
  }

  bool turned(int64_t table_row) const {
    const float *cos = kept.cos + table_row * kept.half, *sin = kept.sin + table_row * kept.half;
    bool any = false;
    for (int64_t j = 0; j < kept.half; ++j) any |= cos[j] != 1.0f || sin[j] != 0.0f;
    return any;
  }

  // Rows [first, first + count) that head `head` of sequence `b` keeps.
  void move(int64_t b, int64_t head, int64_t first, int64_t count) const {
    const int64_t* index = kept.index + (b * kept.batch_step + head * kept.head_step) * kept.per_head + first;
    const int64_t table = (b * kept.table_batch_step + head * kept.table_head_step) * kept.per_head + first;
    const auto [row_step, blocks_apart] = numbers();
    const bool runs = blocks_apart > 0 && dense();
    int64_t* sources = scratch<sources_scratch, int64_t>(count);
    RowCopy copy = {nullptr, address(head, 0, 0), row_step, row_step, row_bytes(), 0, false};
    copy.source_rows = (places.s.blocks - 1) * blocks_apart + places.s.block_size;
    int64_t begin = 0, behind = -1;  // rows [begin, i) go to rows of memory that end before row `behind`
    const auto flush = [&](int64_t end) {
      if (begin < end) move_rows(copy, table + begin, sources + begin, end - begin);
      begin = end + 1;
    };
    for (int64_t i = 0; i < count; ++i) {
      const int64_t from = places.source(b, index[i]);
      const int64_t to = index[i] == -1 ? -1 : places.target(b, first + i);
      const bool stays = places.in_place() && from >= 0 && index[i] == first + i && !(t.rotated && turned(table + i));
      if (to < 0 || stays) {
        flush(i);
        continue;
      }
      const int64_t from_slot = from < 0 ? 0 : places.slot_of(index[i]), to_slot = places.slot_of(first + i);
      if (!runs) {
        move_one(head, from, from_slot, address(head, to, to_slot), table + i);
        begin = i + 1;
        continue;
      }
      const int64_t target = to * blocks_apart + to_slot;
      if (begin < i && target != behind) {
        flush(i);
        begin = i;
      }
      if (begin == i) copy.target = address(head, to, to_slot);
      sources[i] = from < 0 ? -1 : from * blocks_apart + from_slot;
      behind = target + 1;
    }
    if (begin < count) flush(count);
  }

  void move_rows(const RowCopy& copy, int64_t table, const int64_t* index, int64_t count) const {
    const RowLoops& loops = row_loops();
    if (!t.rotated) return loops.copy_rows(copy, index, count);
    loops.rotate_rows(copy, t.x.dtype, columns(), kept.half, kept.cos + table * kept.half, kept.sin + table * kept.half,
                      index, count);
  }

  // A row by itself; one whose elements do not lie side by side by way of one whose elements do.
  void move_one(int64_t head, int64_t block, int64_t slot, char* target, int64_t table) const {
    const int64_t bytes = row_bytes(), stride = t.x.strides[3] * item, itself = block < 0 ? -1 : 0;
    char* source = block < 0 ? nullptr : address(head, block, slot);
    if (dense()) return move_rows({target, source, bytes, bytes, bytes, 1, false}, table, &itself, 1);
    char* row = scratch<row_scratch, char>(bytes);
    for (int64_t c = 0; block >= 0 && c < columns(); ++c) {
      std::memcpy(row + c * item, source + c * stride, static_cast<size_t>(item));
    }
    move_rows({row, row, bytes, bytes, bytes, 1, false}, table, &itself, 1);
    for (int64_t c = 0; c < columns(); ++c) {
      std::memcpy(target + c * stride, row + c * item, static_cast<size_t>(item));
    }
  }
};

// What becomes of the tables of sequence b.
void account(const Places& places, const KeptRows* kept, int64_t lists, int64_t heads, int64_t b,
             const PagedOutputs& out) {
  const PagedSequences& s = places.s;
  const int64_t* first_list = kept[0].index + b * kept[0].batch_step * kept[0].per_head;
  const int64_t rows = kept[0].per_head - std::count(first_list, first_list + kept[0].per_head, -1);
  const auto blocks_of = [&](int64_t n) { return (n + s.block_size - 1) / s.block_size; };
  const int64_t used = blocks_of(rows), columns = blocks_of(kept[0].per_head);
  const int64_t used_before = std::min(blocks_of(std::max(s.seq_lens[b], 0)), s.width);

  const int32_t* before = s.block_table + b * s.width;
  const int32_t* now = places.in_place() ? before : s.out_block_table + b * s.out_width;
  int32_t* table = out.block_table + b * columns;
  std::fill(std::copy(now, now + used, table), table + columns, -1);
  out.seq_lens[b] = static_cast<int32_t>(rows);

  const int64_t first_freed = std::min(places.in_place() ? used : 0, used_before);
  int32_t* freed = out.freed_blocks + b * s.width;
  std::fill(std::copy(before + first_freed, before + used_before, freed), freed + s.width, -1);
  out.num_freed[b] = static_cast<int32_t>(used_before - first_freed);

  bool outside = false;
  for (int64_t k = 0; k < lists; ++k) {
    for (int64_t h = 0; h < (kept[k].head_step == 0 ? 1 : heads); ++h) {
      const int64_t* index = kept[k].index + (b * kept[k].batch_step + h * kept[k].head_step) * kept[k].per_head;
      for (int64_t i = 0; i < kept[k].per_head; ++i) {
        outside |= index[i] != -1 && (places.source(b, index[i]) < 0 || places.target(b, i) < 0);
      }
    }
  }
  out.status[b] = outside ? status_out_of_bounds : status_ok;
}

}  // namespace

void repack_pages(const PagedTensor* tensors, int64_t tensor_count, const KeptRows* kept, int64_t lists,
                  const PagedSequences& sequences, int threads, const PagedOutputs& out) {
  const Places places(sequences);
  std::vector<PageMover> movers;
  std::vector<RowTasks> tasks;
  movers.reserve(tensor_count);
  for (int64_t t = 0; t < tensor_count; ++t) {
    movers.emplace_back(places, tensors[t], kept[tensors[t].kept]);
    tasks.push_back(movers.back().tasks());
  }
  const int64_t heads = tensor_count > 0 ? tensors[0].x.sizes[2] : 0;
  parallel_for(sequences.count, 1, threads, [&](int64_t first, int64_t last) {
    for (; first < last; ++first) account(places, kept, lists, heads, first, out);
  });
  for_rows(tasks, threads, [&](size_t t, int64_t row, int64_t last) {
    const PageMover& m = movers[t];
    const int64_t per_head = m.kept.per_head;
    for (int64_t count; row < last; row += count) {
      const int64_t list = row / per_head, first = row % per_head;
      count = std::min(per_head - first, last - row);
      m.move(list / m.heads(), list % m.heads(), first, count);
    }
  });
}

}  // namespace cacovid::cpu
