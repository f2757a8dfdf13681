// Combinations as a CUDA kernel, on the machine of simt/: the draws of the CPU engine, in memory closed to the host.
#include <algorithm>

#include "cacovid/cuda.h"
#include "device.h"
#include "op_calls.h"

namespace cacovid::test {
namespace {

// An output that both write: compared bit for bit, or floats to a tolerance.
template <class T>
struct Both {
  std::vector<T> here;
  DeviceBytes there;

  explicit Both(int64_t count) : here(static_cast<size_t>(count)), there(count * static_cast<int64_t>(sizeof(T))) {}
  T* device() const { return there.as<T>(); }
  void check() const {
    const std::vector<char> bytes = there.read();
    const T* found = reinterpret_cast<const T*>(bytes.data());
    for (size_t i = 0; i < here.size(); ++i) {
      const double a = static_cast<double>(here[i]), b = static_cast<double>(found[i]);
      CHECK(std::is_integral<T>::value ? here[i] == found[i] : std::fabs(a - b) <= 3e-6 + 1e-5 * std::fabs(a));
    }
  }
};

struct Case {
  std::vector<CombinationPlan> plans;
  int64_t frames = 0, tokens = 0, drawn = 0, drawn_frames = 0, words = 0;
  cpu::CombinationSamples samples;
  int64_t added_steps = 0;
  bool masks = false;

  void add(CombinationPlan p) {
    plans.push_back(p);
    frames += p.frames;
    tokens += p.frames * p.tokens_per_frame;
    drawn += p.frames * p.num_draw;
    drawn_frames += p.num_frames;
    words += p.frames * ((p.tokens_per_frame + 31) / 32);
  }

  void check(Random& random) const {
    const RandomTensor scores(random, random_score_type(random), {tokens}, random_values(random));
    const RandomTensor frame_scores(random, random_score_type(random), {frames}, random_values(random));
    const DeviceTensor scores_there(scores), frame_scores_there(frame_scores);
    const int64_t videos = static_cast<int64_t>(plans.size());
    Both<int64_t> indices(samples.tokens * drawn), groups(samples.tokens * frames);
    Both<float> log_prob(samples.tokens * frames), frame_log_prob(samples.frames * videos);
    Both<int64_t> frame_indices(samples.frames * drawn_frames);
    Both<int32_t> frame_status(frames), frame_draw_status(samples.frames > 0 ? videos : 0);
    const DeviceBytes step(8, &added_steps), packed(masks ? samples.tokens * words * 4 : 0);
    cpu::DrawKey key = random_key(random);
    const int64_t launches = simt::launches();
    CHECK_EQ(cuda::sample_combinations(scores_there.view, frame_scores_there.view, plans.data(), videos, samples, key,
                                       step.as<int64_t>(),
                                       {indices.device(), groups.device(), log_prob.device(), frame_indices.device(),
                                        frame_log_prob.device(), frame_status.device(), frame_draw_status.device()},
                                       masks ? packed.as<uint32_t>() : nullptr, {}),
             0);
    CHECK_EQ(simt::launches() - launches, (videos + 35) / 36);
    key.step += static_cast<uint32_t>(added_steps);
    cpu::sample_combinations(scores.view, frame_scores.view, plans.data(), videos, samples, key, 1,
                             {indices.here.data(), groups.here.data(), log_prob.here.data(), frame_indices.here.data(),
                              frame_log_prob.here.data(), frame_status.here.data(), frame_draw_status.here.data()});
    indices.check();
    groups.check();
    log_prob.check();
    frame_indices.check();
    frame_log_prob.check();
    frame_status.check();
    frame_draw_status.check();
    if (masks) CHECK(packed.read() == masks_of(indices.here));
  }

  std::vector<char> masks_of(const std::vector<int64_t>& indices) const {
    std::vector<uint32_t> masks(static_cast<size_t>(samples.tokens * words));
    for (int64_t s = 0; s < samples.tokens; ++s) {
      int64_t word = s * words, token = 0, column = s * drawn;
      for (const CombinationPlan& p : plans) {
        for (int64_t f = 0; f < p.frames; ++f) {
          for (int64_t j = 0; j < p.num_draw; ++j, ++column) {
            const int64_t i = indices[column] - token;
            if (indices[column] >= 0) masks[word + i / 32] |= 1u << i % 32;
          }
          token += p.tokens_per_frame;
          word += (p.tokens_per_frame + 31) / 32;
        }
      }
    }
    const char* bytes = reinterpret_cast<const char*>(masks.data());
    return std::vector<char>(bytes, bytes + masks.size() * 4);
  }
};

CombinationPlan random_plan(Random& random, int64_t most_frames, int64_t most_tokens) {
  CombinationPlan p = {};
  p.frames = random.size(1, most_frames);
  p.tokens_per_frame = random.size(1, most_tokens);
  p.num_groups = random.size(1, p.tokens_per_frame);
  p.num_draw = random.range(0, p.tokens_per_frame / p.num_groups);
  p.group_cap = random.chance(50) ? std::min(2.0 / static_cast<double>(p.num_groups), 1.0) : random.real() + 1e-9;
  p.num_frames = random.range(0, p.frames);
  return p;
}

TEST(combinations_of_any_videos) {
  repeat(60, [](Random& random) {
    Case c;
    for (int64_t v = random.some(3); v > 0; --v) c.add(random_plan(random, 4, 120));
    c.samples = {random.size(1, 40), random.size(0, 20), random.chance(50)};
    c.added_steps = random.chance(50) ? 0 : static_cast<int64_t>(random.next());
    c.masks = random.chance(50);
    c.check(random);
  });
}

// What only sizes reach: every number of lanes, the block, runs of ranks, several rounds.
TEST(combinations_of_chosen_sizes) {
  const int64_t shapes[][3] = {{196, 25, 4}, {96, 6, 16}, {90, 3, 7}, {100, 2, 33}, {64, 1, 64}};
  int64_t seed = 1;
  for (const auto& shape : shapes) {
    Random random(static_cast<uint64_t>(seed++));
    Case c;
    c.add({1, shape[0], shape[2], shape[1], std::max(2.0 / static_cast<double>(shape[1]), 0.1), 1});
    c.samples = {9, 0, true};
    c.masks = true;
    c.check(random);
  }
  for (const int64_t frames : {9, 40}) {
    Random random(static_cast<uint64_t>(seed++));
    Case c;
    c.add({frames, 3, 1, 3, 0.5, 5});
    c.samples = {2, 9, frames == 9};
    c.check(random);
  }
}

// So many samples that a block draws one after another.
TEST(combinations_in_rounds_of_a_block) {
  Random random(8);
  Case c;
  c.add({1, 34, 2, 1, 1.0, 1});
  c.samples = {1026, 0, true};
  c.masks = true;
  c.check(random);
}

// More videos than one launch takes.
TEST(combinations_of_many_videos) {
  Random random(7);
  Case c;
  for (int64_t v = 0; v < 41; ++v) c.add(random_plan(random, 1, 9));
  c.samples = {2, 2, true};
  c.masks = true;
  c.check(random);
}

}  // namespace
}  // namespace cacovid::test

TEST_MAIN
