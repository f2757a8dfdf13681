// Gumbel top-k and Plackett-Luce log-probabilities. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

constexpr int64_t most_columns = int64_t{1} << 31;
constexpr int64_t most_samples = int64_t{1} << 24;

bool is_low_float(const Tensor& t) { return t.dtype == DType::f32 || t.dtype == DType::bf16 || t.dtype == DType::f16; }

// The seed's bits: Python passes it as a signed number.
cpu::DrawKey draw_key(int64_t seed, int64_t step, int64_t stream) {
  check(step >= 0 && step < (int64_t{1} << 32), "step must be in [0, 2^32)");
  check(stream >= 0 && stream < 256, "stream must be in [0, 256)");
  return {static_cast<uint64_t>(seed), static_cast<uint32_t>(step), static_cast<uint32_t>(stream)};
}

struct GumbelTopk {
  Tensor logits;
  cpu::DrawKey key;
  int64_t* indices;
  float* log_prob;
  int32_t* status;

  GumbelTopk(py::handle logits_handle, int64_t k, int64_t samples, int64_t seed, int64_t step, int64_t stream,
             py::handle indices_handle, py::handle log_prob_handle, py::handle status_handle, int device)
      : logits(to_tensor(logits_handle, "logits", device)), key(draw_key(seed, step, stream)) {
    const Tensor& x = logits;
    check(x.ndim == 2 && is_low_float(x), "logits must be [R, N] float32, bfloat16 or float16");
    check(x.sizes[0] < (int64_t{1} << 32) && x.sizes[1] < most_columns, "logits must have fewer rows and columns");
    check(k >= 0 && k <= x.sizes[1], "k must be in [0, N]");
    check(samples >= 0 && samples <= most_samples, "num_samples must be in [0, 2^24]");
    indices = output<int64_t>(indices_handle, "indices", samples * x.sizes[0] * k, device);
    log_prob = output<float>(log_prob_handle, "log_prob", samples * x.sizes[0], device);
    status = output<int32_t>(status_handle, "status", x.sizes[0], device);
  }
};

void gumbel_topk(py::handle logits, int64_t k, int64_t samples, int64_t seed, int64_t step, int64_t stream, int threads,
                 py::handle indices, py::handle log_prob, py::handle status) {
  const GumbelTopk g(logits, k, samples, seed, step, stream, indices, log_prob, status, cpu_device);
  const py::gil_scoped_release release;
  cpu::gumbel_topk(g.logits, k, samples, g.key, threads, g.indices, g.log_prob, g.status);
}

#if defined(CACOVID_CUDA)
void gumbel_topk_on_cuda(py::handle logits, int64_t k, int64_t samples, int64_t seed, int64_t step,
                         py::handle added_steps, int64_t stream, py::handle indices, py::handle log_prob,
                         py::handle status, int device, uintptr_t queue) {
  const GumbelTopk g(logits, k, samples, seed, step, stream, indices, log_prob, status, device);
  const int64_t* added = added_steps.is_none() ? nullptr : output<int64_t>(added_steps, "added_steps", 1, device);
  const py::gil_scoped_release release;
  check_launch("gumbel_topk", cuda::gumbel_topk(g.logits, k, samples, g.key, added, g.indices, g.log_prob, g.status,
                                                to_stream(device, queue)));
}
#endif

struct Draws {
  Tensor logits, indices;
  int64_t samples, rows, columns;

  Draws(py::handle logits_handle, py::handle indices_handle)
      : logits(to_tensor(logits_handle, "logits")), indices(to_tensor(indices_handle, "indices")) {
    check(logits.ndim == 2 && (is_low_float(logits) || logits.dtype == DType::f64), "logits must be [R, N] floats");
    check(indices.ndim == 3 && indices.dtype == DType::i64, "indices must be [S, R, k] int64");
    check(indices.sizes[1] == logits.sizes[0], "logits and indices must have the same rows");
    samples = indices.sizes[0];
    rows = logits.sizes[0];
    columns = logits.sizes[1];
  }
};

void pl_log_prob(py::handle logits, py::handle indices, int threads, py::handle log_prob) {
  const Draws d(logits, indices);
  double* out = output<double>(log_prob, "log_prob", d.samples * d.rows);
  const py::gil_scoped_release release;
  cpu::pl_log_prob(d.logits, d.indices, threads, out);
}

void pl_log_prob_backward(py::handle grad, py::handle logits, py::handle indices, int threads, py::handle grad_logits) {
  const Draws d(logits, indices);
  const double* grad_in = output<double>(grad, "grad", d.samples * d.rows);
  double* out = output<double>(grad_logits, "grad_logits", d.rows * d.columns);
  const py::gil_scoped_release release;
  cpu::pl_log_prob_backward(grad_in, d.logits, d.indices, threads, out);
}

void pl_log_prob_double_backward(py::handle direction, py::handle grad, py::handle logits, py::handle indices,
                                 int threads, py::handle grad_grad, py::handle grad_logits) {
  const Draws d(logits, indices);
  const double* direction_in = output<double>(direction, "direction", d.rows * d.columns);
  const double* grad_in = output<double>(grad, "grad", d.samples * d.rows);
  double* grad_out = output<double>(grad_grad, "grad_grad", d.samples * d.rows);
  double* out = output<double>(grad_logits, "grad_logits", d.rows * d.columns);
  const py::gil_scoped_release release;
  cpu::pl_log_prob_double_backward(direction_in, grad_in, d.logits, d.indices, threads, grad_out, out);
}

void gumbel_noise(py::handle bits, py::handle noise) {
  const Tensor x = to_tensor(bits, "bits");
  check(x.dtype == DType::i32 && x.contiguous(), "bits must be contiguous int32");
  float* out = output<float>(noise, "noise", x.numel());
  const py::gil_scoped_release release;
  cpu::gumbel_noise(x.as<uint32_t>(), x.numel(), out);
}

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_sample(py::module_& m) { m.def("gumbel_topk", &gumbel_topk_on_cuda); }
#endif

void bind_sample(py::module_& m) {
  m.def("gumbel_topk", &gumbel_topk);
  m.def("pl_log_prob", &pl_log_prob);
  m.def("pl_log_prob_backward", &pl_log_prob_backward);
  m.def("pl_log_prob_double_backward", &pl_log_prob_double_backward);
  m.def("gumbel_noise", &gumbel_noise);
}

}  // namespace cacovid::python
