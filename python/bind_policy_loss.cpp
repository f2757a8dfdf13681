// The policy loss and the masks that it reads. Shapes are checked here, before the core sees a pointer.
#include "convert.h"

namespace cacovid::python {
namespace {

int64_t words_of(int64_t tokens) { return (tokens + 31) / 32; }

struct Masks {
  Tensor masks;
  int32_t* words;

  Masks(py::handle source, py::handle target, int device) : masks(to_tensor(source, "masks", device)) {
    check(masks.ndim == 2 && !is_floating(masks.dtype), "masks must be [R, N] bool or integers");
    words = output<int32_t>(target, "words", masks.sizes[0] * words_of(masks.sizes[1]), device);
  }
};

struct IndexLists {
  Tensor indices;
  int32_t* words;

  IndexLists(py::handle source, int64_t tokens, py::handle target, int device)
      : indices(to_tensor(source, "indices", device)) {
    check(indices.ndim == 2 && indices.dtype == DType::i64, "indices must be [R, K] int64");
    check(tokens >= 0, "tokens must not be negative");
    words = output<int32_t>(target, "words", indices.sizes[0] * words_of(tokens), device);
  }
};

struct Sums {
  const int32_t* words;
  Tensor rewards;
  double* sums;

  Sums(py::handle packed, py::handle reward, int64_t tokens, py::handle target, int device)
      : rewards(to_tensor(reward, "rewards", device)) {
    check(rewards.ndim == 2 && is_floating(rewards.dtype) && rewards.sizes[1] > 0, "rewards must be [B, G] floats");
    check(tokens > 0, "tokens must be positive");
    words = output<int32_t>(packed, "words", rewards.numel() * words_of(tokens), device);
    sums = output<double>(target, "sums", rewards.sizes[0] * policy_sums_rows * tokens, device);
  }
};

struct Loss {
  Tensor logits, old_logits;
  const double* sums;
  void *loss, *gradient;

  Loss(py::handle now, py::handle old, py::handle sums_of, py::handle loss_out, py::handle gradient_out, int device)
      : logits(to_tensor(now, "logits", device)), old_logits(to_tensor(old, "old_logits", device)) {
    for (const Tensor* x : {&logits, &old_logits}) {
      check(is_floating(x->dtype) && (x->ndim == 2 || (x->ndim == 3 && x->sizes[2] == 2)) &&
                x->sizes[0] == logits.sizes[0] && x->sizes[1] == logits.sizes[1],
            "logits and old_logits must be floats of [B, N] or [B, N, 2] with one B and N");
    }
    check(logits.numel() > 0, "there must be tokens");
    sums = output<double>(sums_of, "sums", logits.sizes[0] * policy_sums_rows * logits.sizes[1], device);
    const bool wide = logits.dtype == DType::f64;
    const auto floats = [&](py::handle out, const char* name, int64_t count) -> void* {
      if (wide) return output<double>(out, name, count, device);
      return output<float>(out, name, count, device);
    };
    loss = floats(loss_out, "loss", 1);
    gradient = floats(gradient_out, "gradient", logits.numel());
  }
};

void pack_masks(py::handle masks, int threads, py::handle words) {
  const Masks m(masks, words, cpu_device);
  const py::gil_scoped_release release;
  cpu::pack_masks(m.masks, threads, m.words);
}

void pack_indices(py::handle indices, int64_t tokens, int threads, py::handle words) {
  const IndexLists m(indices, tokens, words, cpu_device);
  const py::gil_scoped_release release;
  cpu::pack_indices(m.indices, tokens, threads, m.words);
}

void policy_sums(py::handle words, py::handle rewards, int64_t tokens, bool balanced, bool weights, int threads,
                 py::handle sums) {
  const Sums s(words, rewards, tokens, sums, cpu_device);
  const py::gil_scoped_release release;
  cpu::policy_sums(s.words, s.rewards, tokens, balanced, weights, threads, s.sums);
}

// low, high: the ratios between which a step pays.
void policy_loss(py::handle logits, py::handle old_logits, py::handle sums, double low, double high, double kl_weight,
                 int threads, py::handle loss, py::handle gradient) {
  const Loss l(logits, old_logits, sums, loss, gradient, cpu_device);
  const py::gil_scoped_release release;
  cpu::policy_loss(l.logits, l.old_logits, l.sums, {low, high, kl_weight}, threads, l.loss, l.gradient);
}

#if defined(CACOVID_CUDA)
void pack_masks_on_cuda(py::handle masks, py::handle words, int device, uintptr_t stream) {
  const Masks m(masks, words, device);
  const py::gil_scoped_release release;
  check_launch("pack_masks", cuda::pack_masks(m.masks, m.words, to_stream(device, stream)));
}

void pack_indices_on_cuda(py::handle indices, int64_t tokens, py::handle words, int device, uintptr_t stream) {
  const IndexLists m(indices, tokens, words, device);
  const py::gil_scoped_release release;
  check_launch("pack_masks", cuda::pack_indices(m.indices, tokens, m.words, to_stream(device, stream)));
}

// weights: [B, G, 2] scratch.
void policy_sums_on_cuda(py::handle words, py::handle rewards, int64_t tokens, bool balanced, py::handle weights,
                         py::handle sums, int device, uintptr_t stream) {
  const Sums s(words, rewards, tokens, sums, device);
  double* scratch = output<double>(weights, "weights", 2 * s.rewards.numel(), device);
  const py::gil_scoped_release release;
  check_launch("policy_sums",
               cuda::policy_sums(s.words, s.rewards, tokens, balanced, scratch, s.sums, to_stream(device, stream)));
}

// parts: scratch of policy_loss_parts numbers.
void policy_loss_on_cuda(py::handle logits, py::handle old_logits, py::handle sums, double low, double high,
                         double kl_weight, py::handle parts, py::handle loss, py::handle gradient, int device,
                         uintptr_t stream) {
  const Loss l(logits, old_logits, sums, loss, gradient, device);
  const int64_t count = cuda::policy_loss_parts(l.logits.sizes[0], l.logits.sizes[1]);
  double* scratch = output<double>(parts, "parts", count, device);
  const py::gil_scoped_release release;
  check_launch("policy_loss", cuda::policy_loss(l.logits, l.old_logits, l.sums, {low, high, kl_weight}, scratch, l.loss,
                                                l.gradient, to_stream(device, stream)));
}
#endif

}  // namespace

#if defined(CACOVID_CUDA)
void bind_cuda_policy_loss(py::module_& m) {
  m.def("pack_masks", &pack_masks_on_cuda);
  m.def("pack_indices", &pack_indices_on_cuda);
  m.def("policy_sums", &policy_sums_on_cuda);
  m.def("policy_loss_parts", &cuda::policy_loss_parts);
  m.def("policy_loss", &policy_loss_on_cuda);
}
#endif

void bind_policy_loss(py::module_& m) {
  m.def("pack_masks", &pack_masks);
  m.def("pack_indices", &pack_indices);
  m.def("policy_sums", &policy_sums);
  m.def("policy_loss", &policy_loss);
}

}  // namespace cacovid::python
