#include "convert.h"

namespace cacovid::python {
void bind_attention(py::module_&);
void bind_combinations(py::module_&);
void bind_gather(py::module_&);
void bind_paged(py::module_&);
void bind_policy_loss(py::module_&);
void bind_repack(py::module_&);
void bind_sample(py::module_&);
void bind_score(py::module_&);
void bind_select(py::module_&);
#if defined(CACOVID_CUDA)
void bind_cuda_combinations(py::module_&);
void bind_cuda_gather(py::module_&);
void bind_cuda_paged(py::module_&);
void bind_cuda_policy_loss(py::module_&);
void bind_cuda_repack(py::module_&);
void bind_cuda_sample(py::module_&);
void bind_cuda_select(py::module_&);
#endif
}  // namespace cacovid::python

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native engine of cacovid_kernels.";
  m.attr("compiler") = CACOVID_COMPILER;
  m.attr("cpu_isa") = cacovid::cpu::isa_name();
  cacovid::python::bind_attention(m);
  cacovid::python::bind_combinations(m);
  cacovid::python::bind_gather(m);
  cacovid::python::bind_paged(m);
  cacovid::python::bind_policy_loss(m);
  cacovid::python::bind_repack(m);
  cacovid::python::bind_sample(m);
  cacovid::python::bind_score(m);
  cacovid::python::bind_select(m);
#if defined(CACOVID_CUDA)
  pybind11::module_ cuda = m.def_submodule("cuda", "CUDA kernels.");
  cuda.attr("architectures") = CACOVID_CUDA;
  cuda.def("versions", [] {
    const cacovid::cuda::Versions v = cacovid::cuda::versions();
    return pybind11::make_tuple(v.driver, v.runtime);
  });
  cacovid::python::bind_cuda_combinations(cuda);
  cacovid::python::bind_cuda_gather(cuda);
  cacovid::python::bind_cuda_paged(cuda);
  cacovid::python::bind_cuda_policy_loss(cuda);
  cacovid::python::bind_cuda_repack(cuda);
  cacovid::python::bind_cuda_sample(cuda);
  cacovid::python::bind_cuda_select(cuda);
#endif
}
