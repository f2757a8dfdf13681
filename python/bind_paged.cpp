// Compaction of paged key and value caches. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

using cpu::KeptRows;
using cpu::PagedTensor;
using Ints = std::vector<int64_t>;

bool is_table(const Tensor& t, int64_t sequences) {
  return t.dtype == DType::i32 && t.ndim == 2 && t.sizes[0] == sequences && t.contiguous();
}

// Steps in lists: 0 along an axis that is shared.
void steps(const Tensor& t, int64_t sequences, int64_t heads, int64_t& batch, int64_t& head) {
  check((t.sizes[0] == 1 || t.sizes[0] == sequences) && (t.sizes[1] == 1 || t.sizes[1] == heads),
        "keep, cos and sin must fit the sequences and the heads");
  head = t.sizes[1] == 1 ? 0 : 1;
  batch = t.sizes[0] == 1 ? 0 : t.sizes[1];
}

bool is_angle(const Tensor& t, int64_t per_head) {
  return t.dtype == DType::f32 && t.ndim == 4 && t.contiguous() && t.sizes[2] == per_head;
}

KeptRows to_kept(const Tensor& index, const Tensor& cos, const Tensor& sin, int64_t sequences, int64_t heads) {
  check(index.dtype == DType::i64 && index.ndim == 3 && index.contiguous() && index.sizes[1] > 0,
        "keep must be contiguous int64 [b, h, K] with heads");
  KeptRows k = {};
  k.index = index.as<int64_t>();
  k.per_head = index.sizes[2];
  steps(index, sequences, heads, k.batch_step, k.head_step);
  check(cos.defined() == sin.defined(), "cos and sin go together");
  if (!cos.defined()) return k;
  bool equal = is_angle(cos, k.per_head) && is_angle(sin, k.per_head);
  for (int d = 0; equal && d < 4; ++d) equal = cos.sizes[d] == sin.sizes[d];
  check(equal, "cos and sin must be contiguous float32 [b, h, K, half]");
  k.cos = cos.as<float>();
  k.sin = sin.as<float>();
  k.half = cos.sizes[3];
  steps(cos, sequences, heads, k.table_batch_step, k.table_head_step);
  return k;
}

// The lists cos and sin are as long as `keep`, or empty; out_block_table may be None.
struct Paged {
  std::vector<KeptRows> kept;
  std::vector<PagedTensor> tensors;
  cpu::PagedSequences sequences = {};
  cpu::PagedOutputs out;

