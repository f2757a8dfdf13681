// What the memory system wants to be told about large results.
#pragma once

#include <cstdint>

namespace cacovid::cpu {

// Whether a result of this size should bypass the caches: it would push out what others still need, and the
// line that a store has to read first costs a third of a copy's traffic.
bool worth_streaming(int64_t bytes);

}  // namespace cacovid::cpu
