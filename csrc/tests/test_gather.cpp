#include <algorithm>

#include "cacovid/round.h"
#include "data.h"

namespace cacovid::test {
namespace {

using Ints = std::vector<int64_t>;

constexpr DType all_types[] = {DType::f32, DType::f16, DType::bf16, DType::f64, DType::i64,
                               DType::i32, DType::i16, DType::i8,   DType::u8,  DType::b8};

// Positions in [0, n), duplicates and anything else among them.
int64_t any_index(Random& random, int64_t n) {
  if (n > 0 && random.chance(85)) return random.range(0, n - 1);
  return random.pick({int64_t{-1}, n, n + 1, -n, int64_t{1} << 31, int64_t{1} << 32,
                      std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max()});
}

Output<int64_t> random_index(Random& random, int64_t count, int64_t n) {
  Output<int64_t> index(random, count);
  for (int64_t i = 0; i < count; ++i) index[i] = any_index(random, n);
  if (random.chance(30)) std::sort(index.data(), index.data() + count);
  return index;
}

// Byte by byte: element e of x, its token axis replaced by the index.
std::vector<char> naive_gather(const RandomTensor& x, int32_t dim, const int64_t* index, int64_t kept) {
  const int64_t item = item_size(x.view.dtype), n = x.view.sizes[dim];
  int64_t outer = 1, inner = 1;
  for (int32_t d = 0; d < x.view.ndim; ++d) (d < dim ? outer : inner) *= d == dim ? 1 : x.view.sizes[d];
  std::vector<char> result;
  for (int64_t o = 0; o < outer; ++o) {
    for (int64_t k = 0; k < kept; ++k) {
      for (int64_t i = 0; i < inner; ++i) {
        const bool inside = 0 <= index[k] && index[k] < n;
        const char* from = inside ? x.at((o * n + index[k]) * inner + i) : nullptr;
        for (int64_t b = 0; b < item; ++b) result.push_back(inside ? from[b] : 0);
      }
    }
  }
  return result;
}

TEST(gathers_as_byte_loops) {
  repeat(1500, [](Random& random) {
    const int64_t count = random.some(5), kept = random.size(0, 60), n = random.size(0, 60);
    std::vector<RandomTensor> owners;
    std::vector<Tensor> xs;
    std::vector<int32_t> dims;
    std::vector<std::vector<char>> expected;
    const Output<int64_t> index = random_index(random, kept, n);
    for (int64_t t = 0; t < count; ++t) {
      const int64_t ndim = random.size(1, max_dims);
      Ints sizes;
      for (int64_t d = 0; d < ndim; ++d) sizes.push_back(random.chance(3) ? 0 : random.size(1, ndim > 3 ? 3 : 30));
      dims.push_back(static_cast<int32_t>(random.range(0, ndim - 1)));
      sizes[dims.back()] = random.chance(90) ? n : random.size(0, 60);
      owners.emplace_back(random, random.pick({all_types[random.range(0, 9)], DType::bf16}), sizes, Values::bits);
      xs.push_back(owners.back().view);
      expected.push_back(naive_gather(owners.back(), dims.back(), index, kept));
    }
    for (const int threads : {1, 2, 3, 8}) {
      std::vector<Output<char>> outs;
      std::vector<void*> targets;
      for (int64_t t = 0; t < count; ++t) {
        outs.emplace_back(random, static_cast<int64_t>(expected[t].size()), item_size(xs[t].dtype));
        targets.push_back(outs.back().data());
      }
      cpu::gather_rows(xs.data(), dims.data(), count, index, kept, false, threads, targets.data());
      for (int64_t t = 0; t < count; ++t) CHECK(outs[t].equals(expected[t]));
    }
  });
}

// Results too large for the caches are stored past them, where rows are whole, aligned lines.
TEST(gathers_large_results) {
  repeat(slowdown * 6, [](Random& random) {
    const int64_t width = random.pick({1024, 1024, 1000, 1056, 3}) * 2, n = random.range(200, 400);
    const int64_t kept = (10 << 20) / width, offset = random.pick({0, 0, 0, 2, 32});
    const RandomTensor x(random, DType::bf16, {n, width / 2}, Values::bits, Strides::contiguous);
    const Output<int64_t> index = random_index(random, kept, n);
    const Memory memory(kept * width + 64 + offset, Memory::heap);
    char* target = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) + offset;
    const int32_t dim = 0;
    void* const targets[] = {target};
    const bool fresh = random.chance(50);
    cpu::gather_rows(&x.view, &dim, 1, index, kept, fresh, static_cast<int>(random.range(1, 3)), targets);
    bool equal = true;
    const std::vector<char> zeros(static_cast<size_t>(width), 0);
    for (int64_t k = 0; k < kept; ++k) {
      const char* row = 0 <= index[k] && index[k] < n ? x.memory.data() + index[k] * width : zeros.data();
      equal = equal && std::memcmp(target + k * width, row, static_cast<size_t>(width)) == 0;
    }
    CHECK(equal);
  });
}

// For every token, the rows that name it, in ascending position, in a wide accumulator; one rounding.
std::vector<char> naive_scatter(const RandomTensor& grad, const cpu::RowSum& s, const int64_t* index, int64_t kept) {
  const int64_t item = item_size(grad.view.dtype);
  std::vector<char> result(static_cast<size_t>(s.outer * s.tokens * s.columns * item));
  for (int64_t o = 0; o < s.outer; ++o) {
    for (int64_t n = 0; n < s.tokens; ++n) {
      for (int64_t c = 0; c < s.columns; ++c) {
        double wide = 0.0;
        float narrow = 0.0f;
        for (int64_t k = 0; k < kept; ++k) {
          if (index[k] != n) continue;
          wide += grad.value((o * kept + k) * s.columns + c);
          narrow += static_cast<float>(grad.value((o * kept + k) * s.columns + c));
        }
        store_value(result.data() + ((o * s.tokens + n) * s.columns + c) * item, grad.view.dtype,
                    grad.view.dtype == DType::f64 ? wide : static_cast<double>(narrow));
      }
    }
  }
  return result;
}

bool same_values(const Output<char>& out, const std::vector<char>& expected, DType dtype) {
  const int64_t item = item_size(dtype);
  bool equal = out.size() == static_cast<int64_t>(expected.size());
  for (int64_t i = 0; equal && i < out.size(); i += item) {
    const double x = value_of(out.data() + i, dtype), y = value_of(expected.data() + i, dtype);
    equal = std::memcmp(out.data() + i, expected.data() + i, static_cast<size_t>(item)) == 0 || (x != x && y != y);
  }
  return equal;
}

TEST(scatters_as_ordered_sums) {
  repeat(1200, [](Random& random) {
    const int64_t count = random.some(4), kept = random.size(0, 50), tokens = random.size(0, 40);
    const Output<int64_t> index = random_index(random, kept, tokens);
    std::vector<RandomTensor> owners;
    std::vector<Tensor> grads;
    std::vector<cpu::RowSum> sums;
    std::vector<std::vector<char>> expected;
    for (int64_t t = 0; t < count; ++t) {
      const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16, DType::f64});
      sums.push_back({random.some(4), random.chance(80) ? tokens : random.size(0, 40), random.size(0, 40)});
      const Ints sizes = {sums.back().outer, kept, sums.back().columns};
      owners.emplace_back(random, dtype, sizes, random_values(random), Strides::contiguous);
      grads.push_back(owners.back().view);
      expected.push_back(naive_scatter(owners.back(), sums.back(), index, kept));
    }
    for (const int threads : {1, 2, 3, 8}) {
      std::vector<Output<char>> outs;
      std::vector<void*> targets;
      for (int64_t t = 0; t < count; ++t) {
        outs.emplace_back(random, static_cast<int64_t>(expected[t].size()), item_size(grads[t].dtype));
        targets.push_back(outs.back().data());
      }
      cpu::scatter_rows(grads.data(), sums.data(), count, index, kept, false, threads, targets.data());
      for (int64_t t = 0; t < count; ++t) CHECK(same_values(outs[t], expected[t], grads[t].dtype));
    }
  });
}

