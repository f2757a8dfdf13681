// A small pool of std::threads. OpenMP is not used: its runtime hangs in a child after fork().
#pragma once

#include <cstdint>
#include <functional>

namespace cacovid::cpu {

// Calls body(first, last) over disjoint ranges that cover [0, count), each of at least `grain` items but
// the last, on up to `threads` threads, the caller's among them. Returns when all are done. Nested or
// concurrent calls run on the caller alone. The ranges never depend on timing.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace cacovid::cpu
