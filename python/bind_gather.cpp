// Gather of rows and its adjoint. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

using Dims = std::vector<int64_t>;

std::vector<void*> targets_of(const py::sequence& tensors, const std::vector<Tensor>& sources,
                              const std::vector<int64_t>& numel, int device) {
  const std::vector<Tensor> outs = to_tensors(tensors, "out", device);
  check(outs.size() == sources.size(), "one output per tensor is needed");
  std::vector<void*> targets;
  for (size_t t = 0; t < outs.size(); ++t) {
    check(outs[t].dtype == sources[t].dtype && outs[t].contiguous() && outs[t].numel() == numel[t],
          "outputs must be contiguous, of the tensors' dtype, with the gathered shape");
    targets.push_back(outs[t].data);
  }
  return targets;
}

struct Index {
  const int64_t* data;
  int64_t count;
};

Index to_index(py::handle tensor, int device) {
  const Tensor t = to_tensor(tensor, "index", device);
  check(t.ndim == 1 && t.dtype == DType::i64 && t.contiguous(), "index must be a contiguous [I] int64 tensor");
  return {t.as<int64_t>(), t.sizes[0]};
}

struct Gather {
  std::vector<Tensor> sources;
  Index chosen;
  std::vector<int32_t> axes;
  std::vector<void*> targets;

  Gather(const py::sequence& xs, py::handle index, const Dims& dims, const py::sequence& outs, int device)
      : sources(to_tensors(xs, "tensors", device)), chosen(to_index(index, device)), axes(dims.begin(), dims.end()) {
    check(dims.size() == sources.size(), "one dim per tensor is needed");
    std::vector<int64_t> numel;
    for (size_t t = 0; t < sources.size(); ++t) {
      const Tensor& x = sources[t];
      check(dims[t] >= 0 && dims[t] < x.ndim, "dims must be axes of the tensors");
      int64_t n = chosen.count;
      for (int d = 0; d < x.ndim; ++d) n *= d == dims[t] ? 1 : x.sizes[d];
      numel.push_back(n);
    }
    targets = targets_of(outs, sources, numel, device);
  }
  int64_t count() const { return static_cast<int64_t>(sources.size()); }
};

void gather_rows(const py::sequence& xs, py::handle index, const Dims& dims, bool fresh, int threads,
                 const py::sequence& outs) {
  const Gather g(xs, index, dims, outs, cpu_device);
  const py::gil_scoped_release release;
  cpu::gather_rows(g.sources.data(), g.axes.data(), g.count(), g.chosen.data, g.chosen.count, fresh, threads,
                   g.targets.data());
}

// shapes: (outer, tokens, columns) of every target, one after another.
void scatter_rows(const py::sequence& grads, py::handle index, const std::vector<int64_t>& shapes, bool fresh,
                  int threads, const py::sequence& outs) {
  const std::vector<Tensor> sources = to_tensors(grads, "grads");
  const Index chosen = to_index(index, cpu_device);
  check(shapes.size() == 3 * sources.size(), "one shape per gradient is needed");
  std::vector<cpu::RowSum> sums;
  std::vector<int64_t> numel;
  for (size_t t = 0; t < sources.size(); ++t) {
    const Tensor& g = sources[t];
    const cpu::RowSum s = {shapes[3 * t], shapes[3 * t + 1], shapes[3 * t + 2]};
    check(s.outer >= 0 && s.tokens >= 0 && s.columns >= 0 && is_floating(g.dtype) && g.contiguous() &&
              g.numel() == s.outer * chosen.count * s.columns,
          "gradients must be contiguous floats of the gathered shape");
    sums.push_back(s);
    numel.push_back(s.outer * s.tokens * s.columns);
  }
  const std::vector<void*> targets = targets_of(outs, sources, numel, cpu_device);
  const py::gil_scoped_release release;
  cpu::scatter_rows(sources.data(), sums.data(), static_cast<int64_t>(sources.size()), chosen.data, chosen.count, fresh,
                    threads, targets.data());
}

void expect_writes(py::handle tensor) {
  const Tensor t = to_tensor(tensor, "tensor");
  check(t.contiguous(), "tensor must be contiguous");
  cpu::expect_writes(t.data, t.numel() * item_size(t.dtype));
}

#if defined(CACOVID_CUDA)
void gather_rows_on_cuda(const py::sequence& xs, py::handle index, const Dims& dims, const py::sequence& outs,
                         int device, uintptr_t stream) {
  const Gather g(xs, index, dims, outs, device);
  const py::gil_scoped_release release;
  check_launch("gather_rows", cuda::gather_rows(g.sources.data(), g.axes.data(), g.count(), g.chosen.data,
                                                g.chosen.count, g.targets.data(), to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_gather(py::module_& m) { m.def("gather_rows", &gather_rows_on_cuda); }
#endif

void bind_gather(py::module_& m) {
  m.def("gather_rows", &gather_rows);
  m.def("scatter_rows", &scatter_rows);
  m.def("expect_writes", &expect_writes);
}

}  // namespace cacovid::python
