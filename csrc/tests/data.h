// Random inputs in memory that ends where the data ends, so that every read or write beyond is noticed.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "cacovid/tensor.h"
#include "check.h"

namespace cacovid::test {

// Numbers from SplitMix64, the same on every machine, or first from the bytes of a fuzzer.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  Random(const uint8_t* bytes, size_t size) : state_(size), bytes_(bytes), left_(size) {}

  uint64_t next() {
    if (left_ > 0) {
      uint64_t word = 0;
      const size_t taken = left_ < 4 ? left_ : 4;
      std::memcpy(&word, bytes_, taken);
      bytes_ += taken;
      left_ -= taken;
      return word << 32 | word;
    }
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  int64_t range(int64_t low, int64_t high) {  // both included
    return low + static_cast<int64_t>(next() % static_cast<uint64_t>(high - low + 1));
  }
  bool chance(int percent) { return range(1, 100) <= percent; }
  double real() { return static_cast<double>(next() >> 11) * 0x1p-53; }  // [0, 1)
  template <class T>
  T pick(std::initializer_list<T> choices) {
    return choices.begin()[range(0, static_cast<int64_t>(choices.size()) - 1)];
  }
  // Mostly small, sometimes up to `high`: both ends of a size's range are met.
  int64_t size(int64_t low, int64_t high) {
    const int64_t reach =
        low + static_cast<int64_t>(std::ceil(static_cast<double>(high - low) * std::pow(real(), 2.0)));
    return range(low, reach);
  }
  int64_t some(int64_t high) { return chance(4) ? 0 : range(1, high); }  // rarely none

 private:
  uint64_t state_;
  const uint8_t* bytes_ = nullptr;
  size_t left_ = 0;
};

// Runs `body(random)` for `count` seeds, fewer under a sanitizer. CACOVID_TEST_SEED chooses other ones.
template <class Body>
void repeat(int64_t count, Body body) {
  const char* first = std::getenv("CACOVID_TEST_SEED");
  const uint64_t seed = first ? std::strtoull(first, nullptr, 10) : 1;
  for (int64_t i = 0; i < (count + slowdown - 1) / slowdown; ++i) {
    current_seed = seed + static_cast<uint64_t>(i);
    Random random(current_seed);
    body(random);
  }
}

// Memory of exactly so many bytes: on the heap, where ASan watches its ends, or against a page without access,
// which also stops the loads that no sanitizer sees.
class Memory {
 public:
  enum Kind { heap, page_after, page_before };

  Memory() = default;
  Memory(int64_t bytes, Kind kind, int64_t shift = 0) : bytes_(bytes), kind_(kind) {
    if (kind == heap) {
      base_ = static_cast<char*>(std::malloc(static_cast<size_t>(shift + bytes)));
      data_ = base_ + shift;
      return;
    }
    const int64_t page = sysconf(_SC_PAGESIZE);
    mapped_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, static_cast<size_t>(mapped_), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(kind == page_after ? base_ + mapped_ - page : base_, static_cast<size_t>(page), PROT_NONE);
    data_ = kind == page_after ? base_ + mapped_ - page - bytes : base_ + page;
  }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }
  ~Memory() { kind_ == heap ? std::free(base_) : static_cast<void>(munmap(base_, static_cast<size_t>(mapped_))); }

  char* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void swap(Memory& other) {
    std::swap(base_, other.base_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    std::swap(mapped_, other.mapped_);
    std::swap(kind_, other.kind_);
  }
  char *base_ = nullptr, *data_ = nullptr;
  int64_t bytes_ = 0, mapped_ = 0;
  Kind kind_ = heap;
};

inline Memory random_memory(Random& random, int64_t bytes, int64_t item) {
  const Memory::Kind kind = random.chance(70)   ? Memory::heap
                            : random.chance(75) ? Memory::page_after
                                                : Memory::page_before;
  return Memory(bytes, kind, kind == Memory::heap && random.chance(40) ? item * random.range(1, 7) : 0);
}

// An output of exactly `count` items, filled with garbage.
template <class T>
class Output {
 public:
  // `alignment`: of the elements, where T is only their bytes.
  Output(Random& random, int64_t count, int64_t alignment = sizeof(T)) : count_(count) {
    memory_ = random_memory(random, count * static_cast<int64_t>(sizeof(T)), alignment);
    if (count > 0)
      std::memset(memory_.data(), static_cast<int>(random.next() & 255), sizeof(T) * static_cast<size_t>(count));
  }
  operator T*() const { return data(); }
  T* data() const { return reinterpret_cast<T*>(memory_.data()); }
  int64_t size() const { return count_; }
  bool equals(const std::vector<T>& expected) const {
    return static_cast<int64_t>(expected.size()) == count_ && std::equal(expected.begin(), expected.end(), data());
  }

