// Gather of rows as CUDA kernels, on the machine of simt/: the bytes of the CPU engine, in memory closed to the host.
#include "cacovid/cuda.h"
#include "device.h"

namespace cacovid::test {
namespace {

using Ints = std::vector<int64_t>;

struct Case {
  std::vector<RandomTensor> xs;
  std::vector<int32_t> dims;
  Ints index;

  void add(Random& random, DType dtype, const Ints& sizes, int32_t dim, Strides strides = Strides::any) {
    xs.emplace_back(random, dtype, sizes, Values::bits, strides);
    dims.push_back(dim);
  }
  int64_t bytes(size_t t) const {  // of a result
    int64_t count = static_cast<int64_t>(index.size()) * item_size(xs[t].view.dtype);
    for (int32_t d = 0; d < xs[t].view.ndim; ++d) count *= d == dims[t] ? 1 : xs[t].view.sizes[d];
    return count;
  }

  // Every result begins `shift` bytes behind an alignment to 16.
  void check(int64_t shift = 0) const {
    const int64_t count = static_cast<int64_t>(xs.size()), kept = static_cast<int64_t>(index.size());
    std::vector<DeviceTensor> there;
    std::vector<DeviceBytes> outs;
    std::vector<std::vector<char>> expected;
    std::vector<Tensor> here_views, there_views;
    std::vector<void*> here, targets;
    for (size_t t = 0; t < xs.size(); ++t) {
      there.emplace_back(xs[t]);
      outs.emplace_back(shift + bytes(t));
      expected.emplace_back(static_cast<size_t>(shift + bytes(t)), '\x5a');
      here_views.push_back(xs[t].view);
      there_views.push_back(there.back().view);
      here.push_back(expected.back().data() + shift);
      targets.push_back(outs.back().as<char>() + shift);
    }
    cpu::gather_rows(here_views.data(), dims.data(), count, index.data(), kept, false, 1, here.data());
    const DeviceBytes chosen(kept * 8, index.data());
    CHECK_EQ(cuda::gather_rows(there_views.data(), dims.data(), count, chosen.as<int64_t>(), kept, targets.data(), {}),
             0);
    for (size_t t = 0; t < xs.size(); ++t) CHECK(outs[t].read() == expected[t]);
  }
};

Ints random_index(Random& random, int64_t count, int64_t n) {
  Ints index;
  for (int64_t i = 0; i < count; ++i) {
    const bool inside = n > 0 && random.chance(85);
    index.push_back(inside ? random.range(0, n - 1)
                           : random.pick({int64_t{-1}, n, -n, int64_t{1} << 32, std::numeric_limits<int64_t>::min(),
                                          std::numeric_limits<int64_t>::max()}));
  }
  return index;
}

TEST(rows_of_every_width) {
  repeat(60, [](Random& random) {
    const int64_t n = random.range(1, 20), kept = random.range(1, 40);
    Case c;
    c.index = random_index(random, kept, n);
    const int64_t columns = random.pick({1, 2, 3, 8, 24, 31, 64, 100, 255, 512, 513, 1040});
    const int64_t apart = columns + random.pick({0, 0, 1, 3, 4});  // where the rows of a wider tensor are cut
    c.add(random, random.pick({DType::u8, DType::bf16, DType::f32, DType::i64}), {n, apart}, 0, Strides::contiguous);
    c.xs.back().view.sizes[1] = columns;
    c.check(random.pick({0, 0, 1, 2, 4, 8}));
  });
}

TEST(any_shapes_and_strides) {
  repeat(100, [](Random& random) {
    const int64_t n = random.size(0, 20);
    Case c;
    c.index = random_index(random, random.size(0, 30), n);
    for (int64_t t = random.some(4); t > 0; --t) {
      Ints sizes;
      const int64_t ndim = random.size(1, max_dims);
      for (int64_t d = 0; d < ndim; ++d) sizes.push_back(random.chance(3) ? 0 : random.size(1, ndim > 3 ? 2 : 9));
      const int32_t dim = static_cast<int32_t>(random.range(0, ndim - 1));
      sizes[dim] = n;
      c.add(random, random.pick({DType::b8, DType::bf16, DType::f32, DType::f64}), sizes, dim);
    }
    c.check();
  });
}

TEST(more_tensors_than_a_launch_takes) {
  repeat(6, [](Random& random) {
    Case c;
    c.index = random_index(random, 7, 5);
    for (int t = 0; t < 19; ++t) c.add(random, DType::i16, {random.chance(20) ? 0 : 2, 5, random.range(1, 40)}, 1);
    c.check();
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
