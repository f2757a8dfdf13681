#include <algorithm>
#include <vector>

#include "cacovid/ops.h"
#include "isa/hot_loops.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t bytes_per_task = 128 << 10;  // about 5 us of reading: less does not pay for waking a thread

struct FrameRows {
  int64_t first, count;  // in the packed token axis
};

}  // namespace

void frame_pool(Tensor hidden, const int64_t* grid_thw, int64_t videos, float eps, int threads, float* rrms,
                float* frame_mean) {
  thread_local std::vector<FrameRows> list;
  list.clear();
  int64_t token = 0;
  for (int64_t v = 0; v < videos; ++v) {
    const int64_t rows = grid_thw[3 * v + 1] * grid_thw[3 * v + 2];
    for (int64_t f = 0; f < grid_thw[3 * v]; ++f, token += rows) list.push_back({token, rows});
  }
  const FrameRows* all = list.data();
  const int64_t frames = static_cast<int64_t>(list.size()), columns = hidden.sizes[1];
  const int64_t bytes_per_frame = token * columns * item_size(hidden.dtype) / std::max<int64_t>(frames, 1);
  // A frame belongs to one thread: its sums are the same for every number of threads.
  const int64_t grain = bytes_per_task / std::max<int64_t>(bytes_per_frame, 1) + 1;
  parallel_for(frames, grain, threads, [=](int64_t first, int64_t last) {
    float* sums = scratch<struct sum_scratch, float>(padded(columns));
    for (int64_t f = first; f < last; ++f) {
      const FrameShape shape = {all[f].count, columns, hidden.strides[0], hidden.strides[1]};
      const void* data = offset(hidden, all[f].first * hidden.strides[0]);
      hot_loops().pool_frame(data, hidden.dtype, shape, eps, rrms + all[f].first, frame_mean + f * columns, sums);
    }
  });
}

}  // namespace cacovid::cpu
