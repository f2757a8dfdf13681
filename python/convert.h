// torch.Tensor -> cacovid::Tensor. The only pointer casts of the bindings are here.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cacovid/cuda.h"

namespace cacovid::python {

namespace py = pybind11;

// Where the tensors of a call have to be: the CPU, or the CUDA device of this number.
constexpr int cpu_device = -1;

// Reads data_ptr, dtype, shape and strides of a tensor, or of None as an undefined one.
Tensor to_tensor(py::handle tensor, const char* name, int device = cpu_device);

// An output or host array: contiguous, of the given type and number of elements, or ValueError.
template <class T>
T* output(py::handle tensor, const char* name, int64_t count, int device = cpu_device);

// Tokens of entry `video` of a flat grid_thw, or ValueError: positive entries, fewer than 2^31 tokens, fewer than
// 2^22 frames, so that neither positions nor fixed-point sums over frames can overflow.
int64_t grid_tokens(const std::vector<int64_t>& grid_thw, size_t video);

std::vector<Tensor> to_tensors(const py::sequence& tensors, const char* name, int device = cpu_device);

// std::invalid_argument (ValueError) unless the condition holds. A message is made when it is needed: made before, the
// messages of one call cost a microsecond.
[[noreturn]] void fail(const std::string& message);
inline void check(bool condition, const char* message) {
  if (!condition) fail(message);
}
inline void check(bool condition, const char* name, const char* rule) {
  if (!condition) fail(std::string(name) + rule);
}

#if defined(CACOVID_CUDA)
// A stream as torch numbers it, and its device.
inline cuda::Stream to_stream(int device, uintptr_t handle) { return {device, reinterpret_cast<void*>(handle)}; }

// std::runtime_error (RuntimeError) if a launch failed.
void check_launch(const char* op, int error);
#endif

}  // namespace cacovid::python
