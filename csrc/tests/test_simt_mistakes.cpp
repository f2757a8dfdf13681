// The machine that stands in for a GPU notices what a GPU would not forgive. Each mistake is made in a process of its
// own; the parent launches nothing, for ThreadSanitizer says little behind a fork of a process with fibers.
#include <sys/wait.h>
#include <unistd.h>

#include "check.h"
#include "launch.cuh"

namespace cacovid::test {
namespace {

using cuda::shared_memory;

template <class Body>
void on_device(int64_t blocks, int threads, size_t shared_bytes, const Body& body) {
  simt::run(simt::Dim(static_cast<unsigned>(blocks)), simt::Dim(static_cast<unsigned>(threads)), shared_bytes, body);
}

// Whether a process of its own ends other than by returning.
template <class Body>
bool is_caught(const Body& body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    std::freopen("/dev/null", "w", stderr);
    body();
    std::exit(0);  // where ThreadSanitizer says what it found
  }
  int status = 0;
  waitpid(child, &status, 0);
  return !(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(mistakes_of_warps_are_caught) {
  CHECK(is_caught([] {
    on_device(1, 32, 0, [] {
      if (threadIdx.x < 16) __syncwarp();
    });
  }));
  CHECK(is_caught([] { on_device(1, 32, 0, [] { __shfl_sync(0xffffu, 1, 20); }); }));
  CHECK(is_caught([] {
    on_device(1, 32, 0, [] {
      if (threadIdx.x < 8) __shfl_sync(0xffu, 1, 20);
    });
  }));
  CHECK(is_caught([] {
    on_device(1, 64, 0, [] {
      if (threadIdx.x < 40) __syncthreads();
    });
  }));
  CHECK(is_caught([] {
    on_device(1, 32, 0, [] { threadIdx.x % 2 == 0 ? __syncwarp() : static_cast<void>(__ballot_sync(0xffffffffu, 1)); });
  }));
  CHECK(!is_caught([] { on_device(1, 32, 0, [] { __syncwarp(threadIdx.x < 16 ? 0xffffu : 0xffff0000u); }); }));
}

#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // these have words of their own for a fault
TEST(memory_of_the_device_is_closed_to_the_host) {
  int* data = static_cast<int*>(simt::device_alloc(10 * sizeof(int)));
  CHECK(is_caught([=] { data[0] = 1; }));
  CHECK(!is_caught([=] { on_device(1, 1, 0, [=] { data[9] = 1; }); }));
  CHECK(is_caught([=] { on_device(1, 1, 0, [=] { data[12] = 1; }); }));
  simt::device_free(data);
}
#endif

#if defined(__SANITIZE_ADDRESS__)
TEST(shared_memory_has_its_size) {
  const auto write = [](int at) { return [=] { on_device(1, 32, 64, [=] { shared_memory<char>()[at] = 1; }); }; };
  CHECK(!is_caught(write(63)));
  CHECK(is_caught(write(64)));
}
#endif

#if defined(__SANITIZE_THREAD__)
// Threads of a warp pass a value on through shared memory.
void pass_on(bool ordered) {
  on_device(1, 32, 32 * sizeof(int), [=] {
    int* shared = shared_memory<int>();
    shared[threadIdx.x] = 1;
    if (ordered) {
      __syncwarp();
    } else {
      __ballot_sync(0xffffffffu, 1);  // waits, but orders no memory
    }
    if (shared[31 - threadIdx.x] == 2) std::abort();
  });
}

void write_by_blocks(int64_t spread) {
  std::vector<int> memory(64);
  int* data = memory.data();
  on_device(2, 32, 0, [=] { data[blockIdx.x * spread + threadIdx.x] = 1; });
}

TEST(races_are_caught) {
  CHECK(is_caught([] { pass_on(false); }));
  CHECK(!is_caught([] { pass_on(true); }));
  CHECK(is_caught([] { write_by_blocks(31); }));
  CHECK(!is_caught([] { write_by_blocks(32); }));
  // What one launch wrote the next may read.
  CHECK(!is_caught([] {
    std::vector<int> memory(64);
    int* data = memory.data();
    for (int i = 0; i < 3; ++i) on_device(1, 64, 64, [=] { data[(threadIdx.x + 7 * i) % 64] += 1; });
  }));
}
#endif

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
