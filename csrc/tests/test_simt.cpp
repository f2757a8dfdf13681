// The machine that stands in for a GPU computes what a GPU would.
#include "check.h"
#include "launch.cuh"

namespace cacovid::test {
namespace {

using cuda::shared_memory;

template <class Body>
void on_device(int64_t blocks, int threads, size_t shared_bytes, const Body& body) {
  simt::run(simt::Dim(static_cast<unsigned>(blocks)), simt::Dim(static_cast<unsigned>(threads)), shared_bytes, body);
}

struct Device {
  explicit Device(int64_t items) : items(items), data(static_cast<int*>(simt::device_alloc(sizeof(int) * items))) {}
  ~Device() { simt::device_free(data); }
  std::vector<int> read() const {
    std::vector<int> host(items);
    simt::copy_from_device(host.data(), data, sizeof(int) * items);
    return host;
  }
  int64_t items;
  int* data;
};

TEST(every_thread_runs_once) {
  Device out(3 * 70);
  int* data = out.data;
  on_device(3, 70, 0, [=] { data[blockIdx.x * 70 + threadIdx.x] = static_cast<int>(blockIdx.x * 1000 + threadIdx.x); });
  const std::vector<int> host = out.read();
  for (int i = 0; i < 210; ++i) CHECK_EQ(host[i], i / 70 * 1000 + i % 70);
}

TEST(launches_are_counted) {
  const int64_t before = simt::launches();
  for (int i = 0; i < 3; ++i) on_device(2, 32, 0, [] {});
  CHECK_EQ(simt::launches() - before, 3);
}

TEST(warp_operations) {
  Device out(6 * 32);
  int* data = out.data;
  on_device(1, 32, 0, [=] {
    const unsigned all = 0xffffffffu;
    const int lane = static_cast<int>(threadIdx.x);
    int prefix = lane;
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(all, prefix, static_cast<unsigned>(step));
      if (lane >= step) prefix += before;
    }
    data[lane] = prefix;
    data[32 + lane] = static_cast<int>(__ballot_sync(all, lane % 3 == 0));
    data[64 + lane] = __reduce_add_sync(all, lane);
    data[96 + lane] = static_cast<int>(__reduce_max_sync(all, static_cast<unsigned>(lane * 7 % 32)));
    data[128 + lane] = __shfl_xor_sync(all, lane, 5);
    data[160 + lane] = 0;
    if (lane < 8) data[160 + lane] = __shfl_sync(0xffu, lane * 10, 3);
  });
  const std::vector<int> host = out.read();
  for (int i = 0; i < 32; ++i) {
    CHECK_EQ(host[i], i * (i + 1) / 2);
    CHECK_EQ(host[32 + i], 0x49249249);
    CHECK_EQ(host[64 + i], 496);
    CHECK_EQ(host[96 + i], 31);
    CHECK_EQ(host[128 + i], i ^ 5);
    CHECK_EQ(host[160 + i], i < 8 ? 30 : 0);
  }
}

TEST(shared_memory_and_barriers) {
  Device out(4 * 256);
  int* data = out.data;
  on_device(4, 256, 256 * sizeof(int), [=] {
    int* shared = shared_memory<int>();
    const int i = static_cast<int>(threadIdx.x);
    shared[i] = i;
    __syncthreads();
    const int other = shared[255 - i];
    __syncthreads();
    shared[i] = other * 2;
    __syncthreads();
    data[blockIdx.x * 256 + threadIdx.x] = shared[(i + 1) % 256] + __syncthreads_count(i < 10);
  });
  const std::vector<int> host = out.read();
  for (int i = 0; i < 1024; ++i) CHECK_EQ(host[i], 2 * (255 - (i % 256 + 1) % 256) + 10);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
