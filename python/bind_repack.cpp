// Compaction of key and value caches. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

using cpu::CacheTensor;
using cpu::KeptRows;
using cpu::Placement;
using Ints = std::vector<int64_t>;

// A list of positions as Python passed it, and what it is for every tensor that uses it.
struct Keep {
  Tensor index, cu_seqlens, cos, sin;
  bool readable;  // by the host

  bool ragged() const { return cu_seqlens.defined(); }
  int64_t per_head() const { return ragged() ? 0 : index.sizes[2]; }

  Keep(const Tensor& index, const Tensor& cu_seqlens, const Tensor& cos, const Tensor& sin, bool readable)
      : index(index), cu_seqlens(cu_seqlens), cos(cos), sin(sin), readable(readable) {
    check(index.dtype == DType::i64 && index.contiguous() && index.ndim == (ragged() ? 1 : 3),
          "keep must be contiguous int64, [b, h, K] or [total] with cu_seqlens");
    if (ragged()) {
      check(
          cu_seqlens.dtype == DType::i32 && cu_seqlens.contiguous() && cu_seqlens.ndim == 1 && cu_seqlens.sizes[0] >= 1,
          "cu_seqlens must be a contiguous [B * H + 1] int32 tensor");
      if (readable) check_bounds();
    }
    check(cos.defined() == sin.defined(), "cos and sin go together");
    if (!cos.defined()) return;
    bool equal = cos.ndim == sin.ndim && cos.ndim == (ragged() ? 2 : 4);
    for (int d = 0; equal && d < cos.ndim; ++d) equal = cos.sizes[d] == sin.sizes[d];
    check(equal && cos.dtype == DType::f32 && sin.dtype == DType::f32 && cos.contiguous() && sin.contiguous() &&
              cos.sizes[cos.ndim - 2] == index.sizes[index.ndim - 1],
          "cos and sin must be contiguous float32 [b, h, K, half], or [total, half] with cu_seqlens");
  }

  void check_bounds() const {
    const int32_t* bounds = cu_seqlens.as<int32_t>();
    const int64_t heads = cu_seqlens.sizes[0] - 1;
    bool rising = bounds[0] == 0 && bounds[heads] == index.sizes[0];
    for (int64_t h = 0; h < heads; ++h) rising = rising && bounds[h] <= bounds[h + 1];
    check(rising, "cu_seqlens must rise from 0 to the number of positions");
  }

  static bool fits(const Tensor& t, const Tensor& x) {
    return (t.sizes[0] == 1 || t.sizes[0] == x.sizes[0]) && (t.sizes[1] == 1 || t.sizes[1] == x.sizes[1]);
  }

  int64_t rows_of(const Tensor& x, bool rotated) const {
    const int64_t heads = x.sizes[0] * x.sizes[1];
    check(ragged() ? cu_seqlens.sizes[0] == heads + 1 : fits(index, x), "keep must fit the batch and the heads");
    if (rotated) {
      check(cos.defined() && is_floating(x.dtype) && 2 * cos.sizes[cos.ndim - 1] <= x.sizes[3] &&
                (ragged() || fits(cos, x)),
            "rotated tensors must be floats with at least 2 * half columns, and cos and sin must fit them");
    }
    return ragged() ? index.sizes[0] : heads * per_head();
  }

  bool fits_in_place(const Tensor& x) const {
    if (!ragged()) return per_head() <= x.sizes[2];
    if (!readable) return index.sizes[0] <= x.sizes[0] * x.sizes[1] * x.sizes[2];
    const int32_t* bounds = cu_seqlens.as<int32_t>();
    for (int64_t h = 0; h + 1 < cu_seqlens.sizes[0]; ++h) {
      if (bounds[h + 1] - bounds[h] > x.sizes[2]) return false;
    }
    return true;
  }

  // Steps in lists of K: 0 along an axis that is shared.
  static void steps(const Tensor& t, int64_t& batch, int64_t& head) {
    head = t.sizes[1] == 1 ? 0 : 1;
    batch = t.sizes[0] == 1 ? 0 : t.sizes[1];
  }

  KeptRows rows() const {
    KeptRows k = {};
    k.index = index.as<int64_t>();
    k.cu_seqlens = cu_seqlens.as<int32_t>();
    k.per_head = per_head();
    k.total = ragged() ? index.sizes[0] : 0;
    if (!ragged()) steps(index, k.batch_step, k.head_step);
    if (!cos.defined()) return k;
    k.cos = cos.as<float>();
    k.sin = sin.as<float>();
    k.half = cos.sizes[cos.ndim - 1];
    if (!ragged()) steps(cos, k.table_batch_step, k.table_head_step);
    return k;
  }
};

