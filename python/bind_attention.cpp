// Attention that a few query rows pay to every key. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

void attention_scores(py::handle query, py::handle keys, py::handle mask, py::handle row_positions, double scale,
                      bool per_head, int threads, py::handle scores) {
  const Tensor q = to_tensor(query, "query"), k = to_tensor(keys, "keys");
  check(q.ndim == 4 && k.ndim == 4, "query must be [B, H, R, D] and keys [B, K, L, D]");
  check(q.dtype == k.dtype && (q.dtype == DType::f32 || q.dtype == DType::f16 || q.dtype == DType::bf16),
        "query and keys must have one float dtype");
  check(q.sizes[0] == k.sizes[0] && q.sizes[3] == k.sizes[3], "query and keys must have the same B and D");
  check(k.sizes[1] > 0 && q.sizes[1] > 0 && q.sizes[1] % k.sizes[1] == 0, "query must have a multiple of keys' heads");
  const Tensor m = to_tensor(mask, "mask"), p = to_tensor(row_positions, "row_positions");
  if (m.defined()) {
    check(m.ndim == 2 && m.dtype == DType::b8 && m.sizes[0] == k.sizes[0] && m.sizes[1] == k.sizes[2],
          "mask must be [B, L] bool");
  }
  if (p.defined()) {
    check(p.ndim == 2 && p.dtype == DType::i64 && p.sizes[0] == q.sizes[0] && p.sizes[1] == q.sizes[2],
          "row_positions must be [B, R] int64");
  }
  float* out = output<float>(scores, "scores", k.sizes[0] * k.sizes[2] * (per_head ? k.sizes[1] : 1));
  const py::gil_scoped_release release;
  cpu::attention_scores(q, k, m, p, {static_cast<float>(scale), per_head}, threads, out);
}

}  // namespace

void bind_attention(py::module_& m) { m.def("attention_scores", &attention_scores); }

}  // namespace cacovid::python
