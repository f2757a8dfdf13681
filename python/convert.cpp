#include "convert.h"

#include <unordered_map>

namespace cacovid::python {
namespace {

// torch dtypes are singletons: their addresses identify them without a comparison in Python.
const std::unordered_map<PyObject*, DType>& dtypes() {
  static const auto* table = [] {
    auto* t = new std::unordered_map<PyObject*, DType>;
    const py::module_ torch = py::module_::import("torch");
    const std::pair<const char*, DType> names[] = {
        {"float32", DType::f32}, {"float16", DType::f16}, {"bfloat16", DType::bf16}, {"float64", DType::f64},
        {"int64", DType::i64},   {"int32", DType::i32},   {"int16", DType::i16},     {"int8", DType::i8},
        {"uint8", DType::u8},    {"bool", DType::b8}};
    for (const auto& [name, dtype] : names) (*t)[py::object(torch.attr(name)).release().ptr()] = dtype;
    return t;
  }();
  return *table;
}

struct Names {
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* shape = PyUnicode_InternFromString("shape");
  PyObject* stride = PyUnicode_InternFromString("stride");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_cuda = PyUnicode_InternFromString("is_cuda");
  PyObject* get_device = PyUnicode_InternFromString("get_device");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* numel = PyUnicode_InternFromString("numel");
};

const Names& names() {
  static const Names* n = new Names;
  return *n;
}

py::object own(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(object);
}

DType find_dtype(py::handle dtype, const char* name) {
  const auto found = dtypes().find(dtype.ptr());
  if (found != dtypes().end()) return found->second;
  throw py::type_error(std::string(name) + ": dtype " + py::str(dtype).cast<std::string>() + " is not supported");
}

#if defined(CACOVID_CUDA_EMULATED)
constexpr bool emulated = true;  // kernels run on CPU tensors
#else
constexpr bool emulated = false;
#endif

bool lies_on(PyObject* tensor, int device) {
  const Names& n = names();
  if (device == cpu_device || emulated) return own(PyObject_GetAttr(tensor, n.is_cpu)).ptr() == Py_True;
  return own(PyObject_GetAttr(tensor, n.is_cuda)).ptr() == Py_True &&
         PyLong_AsLong(own(PyObject_CallMethodNoArgs(tensor, n.get_device)).ptr()) == device;
}

std::string name_of(int device) { return device == cpu_device ? "CPU" : "cuda:" + std::to_string(device); }

}  // namespace

void fail(const std::string& message) { throw std::invalid_argument(message); }

Tensor to_tensor(py::handle tensor, const char* name, int device) {
  Tensor t;
  if (tensor.is_none()) return t;
  const Names& n = names();
  PyObject* object = tensor.ptr();
  if (!lies_on(object, device)) fail(std::string(name) + " must be a " + name_of(device) + " tensor");
  t.dtype = find_dtype(own(PyObject_GetAttr(object, n.dtype)), name);
  t.data = PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(object, n.data_ptr)).ptr());
  check(reinterpret_cast<uintptr_t>(t.data) % static_cast<uintptr_t>(item_size(t.dtype)) == 0, name,
        " must be aligned to its elements. Call .clone() on it.");
  const py::object shape = own(PyObject_GetAttr(object, n.shape));
  const py::object stride = own(PyObject_CallMethodNoArgs(object, n.stride));
  const Py_ssize_t ndim = PyTuple_Size(shape.ptr());
  check(ndim >= 1 && ndim <= max_dims, name, " must have 1 to 8 dimensions");
  t.ndim = static_cast<int32_t>(ndim);
  for (Py_ssize_t d = 0; d < ndim; ++d) {
    t.sizes[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), d));
    t.strides[d] = PyLong_AsLongLong(PyTuple_GET_ITEM(stride.ptr(), d));
  }
  if (PyErr_Occurred()) throw py::error_already_set();
  check(t.data != nullptr || t.numel() == 0, name, " has no memory. Call .clone() on it.");
  return t;
}

int64_t grid_tokens(const std::vector<int64_t>& grid_thw, size_t video) {
  const int64_t t = grid_thw[3 * video], h = grid_thw[3 * video + 1], w = grid_thw[3 * video + 2];
  constexpr int64_t frames = int64_t{1} << 22, tokens = int64_t{1} << 31;
  check(t >= 1 && h >= 1 && w >= 1, "grid_thw entries must be positive");
  check(t < frames && h < tokens && w < tokens && h * w < tokens && t * h * w < tokens,
        "grid_thw must have fewer than 2^22 frames and 2^31 tokens a video");
  return t * h * w;
}

std::vector<Tensor> to_tensors(const py::sequence& tensors, const char* name, int device) {
  std::vector<Tensor> result;
  result.reserve(tensors.size());
  for (const py::handle item : tensors) result.push_back(to_tensor(item, name, device));
  return result;
}

namespace {
template <class T>
constexpr DType dtype_of();
template <>
constexpr DType dtype_of<int64_t>() {
  return DType::i64;
}
template <>
constexpr DType dtype_of<int32_t>() {
  return DType::i32;
}
template <>
constexpr DType dtype_of<float>() {
  return DType::f32;
}
template <>
constexpr DType dtype_of<double>() {
  return DType::f64;
}
template <>
constexpr DType dtype_of<bool>() {
  return DType::b8;
}
}  // namespace

template <class T>
T* output(py::handle tensor, const char* name, int64_t count, int device) {
  const Names& n = names();
  PyObject* object = tensor.ptr();
  const bool contiguous = own(PyObject_CallMethodNoArgs(object, n.is_contiguous)).ptr() == Py_True;
  const DType dtype = find_dtype(own(PyObject_GetAttr(object, n.dtype)), name);
  const int64_t numel = PyLong_AsLongLong(own(PyObject_CallMethodNoArgs(object, n.numel)).ptr());
  if (!lies_on(object, device) || !contiguous || dtype != dtype_of<T>() || numel != count) {
    fail(std::string(name) + " must be a contiguous " + name_of(device) + " tensor with " + std::to_string(count) +
         " elements of the op's type");
  }
  T* data = static_cast<T*>(PyLong_AsVoidPtr(own(PyObject_CallMethodNoArgs(object, n.data_ptr)).ptr()));
  check(data != nullptr || count == 0, name, " has no memory");
  return data;
}

template int64_t* output<int64_t>(py::handle, const char*, int64_t, int);
template int32_t* output<int32_t>(py::handle, const char*, int64_t, int);
template float* output<float>(py::handle, const char*, int64_t, int);
template double* output<double>(py::handle, const char*, int64_t, int);
template bool* output<bool>(py::handle, const char*, int64_t, int);

#if defined(CACOVID_CUDA)
void check_launch(const char* op, int error) {
  if (error == 0) return;
  throw std::runtime_error(std::string(op) + ": CUDA error " + std::to_string(error) + " at launch, " +
                           cuda::error_text(error) +
                           ". Run `python -m cacovid_kernels doctor`, or use backend 'triton'.");
}
#endif

}  // namespace cacovid::python
