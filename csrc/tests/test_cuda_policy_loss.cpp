// The policy loss as CUDA kernels, on the machine of simt/: the bits of the CPU engine, in memory closed to the host.
#include "cacovid/cuda.h"
#include "device.h"

namespace cacovid::test {
namespace {

int64_t words_of(int64_t tokens) { return (tokens + 31) / 32; }

template <class T>
std::vector<char> bytes_of(const std::vector<T>& x) {
  const char* first = reinterpret_cast<const char*>(x.data());
  return {first, first + x.size() * sizeof(T)};
}

TEST(masks_are_packed) {
  repeat(60, [](Random& random) {
    const int64_t rows = random.size(0, 4), n = random.size(0, 1200);
    const DType dtype = random.pick({DType::b8, DType::u8, DType::i16, DType::i32, DType::i64});
    const RandomTensor masks(random, dtype, {rows, n}, Values::bits);
    for (int64_t at = 0; at < masks.memory.bytes(); at += item_size(dtype)) {
      if (random.chance(60)) std::memset(masks.memory.data() + at, 0, static_cast<size_t>(item_size(dtype)));
    }
    const DeviceTensor there(masks);
    std::vector<int32_t> expected(static_cast<size_t>(rows * words_of(n)));
    cpu::pack_masks(masks.view, 1, expected.data());
    const DeviceBytes words(static_cast<int64_t>(expected.size()) * 4);
    CHECK_EQ(cuda::pack_masks(there.view, words.as<int32_t>(), {}), 0);
    CHECK(words.read() == bytes_of(expected));
  });
}

TEST(positions_are_packed) {
  repeat(60, [](Random& random) {
    const int64_t rows = random.size(0, 4), k = random.size(0, 200), n = random.size(1, 200);
    const RandomTensor indices(random, DType::i64, {rows, k}, Values::bits);
    for (int64_t at = 0; at < indices.memory.bytes(); at += 8) {
      const int64_t index = random.range(-2, n + 1);
      if (random.chance(90)) std::memcpy(indices.memory.data() + at, &index, sizeof index);
    }
    const DeviceTensor there(indices);
    std::vector<int32_t> expected(static_cast<size_t>(rows * words_of(n)));
    const DeviceBytes words(static_cast<int64_t>(expected.size()) * 4, expected.data());
    cpu::pack_indices(indices.view, n, 1, expected.data());
    CHECK_EQ(cuda::pack_indices(there.view, n, words.as<int32_t>(), {}), 0);
    CHECK(words.read() == bytes_of(expected));
  });
}

TEST(sums_have_the_engines_bits) {
  repeat(60, [](Random& random) {
    const bool long_ones = random.chance(40);  // several rounds of several warps
    const int64_t videos = random.size(1, 3), g = long_ones ? random.range(33, 70) : random.size(1, 70);
    const int64_t n = long_ones ? random.range(33, 100) : random.size(1, 200);
    const bool balanced = random.chance(60);
    const RandomTensor rewards(random, random.pick({DType::f32, DType::bf16, DType::f16, DType::f64}), {videos, g},
                               random.pick({Values::plain, Values::ties}));
    std::vector<int32_t> words;
    for (int64_t i = 0; i < videos * g * words_of(n); ++i) words.push_back(static_cast<int32_t>(random.next()));
    std::vector<double> expected(static_cast<size_t>(videos * policy_sums_rows * n));
    cpu::policy_sums(words.data(), rewards.view, n, balanced, true, 1, expected.data());
    const DeviceTensor there(rewards);
    const DeviceBytes packed(static_cast<int64_t>(words.size()) * 4, words.data());
    const DeviceBytes weights(videos * g * 16), sums(static_cast<int64_t>(expected.size()) * 8);
    CHECK_EQ(
        cuda::policy_sums(packed.as<int32_t>(), there.view, n, balanced, weights.as<double>(), sums.as<double>(), {}),
        0);
    CHECK(sums.read() == bytes_of(expected));
  });
}

TEST(gradients_have_the_engines_bits) {
  repeat(60, [](Random& random) {
    const int64_t videos = random.size(1, 3), n = random.size(1, 400);
    const auto logits_of = [&](DType dtype) {
      const std::vector<int64_t> pairs = {videos, n, 2}, singles = {videos, n};
      return RandomTensor(random, dtype, random.chance(50) ? pairs : singles, Values::plain);
    };
    const RandomTensor now = logits_of(random.pick({DType::f32, DType::bf16, DType::f16, DType::f64}));
    const RandomTensor old = logits_of(random.pick({DType::f32, DType::f64}));
    std::vector<double> sums;
    for (int64_t i = 0; i < videos * policy_sums_rows * n; ++i) sums.push_back(random.real() - 0.5);
    const PolicyRule rule = {0.8, 1.28, random.chance(50) ? 0.0 : 0.1};
    const int64_t item = now.view.dtype == DType::f64 ? 8 : 4, bytes = now.view.numel() * item;
    std::vector<char> loss(static_cast<size_t>(item)), gradient(static_cast<size_t>(bytes));
    cpu::policy_loss(now.view, old.view, sums.data(), rule, 1, loss.data(), gradient.data());
    const DeviceTensor now_there(now), old_there(old);
    const DeviceBytes sums_there(static_cast<int64_t>(sums.size()) * 8, sums.data());
    const DeviceBytes parts(cuda::policy_loss_parts(videos, n) * 8), loss_there(item), gradient_there(bytes);
    CHECK_EQ(cuda::policy_loss(now_there.view, old_there.view, sums_there.as<double>(), rule, parts.as<double>(),
                               loss_there.as<void>(), gradient_there.as<void>(), {}),
             0);
    CHECK(gradient_there.read() == gradient);
    const DType dtype = item == 8 ? DType::f64 : DType::f32;
    CHECK(std::fabs(value_of(loss_there.read().data(), dtype) - value_of(loss.data(), dtype)) <= 1e-4);
  });
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
