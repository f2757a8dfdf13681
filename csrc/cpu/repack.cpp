#include <algorithm>
#include <cstring>
#include <vector>

#include "cacovid/ops.h"
#include "isa/row_loops.h"
#include "memory.h"
#include "row_tasks.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

struct row_scratch;

// Some of the rows that one head keeps: [first, first + count) of its list.
struct Part {
  int64_t head, first, count;
};

struct Mover {
  const CacheTensor& t;
  const KeptRows& kept;
  bool stream;
  int64_t item = item_size(t.x.dtype);
  int64_t heads = t.x.sizes[0] * t.x.sizes[1];
  int64_t columns = t.x.sizes[3];
  int64_t row_bytes = columns * item;

  int64_t rows() const { return kept.cu_seqlens != nullptr ? kept.total : heads * kept.per_head; }

  // Rows that must move in order: a later one may land where an earlier one lay.
  int64_t together() const {
    if (t.placement == Placement::in_front) return std::max<int64_t>(rows(), 1);
    if (t.placement == Placement::in_heads) return std::max<int64_t>(kept.per_head, 1);
    return rows_worth_a_thread(row_bytes);
  }

  Part part(int64_t row, int64_t last) const {
    int64_t head, begin, end;
    if (kept.cu_seqlens != nullptr) {
      head = std::upper_bound(kept.cu_seqlens, kept.cu_seqlens + heads + 1, row) - kept.cu_seqlens - 1;
      begin = kept.cu_seqlens[head];
      end = kept.cu_seqlens[head + 1];
    } else {
      head = row / kept.per_head;
      begin = head * kept.per_head;
      end = begin + kept.per_head;
    }
    return {head, row - begin, std::min(last, end) - row};
  }

  // First entry of a head's list, or of its rows in the tables.
  int64_t list_of(int64_t head, int64_t batch_step, int64_t head_step) const {
    if (kept.cu_seqlens != nullptr) return kept.cu_seqlens[head];
    return (head / t.x.sizes[1] * batch_step + head % t.x.sizes[1] * head_step) * kept.per_head;
  }

  char* head_data(int64_t head) const {
    const int64_t at = head / t.x.sizes[1] * t.x.strides[0] + head % t.x.sizes[1] * t.x.strides[1];
    return static_cast<char*>(t.x.data) + at * item;
  }

  void move(int64_t row, const Part& p) const {
    const int64_t* index = kept.index + list_of(p.head, kept.batch_step, kept.head_step) + p.first;
    const int64_t table = list_of(p.head, kept.table_batch_step, kept.table_head_step) + p.first;
    const int64_t step = t.x.strides[2] * item;
    char* source = head_data(p.head);
    RowCopy copy = {nullptr, source, row_bytes, step, row_bytes, t.x.sizes[2], stream};
    if (t.placement == Placement::in_heads) {
      copy.target = source + p.first * step;
      copy.target_step = step;
    } else {
      copy.target = static_cast<char*>(t.target) + row * row_bytes;
    }
    if (t.x.strides[3] == 1 || columns == 1) return move_rows(copy, table, index, p.count);
    const int64_t target_stride = t.placement == Placement::in_heads ? t.x.strides[3] * item : item;
    for (int64_t i = 0; i < p.count; ++i) {
      move_spread_row(copy, target_stride, table + i, index[i]);
      copy.target += copy.target_step;
    }
  }

  void move_rows(const RowCopy& copy, int64_t table, const int64_t* index, int64_t count) const {
    const RowLoops& loops = row_loops();
    if (!t.rotated) return loops.copy_rows(copy, index, count);
    loops.rotate_rows(copy, t.x.dtype, columns, kept.half, kept.cos + table * kept.half, kept.sin + table * kept.half,
                      index, count);
  }

  // A row whose elements do not lie side by side, by way of one that does.
  void move_spread_row(const RowCopy& copy, int64_t target_stride, int64_t table, int64_t index) const {
    char* row = scratch<row_scratch, char>(row_bytes);
    const int64_t stride = t.x.strides[3] * item;
    const bool inside = static_cast<uint64_t>(index) < static_cast<uint64_t>(copy.source_rows);
    for (int64_t c = 0; inside && c < columns; ++c) {
      std::memcpy(row + c * item, copy.source + index * copy.source_step + c * stride, static_cast<size_t>(item));
    }
    const int64_t itself = inside ? 0 : -1;
    move_rows({row, row, row_bytes, row_bytes, row_bytes, 1, false}, table, &itself, 1);
    for (int64_t c = 0; c < columns; ++c) {
      std::memcpy(copy.target + c * target_stride, row + c * item, static_cast<size_t>(item));
    }
  }

  void zero_tail(int64_t head) const {
    char* row = head_data(head) + kept.per_head * t.x.strides[2] * item;
    for (int64_t n = kept.per_head; n < t.x.sizes[2]; ++n, row += t.x.strides[2] * item) {
      if (t.x.strides[3] == 1 || columns == 1) {
        std::memset(row, 0, static_cast<size_t>(row_bytes));
      } else {
        for (int64_t c = 0; c < columns; ++c) {
          std::memset(row + c * t.x.strides[3] * item, 0, static_cast<size_t>(item));
        }
      }
    }
  }
};

}  // namespace

void repack_rows(const CacheTensor* tensors, int64_t count, const KeptRows* kept, bool zero_tail, bool fresh,
                 int threads) {
  std::vector<Mover> movers;
  std::vector<RowTasks> tasks, tails;
  movers.reserve(count);
  int64_t written = 0;
  for (int64_t i = 0; i < count; ++i) {
    movers.push_back({tensors[i], kept[tensors[i].kept], false});
    const Mover& m = movers.back();
    const int64_t rows = m.row_bytes > 0 ? m.rows() : 0;
    tasks.push_back({rows, m.together()});
    tails.push_back({zero_tail && m.row_bytes > 0 && m.t.placement == Placement::in_heads ? m.heads : 0, 1});
    written += rows * m.row_bytes;
    if (fresh && m.t.placement == Placement::elsewhere) expect_writes(m.t.target, rows * m.row_bytes);
  }
  for (Mover& m : movers) m.stream = worth_streaming(written);
  for_rows(tasks, threads, [&](size_t i, int64_t first, int64_t last) {
    for (Part p; first < last; first += p.count) {
      p = movers[i].part(first, last);
      movers[i].move(first, p);
    }
  });
  for_rows(tails, threads, [&](size_t i, int64_t first, int64_t last) {
    for (; first < last; ++first) movers[i].zero_tail(first);
  });
}

}  // namespace cacovid::cpu
