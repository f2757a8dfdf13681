// Compaction of paged caches as CUDA kernels, on the machine of simt/: the bytes and tables of the CPU engine, in
// memory closed to the host.
#include "cacovid/cuda.h"
#include "device_list.h"
#include "paged_calls.h"

namespace cacovid::test {
namespace {

template <class T>
DeviceBytes to_device(const std::vector<T>& items) {
  return DeviceBytes(static_cast<int64_t>(items.size() * sizeof(T)), items.data());
}

// Runs the call on the device; hands the bytes of every tensor to `use(tensor, bytes, shift)` and returns the tables,
// in the order of PagedCall::run.
template <class Use>
std::vector<int32_t> run_on_device(const PagedCall& call, Use use) {
  std::vector<DeviceList> lists;
  std::vector<cpu::KeptRows> rows;
  for (const PagedCall::List& list : call.lists) {
    lists.emplace_back(list.rows, list.index, std::vector<int32_t>{}, list.cos, list.sin);
    rows.push_back(lists.back().rows);
  }
  std::vector<DeviceTensor> caches;
  std::vector<cpu::PagedTensor> tensors = call.tensors;
  for (size_t t = 0; t < tensors.size(); ++t) {
    caches.emplace_back(call.caches[t]);
    tensors[t].x.data = caches[t].view.data;
  }
  const DeviceBytes table = to_device(call.table), out_table = to_device(call.out_table), lens = to_device(call.lens);
  const cpu::PagedSequences sequences = {call.batch,         call.blocks,
                                         call.block_size,    table.as<int32_t>(),
                                         lens.as<int32_t>(), call.in_place ? nullptr : out_table.as<int32_t>(),
                                         call.width,         call.in_place ? call.width : call.out_width};
  const DeviceBytes outs[] = {DeviceBytes(call.batch * call.columns() * 4), DeviceBytes(call.batch * 4),
                              DeviceBytes(call.batch * call.width * 4), DeviceBytes(call.batch * 4),
                              DeviceBytes(call.batch * 4)};
  const cpu::PagedOutputs out = {outs[0].as<int32_t>(), outs[1].as<int32_t>(), outs[2].as<int32_t>(),
                                 outs[3].as<int32_t>(), outs[4].as<int32_t>()};
  CHECK_EQ(cuda::repack_pages(tensors.data(), static_cast<int64_t>(tensors.size()), rows.data(),
                              static_cast<int64_t>(rows.size()), sequences, out, {}),
           0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    use(t, caches[t].memory.read(),
        static_cast<size_t>(static_cast<char*>(caches[t].view.data) - caches[t].memory.as<char>()));
  }
  std::vector<int32_t> tables;
  for (const DeviceBytes& one : outs) {
    const std::vector<char> bytes = one.read();
    const auto* items = reinterpret_cast<const int32_t*>(bytes.data());
    tables.insert(tables.end(), items, items + bytes.size() / 4);
  }
  return tables;
}

void check(Random& random, const PagedCall& call) {
  std::vector<std::vector<char>> expected;
  const std::vector<int32_t> tables = call.run(
      random, 1, [&](size_t, const char* bytes, int64_t count) { expected.emplace_back(bytes, bytes + count); });
  const std::vector<int32_t> found = run_on_device(call, [&](size_t t, const std::vector<char>& bytes, size_t shift) {
    CHECK_EQ(bytes.size(), shift + expected[t].size());
    CHECK(same_memory(bytes.data() + shift, expected[t], call.tensors[t].x.dtype));
  });
  CHECK(found == tables);
}

TEST(repacks_pages_as_the_engine) {
  repeat(500, [](Random& random) { check(random, PagedCall(random, random.chance(40), false)); });
}

#if !defined(__SANITIZE_THREAD__)  // rows that do not ascend, and blocks that occur twice, race for memory
TEST(survives_any_position_and_table) {
  repeat(400, [](Random& random) {
    PagedCall call(random, true, true);
    for (int32_t& id : call.table) {
      if (random.chance(40)) id = static_cast<int32_t>(random.range(0, call.blocks - 1));
    }
    run_on_device(call, [](size_t, const std::vector<char>&, size_t) { CHECK(true); });
  });
}
#endif

// Blocks of several steps, and sequences that begin with the same blocks, whose rows stay.
TEST(shared_prefixes_are_not_written) {
  repeat(20, [](Random& random) {
    PagedCall call(random, false, false);
    const int64_t prefix = random.range(1, 3), size = random.range(8, 20);
    call.batch = 2;
    call.heads = 2;
    call.in_place = true;
    call.width = call.out_width = prefix + 4;
    call.blocks = prefix + 8;
    call.block_size = size;
    call.table.clear();
    call.lens.assign(2, static_cast<int32_t>(call.width * size));
    for (int64_t b = 0; b < 2; ++b) {
      for (int64_t l = 0; l < call.width; ++l) call.table.push_back(static_cast<int32_t>(l < prefix ? l : l + 4 * b));
    }
    call.per_head = call.width * size - random.range(1, 2 * size);
    call.lists.clear();
    call.add_list(random, false);
    PagedCall::List& list = call.lists[0];
    list.rows.half = 6;
    for (size_t i = 0; i < list.index.size(); i += static_cast<size_t>(call.per_head)) {
      for (int64_t k = 0; k < call.per_head; ++k) {
        const int64_t skipped = k < prefix * size ? 0 : call.width * size - call.per_head;
        list.index[i + static_cast<size_t>(k)] = k + skipped;
      }
    }
    list.rows.table_batch_step = list.rows.table_head_step = 0;
    list.cos.assign(static_cast<size_t>(call.per_head * 6), 1.0f);
    list.sin.assign(static_cast<size_t>(call.per_head * 6), 0.0f);
    for (size_t j = static_cast<size_t>(prefix * size * 6); j < list.sin.size(); ++j) list.sin[j] = 0.5f;
    list.rows.cos = list.cos.data();
    list.rows.sin = list.sin.data();
    call.caches.clear();
    call.tensors.clear();
    for (int t = 0; t < 2; ++t) {
      call.caches.emplace_back(random, DType::bf16, std::vector<int64_t>{call.blocks, size, 2, 16}, Values::plain,
                               Strides::contiguous);
      call.tensors.push_back({call.caches.back().view, 0, t == 0});
    }
    check(random, call);
  });
}

// All layers of a model, each with a list of its own, and their tables.
TEST(layers_take_one_launch) {
  Random random(1);
  const auto launches = [&](int64_t layers) {
    PagedCall call(random, false, false);
    call.per_head = std::min<int64_t>(2, call.width * call.block_size);
    call.in_place = true;
    call.lists.clear();
    for (int64_t l = 0; l < layers; ++l) call.add_list(random, false);
    call.caches.clear();
    call.tensors.clear();
    for (int64_t t = 0; t < 2 * layers; ++t) {
      call.caches.emplace_back(random, DType::bf16, std::vector<int64_t>{call.blocks, call.block_size, call.heads, 8},
                               Values::plain, Strides::contiguous);
      RandomTensor& x = call.caches.back();
      x.memory = Memory(x.memory.bytes(), Memory::heap);  // equal alignment, or they were of several shapes
      std::memset(x.memory.data(), static_cast<int>(t), static_cast<size_t>(x.memory.bytes()));
      x.view.data = x.memory.data();
      call.tensors.push_back({x.view, t % layers, false});
    }
    const int64_t before = simt::launches();
    check(random, call);
    return simt::launches() - before;
  };
  CHECK_EQ(launches(28), 1);
  CHECK_EQ(launches(64), 1);
  CHECK_EQ(launches(90), 2);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