 private:
  Memory memory_;
  int64_t count_;
};

inline uint32_t float_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline bool same_float(float a, float b) { return float_bits(a) == float_bits(b) || (a != a && b != b); }

// Values by arithmetic on the format's fields, to check the core's bit tricks against.
inline double value_of_half(uint16_t bits, DType dtype) {
  const int fraction_bits = dtype == DType::bf16 ? 7 : 10, bias = dtype == DType::bf16 ? 127 : 15;
  const int fraction = bits & ((1 << fraction_bits) - 1);
  const int top = 2 * bias + 1, exponent = (bits >> fraction_bits) & top;
  double x = exponent == 0 ? std::ldexp(fraction, 1 - bias - fraction_bits)
                           : std::ldexp(fraction + (1 << fraction_bits), exponent - bias - fraction_bits);
  if (exponent == top) x = fraction ? std::nan("") : std::numeric_limits<double>::infinity();
  return bits & 0x8000 ? -x : x;
}

template <class T>
T load(const char* at) {
  T x;
  std::memcpy(&x, at, sizeof x);
  return x;
}

inline double value_of(const char* at, DType dtype) {
  if (dtype == DType::f64) return load<double>(at);
  if (dtype == DType::f32) return static_cast<double>(load<float>(at));
  return value_of_half(load<uint16_t>(at), dtype);
}

// A float32 rounded to nearest even into a format's bytes, by scaling to whole units in the last place.
inline void store_value(char* at, DType dtype, double x) {
  if (dtype == DType::f64) {
    std::memcpy(at, &x, sizeof x);
    return;
  }
  const float f = static_cast<float>(x);
  if (dtype == DType::f32) {
    std::memcpy(at, &f, sizeof f);
    return;
  }
  const int fraction_bits = dtype == DType::bf16 ? 7 : 10, bias = dtype == DType::bf16 ? 127 : 15;
  uint32_t bits = static_cast<uint32_t>(2 * bias + 1) << fraction_bits;  // infinity
  const double magnitude = std::fabs(x);
  if (x != x) {
    bits |= 1u << (fraction_bits - 1);
  } else if (magnitude == 0.0) {
    bits = 0;
  } else if (std::isfinite(magnitude)) {
    const int exponent = std::max(std::ilogb(magnitude), 1 - bias);
    const double units = std::nearbyint(std::ldexp(magnitude, fraction_bits - exponent));
    const uint32_t rounded =
        static_cast<uint32_t>(units) + (static_cast<uint32_t>(exponent + bias - 1) << fraction_bits);
    bits = std::min(bits, rounded);
  }
  bits |= std::signbit(x) && x == x ? 0x8000u : 0u;
  const uint16_t half = static_cast<uint16_t>(bits);
  std::memcpy(at, &half, sizeof half);
}

// How a tensor's numbers are drawn.
enum class Values { plain, ties, odd, bits };

inline void draw_value(Random& random, char* at, DType dtype, Values values) {
  const int64_t item = item_size(dtype);
  if (values == Values::bits || !is_floating(dtype)) {
    const uint64_t word = random.next();
    std::memcpy(at, &word, static_cast<size_t>(item));
    return;
  }
  double x = (random.real() + random.real() + random.real() - 1.5) * 2.0;
  if (values == Values::ties) x = static_cast<double>(random.range(-2, 2)) * 0.5 * (random.chance(50) ? 1.0 : -1.0);
  if (values == Values::odd && random.chance(30)) {
    constexpr double inf = std::numeric_limits<double>::infinity();
    x = random.pick({inf, -inf, std::nan(""), -0.0, 0.0, 1e-41, -3e-45, 3.4e38, -3.4e38, 6e-8, 65504.0});
  }
  store_value(at, dtype, x);
}

// How a tensor lies in memory: `distinct` permutes and spreads its axes, `any` also repeats some with stride 0.
enum class Strides { contiguous, distinct, any };

// A tensor with memory of its own.
struct RandomTensor {
  Tensor view;
  Memory memory;

  RandomTensor() = default;
  RandomTensor(Random& random, DType dtype, const std::vector<int64_t>& sizes, Values values,
               Strides strides = Strides::any) {
    const int ndim = static_cast<int>(sizes.size());
    const int64_t item = item_size(dtype);
    view.dtype = dtype;
    view.ndim = ndim;
    std::vector<int> order;  // axes from the innermost in memory outwards
    for (int d = ndim - 1; d >= 0; --d) order.push_back(d);
    if (random.chance(40)) strides = Strides::contiguous;
    const bool spread = strides != Strides::contiguous;
    if (spread && random.chance(50)) {
      for (int d = ndim - 1; d > 0; --d) std::swap(order[d], order[random.range(0, d)]);
    }
    int64_t stride = spread && random.chance(40) ? random.range(2, 5) : 1, last = 0, numel = 1;
    for (const int d : order) {
      view.sizes[d] = sizes[d];
      view.strides[d] = strides == Strides::any && random.chance(8) ? 0 : stride;
      if (view.strides[d] > 0) stride = std::max<int64_t>(stride * sizes[d], 1);
      if (spread && random.chance(30)) stride += random.range(1, 3);
      last += (sizes[d] - 1) * view.strides[d];
      numel *= sizes[d];
    }
    memory = random_memory(random, numel > 0 ? (last + 1) * item : 0, item);
    for (int64_t i = 0; i < memory.bytes() / item; ++i) draw_value(random, memory.data() + i * item, dtype, values);
    view.data = numel > 0 || random.chance(50) ? memory.data() : nullptr;
  }

  // Address of element `flat` in row-major order.
  const char* at(int64_t flat) const {
    int64_t offset = 0;
    for (int d = view.ndim - 1; d >= 0; --d) {
      offset += flat % view.sizes[d] * view.strides[d];
      flat /= view.sizes[d];
    }
    return memory.data() + offset * item_size(view.dtype);
  }
  double value(int64_t flat) const { return value_of(at(flat), view.dtype); }
};

inline DType random_score_type(Random& random) { return random.pick({DType::f32, DType::bf16, DType::f16}); }
inline Values random_values(Random& random) {
  return random.pick({Values::plain, Values::plain, Values::ties, Values::odd, Values::bits});
}

}  // namespace cacovid::test
