// Budget, selection and top-k as CUDA kernels, on the machine of simt/: the bits of the CPU engine, in memory closed to
// the host. Grids are small: under ThreadSanitizer every thread is a fiber.
#include <numeric>

#include "cacovid/cuda.h"
#include "cacovid/order.h"
#include "device.h"
#include "select_calls.h"

namespace cacovid::test {
namespace {

using Ints = std::vector<int64_t>;

template <class T>
std::vector<T> read(const DeviceBytes& memory) {
  const std::vector<char> bytes = memory.read();
  std::vector<T> items(bytes.size() / sizeof(T));
  if (!bytes.empty()) std::memcpy(items.data(), bytes.data(), bytes.size());
  return items;
}

struct Chosen {
  Ints indices, counts;
  std::vector<int32_t> status;

  Chosen(int64_t kept, int64_t frames)
      : indices(static_cast<size_t>(kept)), counts(static_cast<size_t>(frames)), status(static_cast<size_t>(frames)) {}
};

// Columns of a frame of the video: the largest small divisor, so that rows are told from columns.
int64_t width_of(const BudgetPlan& p) {
  int64_t width = 1;
  for (int64_t w = 2; w <= 7; ++w) width = p.tokens_per_frame % w == 0 ? w : width;
  return width;
}

// Selects with every output on the device, with rows [N, columns] of bytes, and compares with what the engine's
// indices say.
void check_selection(const std::vector<BudgetPlan>& plans, const RandomTensor& tokens, const RandomTensor* frames,
                     Random& random) {
  const cpu::Videos videos = {plans.data(), static_cast<int64_t>(plans.size())};
  Ints widths;
  int64_t count = 0, all = 0, kept = 0;
  for (const BudgetPlan& p : plans) {
    widths.push_back(width_of(p));
    count += p.frames;
    all += p.frames * p.tokens_per_frame;
    kept += p.num_keep;
  }
  Chosen expected(kept, count);
  const Tensor frame_view = frames ? frames->view : Tensor{};
  cpu::select_tokens(tokens.view, frame_view, videos, false, 1, expected.indices.data(), expected.counts.data(),
                     expected.status.data());

  const int64_t columns = random.pick({1, 4, 12, 16, 36, 48, 600, 2064});
  const RandomTensor rows(random, DType::u8, {std::max<int64_t>(all, 1), columns}, Values::bits, Strides::contiguous);
  const DeviceTensor there(tokens), rows_there(rows);
  const DeviceBytes indices(8 * kept), counts(8 * count), status(4 * count), mask(all), positions(24 * kept),
      bounds(4 * (videos.count + 1)), target(kept * columns), scratch(8 * cuda::budget_scratch(videos));
  cuda::SelectOutputs out = {};
  out.indices = indices.as<int64_t>();
  out.frame_counts = counts.as<int64_t>();
  out.frame_status = status.as<int32_t>();
  const bool everything = random.chance(60);
  if (everything) {
    out.mask = mask.as<bool>();
    out.positions = positions.as<int64_t>();
    out.cu_seqlens = bounds.as<int32_t>();
    out.tokens = {rows_there.view.data, rows_there.view.strides[0], target.as(), columns};
  }
  const std::unique_ptr<DeviceTensor> frames_there(frames ? new DeviceTensor(*frames) : nullptr);
  const Tensor frame_scores = frames ? frames_there->view : Tensor{};
  CHECK_EQ(cuda::select_tokens(there.view, frame_scores, videos, widths.data(), false, scratch.as<int64_t>(), out, {}),
           0);
  CHECK(read<int64_t>(indices) == expected.indices);
  CHECK(read<int64_t>(counts) == expected.counts);
  CHECK(read<int32_t>(status) == expected.status);
  if (!everything) return;

  std::vector<char> is_kept(static_cast<size_t>(all)), moved;
  Ints places(static_cast<size_t>(3 * kept));
  std::vector<int32_t> starts = {0};
  int64_t token = 0, j = 0;
  for (size_t v = 0; v < plans.size(); ++v) {
    const int64_t per_frame = plans[v].tokens_per_frame;
    starts.push_back(static_cast<int32_t>(starts.back() + plans[v].num_keep));
    for (; j < starts.back(); ++j) {
      const int64_t i = expected.indices[j], in_video = i - token, in_frame = in_video % per_frame;
      is_kept[i] = 1;
      places[j] = in_video / per_frame;
      places[kept + j] = in_frame / widths[v];
      places[2 * kept + j] = in_frame % widths[v];
      moved.insert(moved.end(), rows.at(i * columns), rows.at(i * columns) + columns);
    }
    token += plans[v].frames * per_frame;
  }
  CHECK(mask.read() == is_kept);
  CHECK(read<int64_t>(positions) == places);
  if (videos.count > 0) CHECK(read<int32_t>(bounds) == starts);
  CHECK(target.read() == moved);
}

BudgetPlan plan(Random& random, int64_t t, int64_t p) {
  const int64_t keep = random.range(0, t * p);
  const double ratio = static_cast<double>(std::max<int64_t>(keep, 1)) / static_cast<double>(t * p);
  return plan_budget(t, 1, p, keep, {ratio, random.pick({0.0, 0.5, 1.0}), 1.5 * ratio, random.chance(50), true});
}

void check_packed(Random& random, const std::vector<BudgetPlan>& plans) {
  int64_t all = 0, count = 0;
  for (const BudgetPlan& p : plans) all += p.frames * p.tokens_per_frame, count += p.frames;
  const RandomTensor tokens(random, random_score_type(random), {all}, random_values(random));
  const RandomTensor frames(random, random_score_type(random), {count}, random_values(random));
  check_selection(plans, tokens, &frames, random);
}

TEST(selects_as_the_engine) {
  repeat(90, [](Random& random) {
    const SelectCall call(random, random.chance(30));
    check_selection(call.plans, call.token_scores, call.with_frames ? &call.frame_scores : nullptr, random);
  });
}

TEST(blocks_of_one_warp_and_of_many) {
  repeat(12, [](Random& random) {
    check_packed(random, {plan(random, random.pick({31, 32, 33, 65, 130, 257}), random.range(1, 5))});
  });
}

TEST(rows_in_registers_and_rows_that_are_not) {
  repeat(12, [](Random& random) {
    const int64_t p = random.pick({255, 256, 257, 513, 1024, 1025, 1300});
    std::vector<BudgetPlan> plans = {plan(random, random.range(1, 2), p)};
    if (random.chance(50)) plans.push_back(plan(random, random.range(1, 3), random.range(1, 300)));
    check_packed(random, plans);
  });
}

TEST(more_frames_than_shared_memory_holds) {
  repeat(2, [](Random& random) {
    check_packed(random, {plan(random, 3, 2), plan(random, 2048 + random.range(1, 40), 1), plan(random, 2, 5)});
  });
}

TEST(more_videos_than_a_launch_takes) {
  repeat(3, [](Random& random) {
    std::vector<BudgetPlan> plans;
    for (int v = 0; v < 35; ++v) plans.push_back(plan(random, random.range(1, 3), random.range(1, 20)));
    check_packed(random, plans);
  });
}

TEST(allocates_as_the_engine) {
  repeat(60, [](Random& random) {
    const SelectCall call(random, random.chance(50));
    Ints expected(static_cast<size_t>(call.frames));
    std::vector<int32_t> flags(static_cast<size_t>(call.frames));
    cpu::allocate_budget(call.frame_view(), call.videos(), expected.data(), flags.data());
    const DeviceBytes counts(8 * call.frames), status(4 * call.frames);
    const std::unique_ptr<DeviceTensor> there(call.with_frames ? new DeviceTensor(call.frame_scores) : nullptr);
    CHECK_EQ(cuda::allocate_budget(there ? there->view : Tensor{}, call.videos(), nullptr, counts.as<int64_t>(),
                                   status.as<int32_t>(), {}),
             0);
    CHECK(read<int64_t>(counts) == expected);
    CHECK(read<int32_t>(status) == flags);
  });
}

TEST(best_of_segments) {
  repeat(60, [](Random& random) {
    const int64_t segments = random.some(20), width = random.size(0, 300);
    const bool dense = random.chance(40) && segments > 0 && width > 0;
    Ints offsets = {0}, k;
    int64_t kept = 0;
    for (int64_t s = 0; s < segments; ++s) {
      const int64_t n = dense ? width : random.chance(5) ? 1100 : random.size(0, 300);
      offsets.push_back(offsets.back() + n);
      k.push_back(random.pick({int64_t{0}, n, random.range(0, n)}));
      kept += k.back();
    }
    const RandomTensor scores(random, random_score_type(random), dense ? Ints{segments, width} : Ints{offsets.back()},
                              random_values(random));
    Chosen expected(kept, segments);
    cpu::segmented_topk(scores.view, offsets.data(), k.data(), segments, false, 1, expected.indices.data(),
                        expected.status.data());
    const DeviceTensor there(scores);
    const DeviceBytes indices(8 * kept), status(4 * segments);
    const bool words = random.chance(40);
    CHECK_EQ(cuda::segmented_topk(there.view, offsets.data(), k.data(), segments, words, indices.as<int64_t>(),
                                  status.as<int32_t>(), {}),
             0);
    CHECK(read<int32_t>(status) == expected.status);
    Ints found = read<int64_t>(indices);
    if (words) {
      // Sorted, the words of each segment give the order by score.
      cpu::segmented_topk(scores.view, offsets.data(), k.data(), segments, true, 1, expected.indices.data(),
                          expected.status.data());
      for (int64_t s = 0, at = 0; s < segments; at += k[s++]) {
        std::sort(found.begin() + at, found.begin() + at + k[s], [](int64_t a, int64_t b) { return a > b; });
        for (int64_t j = at; j < at + k[s]; ++j) found[j] = offsets[s] + rank_index(static_cast<uint64_t>(found[j]));
      }
    }
    CHECK(found == expected.indices);
  });
}

TEST(scores_come_back_from_keys) {
  repeat(100000, [](Random& random) {
    float x;
    draw_value(random, reinterpret_cast<char*>(&x), DType::f32, random_values(random));
    CHECK(same_float(score_of(order_key(x)), x == 0.0f ? 0.0f : x));
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