TEST(scatters_wide_rows) {
  repeat(20, [](Random& random) {
    const int64_t kept = 9, columns = random.range(500, 1600);
    const cpu::RowSum sum = {1, 4, columns};
    const RandomTensor grad(random, random_score_type(random), {1, kept, columns}, Values::plain, Strides::contiguous);
    const Output<int64_t> index = random_index(random, kept, 4);
    const Output<char> out(random, 4 * columns * item_size(grad.view.dtype), item_size(grad.view.dtype));
    void* const targets[] = {out.data()};
    cpu::scatter_rows(&grad.view, &sum, 1, index, kept, true, 2, targets);
    CHECK(same_values(out, naive_scatter(grad, sum, index, kept), grad.view.dtype));
  });
}

// Every float16 and bfloat16 comes back, and floats in between go to the nearer one, or to the even one.
TEST(rounds_to_nearest_even) {
  const auto check = [](float x) {
    f16_t f16, f16_expected;
    bf16_t bf16, bf16_expected;
    store_float(&f16, x);
    store_float(&bf16, x);
    store_value(reinterpret_cast<char*>(&f16_expected), DType::f16, static_cast<double>(x));
    store_value(reinterpret_cast<char*>(&bf16_expected), DType::bf16, static_cast<double>(x));
    CHECK_EQ(f16.bits, f16_expected.bits);
    CHECK_EQ(bf16.bits, bf16_expected.bits);
  };
  for (uint32_t bits = 0; bits < 65536; ++bits) {
    for (const DType dtype : {DType::f16, DType::bf16}) {
      const float x = static_cast<float>(value_of_half(static_cast<uint16_t>(bits), dtype));
      if (x != x) continue;
      const uint32_t word = float_bits(x);
      check(x);
      for (const uint32_t step : {0xfffu, 0x1000u, 0x1001u, 0x7fffu, 0x8000u, 0x8001u, 0xffffu}) {
        check(bits_to_float(word + step));
      }
    }
  }
  repeat(100000, [&](Random& random) { check(bits_to_float(static_cast<uint32_t>(random.next()))); });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
