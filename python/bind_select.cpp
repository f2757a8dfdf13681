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

Tensor frame_tensor(py::handle scores, int64_t frames, int device) {
  const Tensor t = to_tensor(scores, "frame_scores", device);
  if (t.defined()) {
    check(is_score_type(t) && t.ndim <= 2 && t.numel() == frames, "frame_scores must be one float score per frame");
  }
  return t;
}

// The rows of a dense [.., P] tensor are addressed by number: they must be the rows that the op expects.
Tensor token_tensor(py::handle scores, int64_t tokens, bool equal_rows, int64_t row_length, int device) {
  Tensor t = to_tensor(scores, "scores", device);
  check(is_score_type(t) && t.ndim <= 3 && t.numel() == tokens, "scores must be one float score per token");
  if (tokens == 0) t.ndim = 1;  // rows without an element, or none: nothing to address, nothing to divide by
  check(t.ndim == 1 || (equal_rows && t.sizes[t.ndim - 1] == row_length), "dense scores need rows of equal length");
  return t;
}

struct Allocation {
  BudgetArgs args;
  Tensor frames;
  int64_t* counts;
  int32_t* status;

  Allocation(const BudgetArgs& args, py::handle frame_scores, py::handle counts, py::handle frame_status, int device)
      : args(args),
        frames(frame_tensor(frame_scores, args.frames, device)),
        counts(output<int64_t>(counts, "counts", args.frames, device)),
        status(output<int32_t>(frame_status, "frame_status", args.frames, device)) {}
};

struct Selecting {
  BudgetArgs args;
  Tensor tokens, frames;
  int64_t* indices;
  int64_t* counts;
  int32_t* status;

  Selecting(const BudgetArgs& args, py::handle token_scores, py::handle frame_scores, py::handle indices,
            py::handle frame_counts, py::handle frame_status, int device)
      : args(args),
        tokens(token_tensor(token_scores, args.tokens, args.equal_rows,
                            args.plans.empty() ? 0 : args.plans[0].tokens_per_frame, device)),
        frames(frame_tensor(frame_scores, args.frames, device)),
        indices(output<int64_t>(indices, "indices", args.kept, device)),
        counts(output<int64_t>(frame_counts, "frame_counts", args.frames, device)),
        status(output<int32_t>(frame_status, "frame_status", args.frames, device)) {}
};

struct Segments {
  Tensor scores;
  const int64_t* offsets;
  const int64_t* k;
  int64_t count;
  int64_t* indices;
  int32_t* status;

  Segments(py::handle scores_, const Ints& offsets, const Ints& k, py::handle indices_, py::handle status_, int device)
      : offsets(offsets.data()), k(k.data()), count(static_cast<int64_t>(k.size())) {
    check(offsets.size() == k.size() + 1 && offsets[0] == 0, "cu_seqlens must start at 0 with one more entry than k");
    int64_t kept = 0;
    bool equal_rows = true;
    for (int64_t s = 0; s < count; ++s) {
      check(offsets[s + 1] >= offsets[s], "cu_seqlens must not fall");
      const int64_t n = offsets[s + 1] - offsets[s];
      check(n < (int64_t{1} << 31) && k[s] >= 0 && k[s] <= n, "k must be in [0, segment length]");
      equal_rows = equal_rows && n == offsets[1];
      kept += k[s];
    }
    scores = token_tensor(scores_, offsets[count], equal_rows, count > 0 ? offsets[1] : 0, device);
    indices = output<int64_t>(indices_, "indices", kept, device);
    status = output<int32_t>(status_, "status", count, device);
  }
};

void allocate_budget(py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep, Ratio keep_ratio,
                     double importance_ratio, Ratio max_frame_ratio, bool strict, py::handle counts,
                     py::handle frame_status) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, true);
  const Allocation a(args, frame_scores, counts, frame_status, cpu_device);
  const py::gil_scoped_release release;
  cpu::allocate_budget(a.frames, a.args.videos(), a.counts, a.status);
}

void select_tokens(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep,
                   Ratio keep_ratio, double importance_ratio, Ratio max_frame_ratio, bool strict, bool fill,
                   bool by_score, int threads, py::handle indices, py::handle frame_counts, py::handle frame_status) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill);
  const Selecting s(args, token_scores, frame_scores, indices, frame_counts, frame_status, cpu_device);
  const py::gil_scoped_release release;
  cpu::select_tokens(s.tokens, s.frames, s.args.videos(), by_score, threads, s.indices, s.counts, s.status);
}

void segmented_topk(py::handle scores, const Ints& offsets, const Ints& k, bool by_score, int threads,
                    py::handle indices, py::handle status) {
  const Segments s(scores, offsets, k, indices, status, cpu_device);
  const py::gil_scoped_release release;
  cpu::segmented_topk(s.scores, s.offsets, s.k, s.count, by_score, threads, s.indices, s.status);
}

#if defined(CACOVID_CUDA)
int64_t* scratch_for(const BudgetArgs& args, py::handle scratch, int device) {
  const int64_t entries = cuda::budget_scratch(args.videos());
  return entries == 0 ? nullptr : output<int64_t>(scratch, "scratch", entries, device);
}

int64_t budget_scratch(const Ints& grid_thw) {
  std::vector<BudgetPlan> plans(grid_thw.size() / 3);
  for (size_t v = 0; v < plans.size(); ++v) plans[v].frames = grid_thw[3 * v];
  return cuda::budget_scratch({plans.data(), static_cast<int64_t>(plans.size())});
}

