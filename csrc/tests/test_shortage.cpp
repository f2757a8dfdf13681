// Every allocation of every op fails once: the caller gets std::bad_alloc or the right answer, and the next call,
// with memory again, the right answer.
#include <cstddef>
#include <new>
#include <thread>

#include "op_calls.h"

namespace {

std::atomic<int64_t> left{-1};  // allocations until the one that fails; negative: none does

void* allocate(size_t bytes, size_t alignment) {
  if (left.load(std::memory_order_relaxed) >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
  void* memory = alignment > alignof(std::max_align_t)
                     ? std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment)
                     : std::malloc(bytes > 0 ? bytes : 1);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return allocate(bytes, 1); }
void* operator new[](size_t bytes) { return allocate(bytes, 1); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, static_cast<size_t>(alignment)); }
void* operator new[](size_t bytes, std::align_val_t alignment) {
  return allocate(bytes, static_cast<size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

namespace cacovid::test {
namespace {

// In a thread of its own, which has no scratch yet; its last call has all the memory that it wants.
TEST(ops_survive_a_lack_of_memory) {
  std::atomic<int64_t> refused{0};
  repeat(300, [&](Random& random) {
    const OpCall call = random_call(random);
    const uint64_t digest = call(1);
    bool plenty = false;
    for (int64_t allowed = 0; allowed < 60 && !plenty; ++allowed) {
      const int threads = static_cast<int>(random.range(1, 3));
      std::thread([&] {
        left = allowed;
        try {
          const uint64_t answer = call(threads);
          plenty = left.exchange(-1) >= 0;
          CHECK_EQ(answer, digest);
        } catch (const std::bad_alloc&) {
          left = -1;
          ++refused;
        }
        CHECK_EQ(call(threads), digest);
      }).join();
    }
  });
  CHECK(refused > 0);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
