#include "paged_calls.h"

namespace cacovid::test {
namespace {

// Slot of a row of a sequence, counted through all blocks, or -1.
int64_t naive_slot(const PagedCall& call, const std::vector<int32_t>& table, int64_t width, int64_t b, int64_t row) {
  if (row < 0 || row >= width * call.block_size) return -1;
  const int64_t id = table[b * width + row / call.block_size];
  return id >= 0 && id < call.blocks ? id * call.block_size + row % call.block_size : -1;
}
int64_t naive_source(const PagedCall& call, int64_t b, int64_t position) {
  return position < call.lens[b] ? naive_slot(call, call.table, call.width, b, position) : -1;
}
int64_t naive_target(const PagedCall& call, int64_t b, int64_t row) {
  return call.in_place ? naive_slot(call, call.table, call.width, b, row)
                       : naive_slot(call, call.out_table, call.out_width, b, row);
}

const int64_t* naive_list(const cpu::KeptRows& k, int64_t b, int64_t h) {
  return k.index + (b * k.batch_step + h * k.head_step) * k.per_head;
}

// What the tensor's memory must hold afterwards.
std::vector<char> naive_memory(const PagedCall& call, size_t t) {
  const cpu::PagedTensor& tensor = call.tensors[t];
  const RandomTensor& x = call.caches[t];
  const cpu::KeptRows& k = call.lists[tensor.kept].rows;
  const int64_t columns = tensor.x.sizes[3], item = item_size(tensor.x.dtype);
  std::vector<char> memory(x.memory.data(), x.memory.data() + x.memory.bytes());
  for (int64_t b = 0; b < call.batch; ++b) {
    for (int64_t h = 0; h < call.heads; ++h) {
      for (int64_t i = 0; i < k.per_head; ++i) {
        const int64_t position = naive_list(k, b, h)[i];
        const int64_t from = naive_source(call, b, position), to = naive_target(call, b, i);
        if (position == -1 || to < 0) continue;
        const int64_t angles = ((b * k.table_batch_step + h * k.table_head_step) * k.per_head + i) * k.half;
        bool turned = false;
        for (int64_t j = angles; j < angles + k.half; ++j) turned = turned || k.cos[j] != 1 || k.sin[j] != 0;
        if (call.in_place && from >= 0 && position == i && !(tensor.rotated && turned)) continue;
        std::vector<char> row;
        if (from < 0) row.resize(static_cast<size_t>(columns * item));
        if (from >= 0) naive_row(x, from * call.heads + h, k, tensor.rotated, k.cos + angles, k.sin + angles, row);
        for (int64_t c = 0; c < columns; ++c) {
          const int64_t at = x.at((to * call.heads + h) * columns + c) - x.memory.data();
          std::copy(row.begin() + c * item, row.begin() + (c + 1) * item, memory.begin() + at);
        }
      }
    }
  }
  return memory;
}

// The tables that must come back, in the order of PagedCall::run.
std::vector<int32_t> naive_tables(const PagedCall& call) {
  std::vector<int32_t> tables, lens, freed, num_freed, status;
  for (int64_t b = 0; b < call.batch; ++b) {
    int32_t rows = 0, bits = 0;
    for (int64_t i = 0; i < call.per_head; ++i) rows += naive_list(call.lists[0].rows, b, 0)[i] != -1;
    for (const PagedCall::List& list : call.lists) {
      for (int64_t h = 0; h < call.heads; ++h) {
        for (int64_t i = 0; i < call.per_head; ++i) {
          const int64_t position = naive_list(list.rows, b, h)[i];
          const bool inside = naive_source(call, b, position) >= 0 && naive_target(call, b, i) >= 0;
          if (position != -1 && !inside) bits = status_out_of_bounds;
        }
      }
    }
    const std::vector<int32_t>& now = call.in_place ? call.table : call.out_table;
    const int64_t now_width = call.in_place ? call.width : call.out_width;
    for (int64_t l = 0; l < call.columns(); ++l) {
      tables.push_back(l * call.block_size < rows ? now[b * now_width + l] : -1);
    }
    const size_t behind = freed.size() + static_cast<size_t>(call.width);
    int32_t gone = 0;
    for (int64_t l = 0; l < call.width; ++l) {
      const bool used = l * call.block_size < call.lens[b], stays = call.in_place && l * call.block_size < rows;
      if (!used || stays) continue;
      freed.push_back(call.table[b * call.width + l]);
      ++gone;
    }
    freed.resize(behind, -1);
    lens.push_back(rows);
    num_freed.push_back(gone);
    status.push_back(bits);
  }
  for (const std::vector<int32_t>* part : {&lens, &freed, &num_freed, &status}) {
    tables.insert(tables.end(), part->begin(), part->end());
  }
  return tables;
}

TEST(repacks_pages_as_the_naive_implementation) {
  repeat(2500, [](Random& random) {
    const PagedCall call(random, random.chance(40), false);
    std::vector<std::vector<char>> expected;
    for (size_t t = 0; t < call.tensors.size(); ++t) expected.push_back(naive_memory(call, t));
    const std::vector<int32_t> tables = naive_tables(call);
    for (const int threads : {1, 2, 3, 8}) {
      const std::vector<int32_t> found = call.run(random, threads, [&](size_t t, const char* bytes, int64_t count) {
        CHECK_EQ(count, static_cast<int64_t>(expected[t].size()));
        CHECK(same_memory(bytes, expected[t], call.tensors[t].x.dtype));
      });
      CHECK(found == tables);
    }
  });
}

// Positions in any order and out of range, and tables that name blocks twice: values may be wrong, memory not.
TEST(survives_any_position_and_table) {
  repeat(1500, [](Random& random) {
    PagedCall call(random, true, true);
    const bool twice = random.chance(50);
    for (int32_t& id : call.table) {
      if (twice && random.chance(50)) id = static_cast<int32_t>(random.range(0, call.blocks - 1));
    }
    const int threads = twice ? 1 : static_cast<int>(random.range(1, 4));  // threads would race for a block
    call.run(random, threads, [](size_t, const char*, int64_t) { CHECK(true); });
  });
}

// Two sequences begin with the same blocks, whose rows all stay: nobody writes them, so that threads may share them.
TEST(shared_prefixes_are_not_written) {
  repeat(100, [](Random& random) {
    const int64_t size = random.range(1, 8), prefix = random.range(1, 4), width = prefix + 2, blocks = prefix + 4;
    std::vector<int32_t> table;
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t l = 0; l < width; ++l) table.push_back(static_cast<int32_t>(l < prefix ? l : l + 2 * b));
    }
    const std::vector<int32_t> lens(2, static_cast<int32_t>(width * size));
    RandomTensor x(random, DType::f32, {blocks, size, 2, 48}, Values::bits, Strides::contiguous);
    const std::vector<char> before(x.memory.data(), x.memory.data() + x.memory.bytes());
    std::vector<int64_t> index;
    for (int64_t i = 0; i < width * size; ++i) {
      if (i < prefix * size || random.chance(50)) index.push_back(i);
    }
    cpu::KeptRows rows = {};
    rows.index = index.data();
    rows.per_head = static_cast<int64_t>(index.size());
    const cpu::PagedTensor tensor = {x.view, 0, false};
    const cpu::PagedSequences sequences = {2, blocks, size, table.data(), lens.data(), nullptr, width, width};
    const Output<int32_t> new_table(random, 2 * ((rows.per_head + size - 1) / size)), new_lens(random, 2),
        freed(random, 2 * width), num_freed(random, 2), status(random, 2);
    cpu::repack_pages(&tensor, 1, &rows, 1, sequences, static_cast<int>(random.range(1, 4)),
                      {new_table, new_lens, freed, num_freed, status});
    CHECK(std::equal(before.begin(), before.begin() + prefix * size * 2 * 48 * 4, x.memory.data()));
    CHECK(status.equals({0, 0}));
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