void allocate_budget_on_cuda(py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep, Ratio keep_ratio,
                             double importance_ratio, Ratio max_frame_ratio, bool strict, py::handle scratch,
                             py::handle counts, py::handle frame_status, int device, uintptr_t stream) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, true);
  const Allocation a(args, frame_scores, counts, frame_status, device);
  int64_t* memory = scratch_for(args, scratch, device);
  const py::gil_scoped_release release;
  check_launch("allocate_budget",
               cuda::allocate_budget(a.frames, a.args.videos(), memory, a.counts, a.status, to_stream(device, stream)));
}

std::vector<int64_t> widths_of(const Ints& grid_thw) {
  std::vector<int64_t> widths;
  for (size_t at = 2; at < grid_thw.size(); at += 3) widths.push_back(grid_thw[at]);
  return widths;
}

void select_tokens_on_cuda(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep,
                           Ratio keep_ratio, double importance_ratio, Ratio max_frame_ratio, bool strict, bool fill,
                           bool words, py::handle scratch, py::handle indices, py::handle frame_counts,
                           py::handle frame_status, int device, uintptr_t stream) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill);
  const Selecting s(args, token_scores, frame_scores, indices, frame_counts, frame_status, device);
  cuda::SelectOutputs out = {};
  out.indices = s.indices;
  out.frame_counts = s.counts;
  out.frame_status = s.status;
  int64_t* memory = scratch_for(args, scratch, device);
  const Ints widths = widths_of(grid_thw);
  const py::gil_scoped_release release;
  check_launch("select_tokens", cuda::select_tokens(s.tokens, s.frames, s.args.videos(), widths.data(), words, memory,
                                                    out, to_stream(device, stream)));
}

// Rows of [N, D] with any distance between rows, and the contiguous [K, D] that the kept ones become.
cuda::KeptTokens kept_tokens(py::handle tokens, py::handle rows, const BudgetArgs& args, int device) {
  const Tensor from = to_tensor(tokens, "tokens", device);
  if (!from.defined()) return {};
  const Tensor to = to_tensor(rows, "rows", device);
  check(from.ndim == 2 && from.sizes[0] == args.tokens && (from.strides[1] == 1 || from.sizes[1] <= 1),
        "tokens must be [N, D] with elements of a row side by side");
  check(to.ndim == 2 && to.dtype == from.dtype && to.contiguous() && to.sizes[0] == args.kept &&
            to.sizes[1] == from.sizes[1],
        "rows must be a contiguous [K, D] tensor of the tokens' dtype");
  const int64_t item = item_size(from.dtype);
  return {from.data, from.strides[0] * item, to.data, from.sizes[1] * item};
}

void select_kept_on_cuda(py::handle token_scores, py::handle frame_scores, const Ints& grid_thw, const Ints& num_keep,
                         Ratio keep_ratio, double importance_ratio, Ratio max_frame_ratio, bool strict, bool fill,
                         py::handle tokens, py::handle scratch, py::handle indices, py::handle frame_counts,
                         py::handle frame_status, py::handle cu_seqlens, py::handle mask, py::handle positions,
                         py::handle rows, int device, uintptr_t stream) {
  const BudgetArgs args(grid_thw, num_keep, keep_ratio, importance_ratio, max_frame_ratio, strict, fill);
  const Selecting s(args, token_scores, frame_scores, indices, frame_counts, frame_status, device);
  cuda::SelectOutputs out = {};
  out.indices = s.indices;
  out.frame_counts = s.counts;
  out.frame_status = s.status;
  out.cu_seqlens = output<int32_t>(cu_seqlens, "cu_seqlens", static_cast<int64_t>(args.plans.size()) + 1, device);
  out.mask = output<bool>(mask, "mask", args.tokens, device);
  out.positions = output<int64_t>(positions, "positions", 3 * args.kept, device);
  out.tokens = kept_tokens(tokens, rows, args, device);
  int64_t* memory = scratch_for(args, scratch, device);
  const Ints widths = widths_of(grid_thw);
  const py::gil_scoped_release release;
  check_launch("select_kept", cuda::select_tokens(s.tokens, s.frames, s.args.videos(), widths.data(), false, memory,
                                                  out, to_stream(device, stream)));
}

void segmented_topk_on_cuda(py::handle scores, const Ints& offsets, const Ints& k, bool words, py::handle indices,
                            py::handle status, int device, uintptr_t stream) {
  const Segments s(scores, offsets, k, indices, status, device);
  const py::gil_scoped_release release;
  check_launch("segmented_topk", cuda::segmented_topk(s.scores, s.offsets, s.k, s.count, words, s.indices, s.status,
                                                      to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_select(py::module_& m) {
  m.def("budget_scratch", &budget_scratch);
  m.def("allocate_budget", &allocate_budget_on_cuda);
  m.def("select_tokens", &select_tokens_on_cuda);
  m.def("select_kept", &select_kept_on_cuda);
  m.def("segmented_topk", &segmented_topk_on_cuda);
}
#endif

void bind_select(py::module_& m) {
  m.def("allocate_budget", &allocate_budget);
  m.def("select_tokens", &select_tokens);
  m.def("segmented_topk", &segmented_topk);
}

}  // namespace cacovid::python
