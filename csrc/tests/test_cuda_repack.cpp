// Compaction of caches as CUDA kernels, on the machine of simt/: the bytes of the CPU engine, in memory closed to the
// host.
#include "cacovid/cuda.h"
#include "device_list.h"
#include "repack_calls.h"

namespace cacovid::test {
namespace {

// Runs the call on the device; hands the bytes of every result to `use(tensor, bytes, count)`.
template <class Use>
void run_on_device(const RepackCall& call, Use use) {
  std::vector<DeviceList> lists;
  std::vector<cpu::KeptRows> rows;
  for (const KeptCall& k : call.kept) {
    lists.emplace_back(k.rows, k.index, k.bounds, k.cos, k.sin);
    rows.push_back(lists.back().rows);
  }
  std::vector<DeviceTensor> caches;
  std::vector<DeviceBytes> outs;
  std::vector<cpu::CacheTensor> tensors = call.tensors;
  for (size_t t = 0; t < tensors.size(); ++t) {
    cpu::CacheTensor& tensor = tensors[t];
    caches.emplace_back(call.caches[t]);
    tensor.x.data = tensor.target = caches[t].view.data;
    const bool elsewhere = tensor.placement == cpu::Placement::elsewhere;
    outs.emplace_back(elsewhere ? call.rows_of(tensor) * tensor.x.sizes[3] * item_size(tensor.x.dtype) : 0);
    if (elsewhere) tensor.target = outs.back().as();
  }
  CHECK_EQ(cuda::repack_rows(tensors.data(), static_cast<int64_t>(tensors.size()), rows.data(), call.zero_tail, {}), 0);
  for (size_t t = 0; t < tensors.size(); ++t) {
    if (tensors[t].placement == cpu::Placement::elsewhere) {
      use(t, outs[t].read(), 0);
    } else {
      use(t, caches[t].memory.read(),
          static_cast<size_t>(static_cast<char*>(caches[t].view.data) - caches[t].memory.as<char>()));
    }
  }
}

void check(Random& random, const RepackCall& call) {
  std::vector<std::vector<char>> expected;
  call.run(random, 1, [&](size_t, const char* bytes, int64_t count) { expected.emplace_back(bytes, bytes + count); });
  run_on_device(call, [&](size_t t, const std::vector<char>& found, size_t shift) {
    CHECK_EQ(found.size(), shift + expected[t].size());
    CHECK(same_memory(found.data() + shift, expected[t], call.tensors[t].x.dtype));
  });
}

TEST(repacks_as_the_engine) {
  repeat(600, [](Random& random) { check(random, RepackCall(random, false)); });
}

#if !defined(__SANITIZE_THREAD__)  // rows that do not ascend race for memory
TEST(survives_any_position) {
  repeat(400, [](Random& random) {
    run_on_device(RepackCall(random, true), [](size_t, const std::vector<char>&, size_t) { CHECK(true); });
  });
}
#endif

// One long head after another, of which a step moves a part.
TEST(moves_long_heads_in_place) {
  repeat(12, [](Random& random) {
    RepackCall call(random, false);
    call.batch = 1;
    call.heads = 2;
    call.n = random.range(150, 400);
    call.kept.clear();
    call.caches.clear();
    call.tensors.clear();
    call.kept.emplace_back(random, 1, 2, call.n, false, true, false);
    const int64_t half = call.kept[0].rows.half;
    for (int t = 0; t < 3; ++t) {
      const DType dtype = t == 0 ? DType::bf16 : DType::f32;
      call.caches.emplace_back(random, dtype, std::vector<int64_t>{1, 2, call.n, 2 * half + random.range(1, 40)},
                               Values::plain, Strides::contiguous);
      const auto placement = random.pick({cpu::Placement::in_heads, cpu::Placement::in_front});
      call.tensors.push_back({call.caches.back().view, 0, t == 0, placement, call.caches.back().view.data});
    }
    check(random, call);
  });
}

// All layers of a model in one launch: keys that are turned, values that are not, each layer with a list of its own.
TEST(layers_take_one_launch) {
  Random random(1);
  const auto launches = [&](int64_t layers, bool in_place, bool own_lists) {
    RepackCall call(random, false);
    call.batch = call.heads = 1;
    call.n = 5;
    call.kept.clear();
    call.caches.clear();
    call.tensors.clear();
    for (int64_t l = 0; l < (own_lists ? layers : 1); ++l) {
      call.kept.emplace_back(random, 1, 1, 5, false, true, false);
      KeptCall& k = call.kept.back();
      k.index = {1, 3};
      k.cos.assign(4, 0.6f);
      k.sin.assign(4, 0.8f);
      k.rows.index = k.index.data();
      k.rows.cos = k.cos.data();
      k.rows.sin = k.sin.data();
      k.rows.per_head = k.rows.half = 2;
    }
    for (int64_t t = 0; t < 2 * layers; ++t) {
      call.caches.emplace_back(random, DType::bf16, std::vector<int64_t>{1, 1, 5, 8}, Values::plain,
                               Strides::contiguous);
      const auto placement = in_place ? cpu::Placement::in_front : cpu::Placement::elsewhere;
      const int64_t list = own_lists ? t % layers : 0;
      call.tensors.push_back({call.caches.back().view, list, t < layers, placement, call.caches.back().view.data});
    }
    for (RandomTensor& x : call.caches) {  // equal alignment, or they were of several shapes
      x.memory = Memory(x.memory.bytes(), Memory::heap);
      std::memset(x.memory.data(), 0, static_cast<size_t>(x.memory.bytes()));
    }
    for (size_t t = 0; t < call.tensors.size(); ++t) {
      call.tensors[t].x.data = call.tensors[t].target = call.caches[t].view.data = call.caches[t].memory.data();
    }
    const int64_t before = simt::launches();
    check(random, call);
    return simt::launches() - before;
  };
  CHECK_EQ(launches(28, false, false), 1);
  CHECK_EQ(launches(28, true, true), 1);
  CHECK_EQ(launches(64, false, false), 1);
  CHECK_EQ(launches(64, true, true), 1);
  CHECK_EQ(launches(112, true, false), 1);
  CHECK_EQ(launches(113, true, false), 2);
  CHECK_EQ(launches(80, false, true), 2);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
