#include "memory.h"

#include "cacovid/ops.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace cacovid::cpu {
namespace {

constexpr int64_t huge_page = int64_t{2} << 20;

// A quarter of a common last-level cache. What the system reports is no guide: a virtual machine shows the
// whole socket's.
constexpr int64_t streaming_bytes = int64_t{8} << 20;

}  // namespace

bool worth_streaming(int64_t bytes) { return bytes > streaming_bytes; }

void expect_writes(void* memory, int64_t bytes) {
#if defined(__linux__)
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + huge_page - 1) / huge_page * huge_page;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / huge_page * huge_page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory;
  (void)bytes;
#endif
}

}  // namespace cacovid::cpu
