// Online combination space sampling. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

using Ints = std::vector<int64_t>;

std::vector<CombinationPlan> plans_of(const Ints& grid_thw, const Ints& num_draw, const Ints& num_groups,
                                      const std::vector<double>& group_cap, const Ints& num_frames) {
  const size_t videos = num_draw.size();
  check(grid_thw.size() == 3 * videos && num_groups.size() == videos && group_cap.size() == videos &&
            num_frames.size() == videos,
        "grid_thw, num_draw, num_groups, group_cap and num_frames must describe the same videos");
  std::vector<CombinationPlan> plans;
  plans.reserve(videos);
  for (size_t v = 0; v < videos; ++v) {
    const int64_t t = grid_thw[3 * v], per_frame = grid_tokens(grid_thw, v) / t;
    check(num_groups[v] >= 1 && num_groups[v] <= per_frame, "num_groups must be in [1, h*w]");
    check(num_draw[v] >= 0 && num_draw[v] <= per_frame / num_groups[v], "num_draw must fit into the smallest group");
    check(num_frames[v] >= 0 && num_frames[v] <= t, "num_frames must be in [0, t]");
    check(group_cap[v] > 0.0 && group_cap[v] <= 1.0, "group_cap must be in (0, 1]");
    plans.push_back({t, per_frame, num_draw[v], num_groups[v], group_cap[v], num_frames[v]});
  }
  return plans;
}

bool is_score_type(const Tensor& t) { return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16; }

// The arguments of a call, read and checked.
struct Call {
  std::vector<CombinationPlan> plans;
  Tensor token_scores, frame_scores;
  cpu::CombinationSamples samples;
  cpu::DrawKey key;
  cpu::CombinationOutputs out;

  Call(py::handle token_scores_handle, py::handle frame_scores_handle, const Ints& grid_thw, int64_t num_samples,
       const Ints& num_draw, const Ints& num_groups, const std::vector<double>& group_cap, int64_t num_frame_samples,
       const Ints& num_frames, bool strict, int64_t seed, int64_t step, py::handle indices, py::handle groups,
       py::handle log_prob, py::handle frame_indices, py::handle frame_log_prob, py::handle frame_status,
       py::handle frame_draw_status, int device)
      : plans(plans_of(grid_thw, num_draw, num_groups, group_cap, num_frames)),
        token_scores(to_tensor(token_scores_handle, "token_scores", device)),
        frame_scores(to_tensor(frame_scores_handle, "frame_scores", device)),
        samples{num_samples, num_frame_samples, strict},
        key{static_cast<uint64_t>(seed), static_cast<uint32_t>(step), 0} {
    const int64_t most = int64_t{1} << 24;
    check(num_samples >= 1 && num_samples <= most, "num_samples must be in [1, 2^24]");
    check(num_frame_samples >= 0 && num_frame_samples <= most, "num_frame_samples must be in [0, 2^24]");
    check(step >= 0 && step < (int64_t{1} << 32), "step must be in [0, 2^32)");
    int64_t frames = 0, tokens = 0, drawn = 0, drawn_frames = 0;
    bool equal_rows = true;
    for (const CombinationPlan& p : plans) {
      frames += p.frames;
      tokens += p.frames * p.tokens_per_frame;
      drawn += p.frames * p.num_draw;
      drawn_frames += p.num_frames;
      equal_rows = equal_rows && p.tokens_per_frame == plans[0].tokens_per_frame;
    }
    const Tensor &x = token_scores, &f = frame_scores;
    check(is_score_type(x) && x.ndim <= 3 && x.numel() == tokens, "token_scores must be one float score per token");
    check(x.ndim == 1 || (equal_rows && (plans.empty() || x.sizes[x.ndim - 1] == plans[0].tokens_per_frame)),
          "dense token_scores need rows of one frame each");
    check(num_frame_samples == 0 || f.defined(), "frame combinations need frame_scores");
    check(!f.defined() || (is_score_type(f) && f.ndim <= 2 && f.numel() == frames),
          "frame_scores must be one float score per frame");
    out = {output<int64_t>(indices, "indices", num_samples * drawn, device),
           output<int64_t>(groups, "groups", num_samples * frames, device),
           output<float>(log_prob, "log_prob", num_samples * frames, device),
           output<int64_t>(frame_indices, "frame_indices", num_frame_samples * drawn_frames, device),
           output<float>(frame_log_prob, "frame_log_prob", num_frame_samples * videos(), device),
           output<int32_t>(frame_status, "frame_status", frames, device),
           output<int32_t>(frame_draw_status, "frame_draw_status", num_frame_samples > 0 ? videos() : 0, device)};
  }
  int64_t videos() const { return static_cast<int64_t>(plans.size()); }
};