// The lists cu_seqlens, cos and sin are as long as `keep`, or empty. placements: one Placement per tensor;
// outs: one output per tensor, or empty if all of them stay in place.
struct Repack {
  std::vector<KeptRows> kept;
  std::vector<CacheTensor> tensors;

  Repack(const py::sequence& xs, const py::sequence& keep, const py::sequence& cu_seqlens, const Ints& keep_of,
         const py::sequence& cos, const py::sequence& sin, const std::vector<bool>& rotated, const Ints& placements,
         const py::sequence& outs, int device) {
    const std::vector<Tensor> sources = to_tensors(xs, "cache", device), indices = to_tensors(keep, "keep", device);
    std::vector<Tensor> bounds = to_tensors(cu_seqlens, "cu_seqlens", device), cosines = to_tensors(cos, "cos", device),
                        sines = to_tensors(sin, "sin", device), targets = to_tensors(outs, "out", device);
    const size_t count = sources.size(), lists = indices.size();
    for (std::vector<Tensor>* t : {&bounds, &cosines, &sines}) {
      check(t->empty() || t->size() == lists, "cu_seqlens, cos and sin must be given for every keep or for none");
      t->resize(lists);
    }
    check(keep_of.size() == count && rotated.size() == count && placements.size() == count &&
              (targets.empty() || targets.size() == count),
          "one keep, rotation, placement and output per tensor is needed");
    targets.resize(count);
    std::vector<Keep> keeps;
    for (size_t k = 0; k < lists; ++k) {
      keeps.emplace_back(indices[k], bounds[k], cosines[k], sines[k], device == cpu_device);
      kept.push_back(keeps.back().rows());
    }
    for (size_t t = 0; t < count; ++t) {
      const Tensor& x = sources[t];
      check(x.ndim == 4, "cache tensors must be [B, H, N, D]");
      check(keep_of[t] >= 0 && keep_of[t] < static_cast<int64_t>(lists), "keep_of must name an entry of keep");
      const Keep& k = keeps[keep_of[t]];
      const int64_t rows = k.rows_of(x, rotated[t]);
      check(device == cpu_device || rows < int64_t{1} << 31, "fewer than 2^31 rows of a tensor can be kept");
      const auto placement = static_cast<Placement>(placements[t]);
      void* target = x.data;
      switch (placement) {
        case Placement::elsewhere:
          check(targets[t].dtype == x.dtype && targets[t].contiguous() && targets[t].numel() == rows * x.sizes[3],
                "outputs must be contiguous, of the cache's dtype, with one row per row kept");
          target = targets[t].data;
          break;
        case Placement::in_heads:
          check(!k.ragged() && k.fits_in_place(x), "in place at most N rows of every head can be kept");
          break;
        case Placement::in_front:
          check(x.contiguous(), "only contiguous tensors can be packed in place");
          check(k.fits_in_place(x), "in place at most N rows of every head can be kept");
          break;
        default: check(false, "placement must be 0, 1 or 2");
      }
      tensors.push_back({x, keep_of[t], rotated[t], placement, target});
    }
  }
  int64_t count() const { return static_cast<int64_t>(tensors.size()); }
};

void repack_rows(const py::sequence& xs, const py::sequence& keep, const py::sequence& cu_seqlens, const Ints& keep_of,
                 const py::sequence& cos, const py::sequence& sin, const std::vector<bool>& rotated,
                 const Ints& placements, bool zero_tail, bool fresh, int threads, const py::sequence& outs) {
  const Repack r(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, outs, cpu_device);
  const py::gil_scoped_release release;
  cpu::repack_rows(r.tensors.data(), r.count(), r.kept.data(), zero_tail, fresh, threads);
}

#if defined(CACOVID_CUDA)
void repack_rows_on_cuda(const py::sequence& xs, const py::sequence& keep, const py::sequence& cu_seqlens,
                         const Ints& keep_of, const py::sequence& cos, const py::sequence& sin,
                         const std::vector<bool>& rotated, const Ints& placements, bool zero_tail,
                         const py::sequence& outs, int device, uintptr_t stream) {
  const Repack r(xs, keep, cu_seqlens, keep_of, cos, sin, rotated, placements, outs, device);
  const py::gil_scoped_release release;
  check_launch("repack_kv",
               cuda::repack_rows(r.tensors.data(), r.count(), r.kept.data(), zero_tail, to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_repack(py::module_& m) { m.def("repack_rows", &repack_rows_on_cuda); }
#endif

void bind_repack(py::module_& m) { m.def("repack_rows", &repack_rows); }

}  // namespace cacovid::python
