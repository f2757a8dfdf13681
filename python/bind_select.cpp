// Budget, selection and segmented top-k. Shapes are checked here, before the core sees a pointer.
#include <algorithm>
#include <optional>

#include "convert.h"

namespace cacovid::python {
namespace {

using Ints = std::vector<int64_t>;
using Ratio = std::optional<double>;

struct BudgetArgs {
  std::vector<BudgetPlan> plans;
  int64_t frames = 0, tokens = 0, kept = 0;
  bool equal_rows = true;  // all frames of all videos have the same number of tokens

  BudgetArgs(const Ints& grid_thw, const Ints& num_keep, Ratio keep_ratio, double importance_ratio,
             Ratio max_frame_ratio, bool strict, bool fill) {
    const size_t videos = num_keep.size();
    check(grid_thw.size() == 3 * videos, "grid_thw and num_keep must describe the same videos");
    plans.reserve(videos);
    for (size_t v = 0; v < videos; ++v) {
      const int64_t t = grid_thw[3 * v], h = grid_thw[3 * v + 1], w = grid_thw[3 * v + 2];
      const int64_t video_tokens = grid_tokens(grid_thw, v);
      check(num_keep[v] >= 0 && num_keep[v] <= video_tokens, "num_keep must be in [0, t*h*w]");
      const double share = static_cast<double>(num_keep[v]) / static_cast<double>(std::max<int64_t>(video_tokens, 1));
      const double keep = keep_ratio.value_or(share), most = max_frame_ratio.value_or(1.5 * keep);
      plans.push_back(plan_budget(t, h, w, num_keep[v], {keep, importance_ratio, most, strict, fill}));
      equal_rows = equal_rows && plans.back().tokens_per_frame == plans.front().tokens_per_frame;
      frames += t;
      tokens += video_tokens;
      kept += num_keep[v];
    }
  }
  cpu::Videos videos() const { return {plans.data(), static_cast<int64_t>(plans.size())}; }
};

bool is_score_type(const Tensor& t) { return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16; }

Tensor frame_tensor(py::handle scores, int64_t frames) {
  const Tensor t = to_tensor(scores, "frame_scores");
  if (t.defined()) {
    check(is_score_type(t) && t.ndim <= 2 && t.numel() == frames, "frame_scores must be one float score per frame");
  }
  return t;
}

// The rows of a dense [.., P] tensor are addressed by number: they must be the rows that the op expects.
Tensor token_tensor(py::handle scores, int64_t tokens, bool equal_rows, int64_t row_length) {
  Tensor t = to_tensor(scores, "scores");
  check(is_score_type(t) && t.ndim <= 3 && t.numel() == tokens, "scores must be one float score per token");
  if (tokens == 0) t.ndim = 1;  // rows without an element, or none: nothing to address, nothing to divide by
  check(t.ndim == 1 || (equal_rows && t.sizes[t.ndim - 1] == row_length), "dense scores need rows of equal length");
  return t;
}

void allocate_budget(py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep, Ratio keep_ratio,
                     double importance_ratio, Ratio max_frame_ratio, bool strict, py::handle counts,
                     py::handle frame_status) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, true);
  const Tensor frames = frame_tensor(frame_scores, args.frames);
  int64_t* counts_out = output<int64_t>(counts, "counts", args.frames);
  int32_t* status_out = output<int32_t>(frame_status, "frame_status", args.frames);
  const py::gil_scoped_release release;
  cpu::allocate_budget(frames, args.videos(), counts_out, status_out);
}

void select_tokens(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep,
                   Ratio keep_ratio, double importance_ratio, Ratio max_frame_ratio, bool strict, bool fill,
                   bool by_score, int threads, py::handle indices, py::handle frame_counts, py::handle frame_status) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill);
  const int64_t row_length = args.plans.empty() ? 0 : args.plans[0].tokens_per_frame;
  const Tensor tokens = token_tensor(token_scores, args.tokens, args.equal_rows, row_length);
  const Tensor frames = frame_tensor(frame_scores, args.frames);
  int64_t* indices_out = output<int64_t>(indices, "indices", args.kept);
  int64_t* counts_out = output<int64_t>(frame_counts, "frame_counts", args.frames);
  int32_t* status_out = output<int32_t>(frame_status, "frame_status", args.frames);
  const py::gil_scoped_release release;
  cpu::select_tokens(tokens, frames, args.videos(), by_score, threads, indices_out, counts_out, status_out);
}

void segmented_topk(py::handle scores, const Ints& offsets, const Ints& k, bool by_score, int threads,
                    py::handle indices, py::handle status) {
  const int64_t segments = static_cast<int64_t>(k.size());
  check(offsets.size() == k.size() + 1 && offsets[0] == 0, "cu_seqlens must start at 0 with one more entry than k");
  int64_t kept = 0;
  bool equal_rows = true;
  for (int64_t s = 0; s < segments; ++s) {
    check(offsets[s + 1] >= offsets[s], "cu_seqlens must not fall");
    const int64_t n = offsets[s + 1] - offsets[s];
    check(n < (int64_t{1} << 31) && k[s] >= 0 && k[s] <= n, "k must be in [0, segment length]");
    equal_rows = equal_rows && n == offsets[1];
    kept += k[s];
  }
  const Tensor t = token_tensor(scores, offsets[segments], equal_rows, segments > 0 ? offsets[1] : 0);
  int64_t* indices_out = output<int64_t>(indices, "indices", kept);
  int32_t* status_out = output<int32_t>(status, "status", segments);
  const py::gil_scoped_release release;
  cpu::segmented_topk(t, offsets.data(), k.data(), segments, by_score, threads, indices_out, status_out);
}

}  // namespace

void bind_select(py::module_& m) {
  m.def("allocate_budget", &allocate_budget);
  m.def("select_tokens", &select_tokens);
  m.def("segmented_topk", &segmented_topk);
}

}  // namespace cacovid::python
