#include "repack_calls.h"

namespace cacovid::test {
namespace {

// The kept rows of all heads, one after another.
std::vector<char> naive_rows(const RepackCall& call, size_t t) {
  const cpu::CacheTensor& tensor = call.tensors[t];
  const cpu::KeptRows& k = call.kept[tensor.kept].rows;
  const int64_t columns = tensor.x.sizes[3], item = item_size(tensor.x.dtype);
  std::vector<char> out;
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t h = 0; h < call.heads; ++h) {
      const int64_t head = b * call.heads + h;
      const int64_t count = k.cu_seqlens ? k.cu_seqlens[head + 1] - k.cu_seqlens[head] : k.per_head;
      const int64_t list = k.cu_seqlens ? k.cu_seqlens[head] : (b * k.batch_step + h * k.head_step) * k.per_head;
      const int64_t table =
          k.cu_seqlens ? k.cu_seqlens[head] : (b * k.table_batch_step + h * k.table_head_step) * k.per_head;
      for (int64_t i = 0; i < count; ++i) {
        const int64_t position = k.index[list + i];
        if (position < 0 || position >= call.n) {
          out.insert(out.end(), static_cast<size_t>(columns * item), 0);
          continue;
        }
        naive_row(call.caches[t], head * call.n + position, k, tensor.rotated, k.cos + (table + i) * k.half,
                  k.sin + (table + i) * k.half, out);
      }
    }
  }
  return out;
}

// What the tensor's memory, or the target, must hold afterwards.
std::vector<char> naive_memory(const RepackCall& call, size_t t) {
  const cpu::CacheTensor& tensor = call.tensors[t];
  const RandomTensor& x = call.caches[t];
  std::vector<char> rows = naive_rows(call, t);
  if (tensor.placement == cpu::Placement::elsewhere) return rows;
  std::vector<char> memory(x.memory.data(), x.memory.data() + x.memory.bytes());
  if (tensor.placement == cpu::Placement::in_front) {
    std::copy(rows.begin(), rows.end(), memory.begin());
    return memory;
  }
  const int64_t columns = tensor.x.sizes[3], item = item_size(tensor.x.dtype);
  const int64_t kept = call.kept[tensor.kept].rows.per_head;
  for (int64_t head = 0; head < call.batch * call.heads; ++head) {
    for (int64_t i = 0; i < (call.zero_tail ? call.n : kept); ++i) {
      for (int64_t c = 0; c < columns; ++c) {
        char* to = memory.data() + (x.at((head * call.n + i) * columns + c) - x.memory.data());
        const char* from = rows.data() + ((head * kept + i) * columns + c) * item;
        for (int64_t byte = 0; byte < item; ++byte) to[byte] = i < kept ? from[byte] : 0;
      }
    }
  }
  return memory;
}

TEST(repacks_as_the_naive_implementation) {
  repeat(2500, [](Random& random) {
    const RepackCall call(random, false);
    std::vector<std::vector<char>> expected;
    for (size_t t = 0; t < call.tensors.size(); ++t) expected.push_back(naive_memory(call, t));
    for (const int threads : {1, 2, 3, 8}) {
      call.run(random, threads, [&](size_t t, const char* bytes, int64_t count) {
        CHECK_EQ(count, static_cast<int64_t>(expected[t].size()));
        CHECK(same_memory(bytes, expected[t], call.tensors[t].x.dtype));
      });
    }
  });
}

// Positions that break every rule, in place too: values may be wrong, memory not.
TEST(survives_any_position) {
  repeat(1500, [](Random& random) {
    const RepackCall call(random, true);
    call.run(random, static_cast<int>(random.range(1, 4)), [](size_t, const char*, int64_t) { CHECK(true); });
  });
}

// A cache too large for the processor's own: rows are stored past it.
TEST(repacks_large_caches) {
  repeat(4 * slowdown, [](Random& random) {
    const int64_t heads = 2, n = 10000, columns = random.pick({128, 120}), kept = 9000;
    const RandomTensor x(random, DType::f32, {1, heads, n, columns}, Values::bits, Strides::contiguous);
    std::vector<int64_t> index;
    for (int64_t i = 0; i < kept; ++i) index.push_back(i + i / 10);
    cpu::KeptRows rows = {};
    rows.index = index.data();
    rows.per_head = kept;
    const Memory memory(heads * kept * columns * 4 + 64, Memory::heap);
    char* target = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
    const cpu::CacheTensor tensor = {x.view, 0, false, cpu::Placement::elsewhere, target};
    cpu::repack_rows(&tensor, 1, &rows, false, random.chance(50), 2);
    bool equal = true;
    for (int64_t r = 0; r < heads * kept; ++r) {
      const char* from = x.at((r / kept * n + index[r % kept]) * columns);
      equal = equal && std::memcmp(target + r * columns * 4, from, static_cast<size_t>(columns * 4)) == 0;
    }
    CHECK(equal);
  });
}

// Heads too long for one task: in place a later row may land where an earlier one lay, so one thread moves them all.
TEST(moves_long_heads_in_place) {
  repeat(20 * slowdown, [](Random& random) {
    const int64_t heads = 3, n = random.range(1500, 2500), columns = 64, kept = n - random.range(1, 300);
    const cpu::Placement placement = random.pick({cpu::Placement::in_heads, cpu::Placement::in_front});
    RandomTensor x(random, DType::f32, {1, heads, n, columns}, Values::bits, Strides::contiguous);
    const std::vector<char> before(x.memory.data(), x.memory.data() + x.memory.bytes());
    std::vector<int64_t> index(static_cast<size_t>(n));
    for (int64_t i = 0; i < n; ++i) index[i] = i;
    while (static_cast<int64_t>(index.size()) > kept) index.erase(index.begin() + random.range(0, 50));
    cpu::KeptRows rows = {};
    rows.index = index.data();
    rows.per_head = kept;
    const cpu::CacheTensor tensor = {x.view, 0, false, placement, x.view.data};
    cpu::repack_rows(&tensor, 1, &rows, false, false, static_cast<int>(random.range(2, 4)));
    bool equal = true;
    const int64_t row = columns * 4;
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < kept; ++i) {
        const int64_t at = placement == cpu::Placement::in_heads ? h * n + i : h * kept + i;
        const char* from = before.data() + (h * n + index[i]) * row;
        equal = equal && std::memcmp(x.memory.data() + at * row, from, static_cast<size_t>(row)) == 0;
      }
    }
    CHECK(equal);
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