  Paged(const py::sequence& pages, py::handle block_table, py::handle seq_lens, const py::sequence& keep,
        const Ints& keep_of, const py::sequence& cos, const py::sequence& sin, const std::vector<bool>& rotated,
        py::handle out_block_table, py::handle new_block_table, py::handle new_seq_lens, py::handle freed_blocks,
        py::handle num_freed, py::handle status, int device) {
    const std::vector<Tensor> xs = to_tensors(pages, "pages", device), indices = to_tensors(keep, "keep", device);
    std::vector<Tensor> cosines = to_tensors(cos, "cos", device), sines = to_tensors(sin, "sin", device);
    const size_t lists = indices.size();
    check(!xs.empty() && lists > 0, "at least one tensor and one keep are needed");
    for (std::vector<Tensor>* t : {&cosines, &sines}) {
      check(t->empty() || t->size() == lists, "cos and sin must be given for every keep or for none");
      t->resize(lists);
    }
    check(keep_of.size() == xs.size() && rotated.size() == xs.size(), "one keep and one rotation per tensor is needed");

    const Tensor table = to_tensor(block_table, "block_table", device);
    const Tensor lens = to_tensor(seq_lens, "seq_lens", device);
    const Tensor out_table = to_tensor(out_block_table, "out_block_table", device);
    check(lens.dtype == DType::i32 && lens.ndim == 1 && lens.contiguous(), "seq_lens must be a contiguous int32 [B]");
    const int64_t count = lens.sizes[0];
    check(is_table(table, count) && (!out_table.defined() || is_table(out_table, count)),
          "block tables must be contiguous int32 [B, M]");

    const Tensor& first = xs[0];
    check(first.ndim == 4 && first.sizes[1] > 0, "pages must be [blocks, block_size, H, D] with slots");
    const int64_t heads = first.sizes[2], per_head = indices[0].ndim == 3 ? indices[0].sizes[2] : 0;
    check(device == cpu_device || count * heads * per_head < int64_t{1} << 31,
          "fewer than 2^31 rows of a tensor can be kept");
    cpu::PagedSequences& s = sequences;
    s.count = count;
    s.blocks = first.sizes[0];
    s.block_size = first.sizes[1];
    s.block_table = table.as<int32_t>();
    s.seq_lens = lens.as<int32_t>();
    s.out_block_table = out_table.as<int32_t>();
    s.width = table.sizes[1];
    s.out_width = out_table.defined() ? out_table.sizes[1] : s.width;
    check(per_head <= s.out_width * s.block_size, "more rows are kept than the blocks of a sequence hold");

    for (size_t k = 0; k < lists; ++k) {
      kept.push_back(to_kept(indices[k], cosines[k], sines[k], count, heads));
      check(kept[k].per_head == per_head, "all lists must keep equally many rows");
    }
    for (size_t t = 0; t < xs.size(); ++t) {
      const Tensor& x = xs[t];
      check(x.ndim == 4 && x.sizes[0] == s.blocks && x.sizes[1] == s.block_size && x.sizes[2] == heads,
            "pages must be [blocks, block_size, H, D], equal but for D");
      check(keep_of[t] >= 0 && keep_of[t] < static_cast<int64_t>(lists), "keep_of must name an entry of keep");
      const KeptRows& k = kept[keep_of[t]];
      check(!rotated[t] || (cosines[keep_of[t]].defined() && is_floating(x.dtype) && 2 * k.half <= x.sizes[3]),
            "rotated tensors must be floats with at least 2 * half columns, and need cos and sin");
      tensors.push_back({x, keep_of[t], rotated[t]});
    }
    const int64_t columns = (per_head + s.block_size - 1) / s.block_size;
    out = {output<int32_t>(new_block_table, "block_table", count * columns, device),
           output<int32_t>(new_seq_lens, "seq_lens", count, device),
           output<int32_t>(freed_blocks, "freed_blocks", count * s.width, device),
           output<int32_t>(num_freed, "num_freed", count, device), output<int32_t>(status, "status", count, device)};
  }
  int64_t tensor_count() const { return static_cast<int64_t>(tensors.size()); }
  int64_t lists() const { return static_cast<int64_t>(kept.size()); }
};

void repack_pages(const py::sequence& pages, py::handle block_table, py::handle seq_lens, const py::sequence& keep,
                  const Ints& keep_of, const py::sequence& cos, const py::sequence& sin,
                  const std::vector<bool>& rotated, py::handle out_block_table, int threads, py::handle new_block_table,
                  py::handle new_seq_lens, py::handle freed_blocks, py::handle num_freed, py::handle status) {
  const Paged p(pages, block_table, seq_lens, keep, keep_of, cos, sin, rotated, out_block_table, new_block_table,
                new_seq_lens, freed_blocks, num_freed, status, cpu_device);
  const py::gil_scoped_release release;
  cpu::repack_pages(p.tensors.data(), p.tensor_count(), p.kept.data(), p.lists(), p.sequences, threads, p.out);
}

#if defined(CACOVID_CUDA)
void repack_pages_on_cuda(const py::sequence& pages, py::handle block_table, py::handle seq_lens,
                          const py::sequence& keep, const Ints& keep_of, const py::sequence& cos,
                          const py::sequence& sin, const std::vector<bool>& rotated, py::handle out_block_table,
                          py::handle new_block_table, py::handle new_seq_lens, py::handle freed_blocks,
                          py::handle num_freed, py::handle status, int device, uintptr_t stream) {
  const Paged p(pages, block_table, seq_lens, keep, keep_of, cos, sin, rotated, out_block_table, new_block_table,
                new_seq_lens, freed_blocks, num_freed, status, device);
  const py::gil_scoped_release release;
  check_launch("repack_paged_kv", cuda::repack_pages(p.tensors.data(), p.tensor_count(), p.kept.data(), p.lists(),
                                                     p.sequences, p.out, to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_paged(py::module_& m) { m.def("repack_pages", &repack_pages_on_cuda); }
#endif

void bind_paged(py::module_& m) { m.def("repack_pages", &repack_pages); }

}  // namespace cacovid::python
