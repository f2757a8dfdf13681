// Row statistics of the policy head. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

void frame_pool(py::handle hidden, const std::vector<int64_t>& grid_thw, double eps, int threads, py::handle rrms,
                py::handle frame_mean) {
  check(grid_thw.size() % 3 == 0, "grid_thw must hold three numbers per video");
  const int64_t videos = static_cast<int64_t>(grid_thw.size()) / 3;
  int64_t frames = 0, tokens = 0;
  for (int64_t v = 0; v < videos; ++v) {
    tokens += grid_tokens(grid_thw, static_cast<size_t>(v));
    frames += grid_thw[3 * v];
  }
  const Tensor x = to_tensor(hidden, "hidden");
  check(x.ndim == 2 && x.sizes[0] == tokens, "hidden must be [N, D] with one row per token of grid_thw");
  check(x.dtype == DType::f32 || x.dtype == DType::f16 || x.dtype == DType::bf16, "hidden must be a float tensor");
  float* rrms_out = output<float>(rrms, "rrms", tokens);
  float* mean_out = output<float>(frame_mean, "frame_mean", frames * x.sizes[1]);
  const py::gil_scoped_release release;
  cpu::frame_pool(x, grid_thw.data(), videos, static_cast<float>(eps), threads, rrms_out, mean_out);
}

}  // namespace

void bind_score(py::module_& m) { m.def("frame_pool", &frame_pool); }

}  // namespace cacovid::python
