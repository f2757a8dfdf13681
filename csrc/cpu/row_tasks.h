// Rows of several tensors, shared out among the threads.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "thread_pool.h"

namespace cacovid::cpu {

struct RowTasks {
  int64_t rows;      // of one tensor
  int64_t together;  // rows that one thread takes at least, in order
};

// Rows of about 64 KiB: 5 us of work, less does not pay for waking a thread.
inline int64_t rows_worth_a_thread(int64_t row_bytes) {
  return std::max<int64_t>(1, (int64_t{64} << 10) / std::max<int64_t>(row_bytes, 1));
}

// Calls body(tensor, first, last) over disjoint ranges that cover the rows of every tensor.
template <class Body>
void for_rows(const std::vector<RowTasks>& tensors, int threads, const Body& body) {
  std::vector<int64_t> end;
  int64_t chunks = 0;
  for (const RowTasks& t : tensors) end.push_back(chunks += (t.rows + t.together - 1) / t.together);
  parallel_for(chunks, 1, threads, [&](int64_t first, int64_t last) {
    size_t t = static_cast<size_t>(std::upper_bound(end.begin(), end.end(), first) - end.begin());
    for (int64_t begin; first < last; first = end[t++]) {
      begin = t == 0 ? 0 : end[t - 1];
      const int64_t to = std::min(last, end[t]), together = tensors[t].together;
      if (first < to) body(t, (first - begin) * together, std::min(tensors[t].rows, (to - begin) * together));
    }
  });
}

}  // namespace cacovid::cpu
