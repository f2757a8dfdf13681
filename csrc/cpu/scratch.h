// Working memory of one thread, kept between calls.
#pragma once

#include <cstdint>
#include <memory>

namespace cacovid::cpu {

// Under AddressSanitizer every call gets a buffer of its own size: using a row beyond its end, or after the next
// call with the same Tag, is then seen.
#if defined(__SANITIZE_ADDRESS__)
constexpr bool keep_scratch = false;
#else
constexpr bool keep_scratch = true;
#endif

// A 64-byte aligned buffer of at least `count` items, valid until the thread's next call with the same Tag.
template <class Tag, class T>
T* scratch(int64_t count) {
  struct Free {
    void operator()(T* p) const { ::operator delete[](p, std::align_val_t(64)); }
  };
  thread_local std::unique_ptr<T[], Free> buffer;
  thread_local int64_t capacity = 0;
  if (count > capacity || !keep_scratch) {
    buffer.reset(static_cast<T*>(::operator new[](static_cast<size_t>(count) * sizeof(T), std::align_val_t(64))));
    capacity = count;
  }
  return buffer.get();
}

}  // namespace cacovid::cpu