void sample_combinations(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw, int64_t num_samples,
                         const Ints& num_draw, const Ints& num_groups, const std::vector<double>& group_cap,
                         int64_t num_frame_samples, const Ints& num_frames, bool strict, int64_t seed, int64_t step,
                         int threads, py::handle indices, py::handle groups, py::handle log_prob,
                         py::handle frame_indices, py::handle frame_log_prob, py::handle frame_status,
                         py::handle frame_draw_status) {
  const Call c(token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, group_cap, num_frame_samples,
               num_frames, strict, seed, step, indices, groups, log_prob, frame_indices, frame_log_prob, frame_status,
               frame_draw_status, cpu_device);
  const py::gil_scoped_release release;
  cpu::sample_combinations(c.token_scores, c.frame_scores, c.plans.data(), c.videos(), c.samples, c.key, threads,
                           c.out);
}

#if defined(CACOVID_CUDA)
void sample_combinations_on_cuda(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw,
                                 int64_t num_samples, const Ints& num_draw, const Ints& num_groups,
                                 const std::vector<double>& group_cap, int64_t num_frame_samples,
                                 const Ints& num_frames, bool strict, int64_t seed, int64_t step,
                                 py::handle added_steps, py::handle indices, py::handle groups, py::handle log_prob,
                                 py::handle frame_indices, py::handle frame_log_prob, py::handle frame_status,
                                 py::handle frame_draw_status, py::handle packed, int device, uintptr_t stream) {
  const Call c(token_scores, frame_scores, grid_thw, num_samples, num_draw, num_groups, group_cap, num_frame_samples,
               num_frames, strict, seed, step, indices, groups, log_prob, frame_indices, frame_log_prob, frame_status,
               frame_draw_status, device);
  int64_t words = 0;
  for (const CombinationPlan& p : c.plans) {
    check(p.tokens_per_frame <= cuda::most_combination_tokens, "frames have more tokens than a block can rank");
    check(num_frame_samples == 0 || p.frames <= cuda::most_combination_frames,
          "videos have more frames than a block can rank");
    words += p.frames * ((p.tokens_per_frame + 31) / 32);
  }
  const int64_t* added = added_steps.is_none() ? nullptr : output<int64_t>(added_steps, "added_steps", 1, device);
  int32_t* masks = packed.is_none() ? nullptr : output<int32_t>(packed, "packed", num_samples * words, device);
  const py::gil_scoped_release release;
  check_launch("sample_combinations",
               cuda::sample_combinations(c.token_scores, c.frame_scores, c.plans.data(), c.videos(), c.samples, c.key,
                                         added, c.out, reinterpret_cast<uint32_t*>(masks), to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_combinations(py::module_& m) {
  m.attr("most_combination_tokens") = cuda::most_combination_tokens;
  m.attr("most_combination_frames") = cuda::most_combination_frames;
  m.def("sample_combinations", &sample_combinations_on_cuda);
}
#endif

void bind_combinations(py::module_& m) { m.def("sample_combinations", &sample_combinations); }

}  // namespace cacovid::python
