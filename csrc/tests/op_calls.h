// Random calls of every op, with values that make no sense among them: what the fuzzer, the threads and the
// shortage of memory exercise.
#pragma once

#include <functional>
#include <memory>

#include "paged_calls.h"
#include "select_calls.h"

namespace cacovid::test {

// Runs the op on fresh outputs, checks what holds for any input, and returns a digest of every output bit.
using OpCall = std::function<uint64_t(int threads)>;

// FNV-1a of elements; every NaN counts the same, as processors may choose its bits.
inline uint64_t digest_of(uint64_t hash, const char* bytes, int64_t count, DType dtype) {
  const int64_t item = item_size(dtype);
  for (int64_t i = 0; i < count; i += item) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, static_cast<size_t>(item));
    if (is_floating(dtype) && std::isnan(value_of(bytes + i, dtype))) word = ~uint64_t{0};
    hash = (hash ^ word) * 1099511628211u;
  }
  return hash;
}

// Outputs of one run, all of which end up in the digest.
class Outputs {
 public:
  void* add(int64_t count, DType dtype) {
    memories_.emplace_back(count * item_size(dtype), Memory::heap);
    dtypes_.push_back(dtype);
    Memory& m = memories_.back();
    if (m.bytes() > 0) std::memset(m.data(), 0x5a, static_cast<size_t>(m.bytes()));
    return m.data();
  }
  int64_t* add_i64(int64_t count) { return static_cast<int64_t*>(add(count, DType::i64)); }
  int32_t* add_i32(int64_t count) { return static_cast<int32_t*>(add(count, DType::i32)); }
  float* add_f32(int64_t count) { return static_cast<float*>(add(count, DType::f32)); }
  double* add_f64(int64_t count) { return static_cast<double*>(add(count, DType::f64)); }

  uint64_t digest() const {
    uint64_t hash = 14695981039346656037u;
    for (size_t i = 0; i < memories_.size(); ++i) {
      hash = digest_of(hash, memories_[i].data(), memories_[i].bytes(), dtypes_[i]);
    }
    return hash;
  }

 private:
  std::vector<Memory> memories_;
  std::vector<DType> dtypes_;
};

inline bool inside(const int64_t* index, int64_t count, int64_t low, int64_t high) {
  bool all = true;
  for (int64_t i = 0; i < count; ++i) all = all && low <= index[i] && index[i] < high;
  return all;
}

inline Values hostile_values(Random& random) { return random.pick({Values::odd, Values::bits, Values::ties}); }

inline OpCall call_select(Random& random) {
  const auto call = std::make_shared<SelectCall>(random, true);
  const bool by_score = random.chance(50);
  return [=](int threads) {
    Outputs out;
    int64_t* indices = out.add_i64(call->kept);
    int64_t* counts = out.add_i64(call->frames);
    int32_t* status = out.add_i32(call->frames);
    cpu::select_tokens(call->token_scores.view, call->frame_view(), call->videos(), by_score, threads, indices, counts,
                       status);
    CHECK(inside(indices, call->kept, 0, call->tokens));
    return out.digest();
  };
}

inline OpCall call_topk(Random& random) {
  std::vector<int64_t> offsets = {0}, k;
  int64_t kept = 0;
  for (int64_t s = random.some(40); s > 0; --s) {
    const int64_t n = random.size(0, 200);
    offsets.push_back(offsets.back() + n);
    k.push_back(random.range(0, n));
    kept += k.back();
  }
  const auto scores = std::make_shared<RandomTensor>(random, random_score_type(random),
                                                     std::vector<int64_t>{offsets.back()}, hostile_values(random));
  const bool by_score = random.chance(50);
  return [=](int threads) {
    Outputs out;
    int64_t* indices = out.add_i64(kept);
    int32_t* status = out.add_i32(static_cast<int64_t>(k.size()));
    cpu::segmented_topk(scores->view, offsets.data(), k.data(), static_cast<int64_t>(k.size()), by_score, threads,
                        indices, status);
    CHECK(inside(indices, kept, 0, offsets.back()));
    return out.digest();
  };
}

inline OpCall call_pool(Random& random) {
  std::vector<int64_t> grid;
  int64_t frames = 0, tokens = 0;
  for (int64_t v = random.some(3); v > 0; --v) {
    const int64_t t = random.size(1, 9), h = random.size(1, 6), w = random.size(1, 6);
    grid.insert(grid.end(), {t, h, w});
    frames += t;
    tokens += t * h * w;
  }
  const int64_t columns = random.size(0, 150);
  const auto hidden = std::make_shared<RandomTensor>(random, random_score_type(random),
                                                     std::vector<int64_t>{tokens, columns}, hostile_values(random));
  return [=](int threads) {
    Outputs out;
    float* rrms = out.add_f32(tokens);
    float* mean = out.add_f32(frames * columns);
    cpu::frame_pool(hidden->view, grid.data(), static_cast<int64_t>(grid.size() / 3), 1e-6f, threads, rrms, mean);
    return out.digest();
  };
}

inline OpCall call_gather(Random& random) {
  const auto xs = std::make_shared<std::vector<RandomTensor>>();
  std::vector<Tensor> views;
  std::vector<int32_t> dims;
  std::vector<int64_t> index, counts;
  const int64_t n = random.size(0, 40);
  for (int64_t i = random.some(40); i > 0; --i) index.push_back(KeptCall::odd_position(random, n));
  for (int64_t t = random.some(4); t > 0; --t) {
    std::vector<int64_t> sizes;
    for (int64_t d = random.size(1, 5); d > 0; --d) sizes.push_back(random.some(7));
    dims.push_back(static_cast<int32_t>(random.range(0, static_cast<int64_t>(sizes.size()) - 1)));
    sizes[dims.back()] = n;
    const DType dtype = random.pick({DType::f32, DType::bf16, DType::i64, DType::b8});
    xs->emplace_back(random, dtype, sizes, Values::bits);
    views.push_back(xs->back().view);
    int64_t count = static_cast<int64_t>(index.size());
    for (size_t d = 0; d < sizes.size(); ++d) count *= static_cast<int32_t>(d) == dims.back() ? 1 : sizes[d];
    counts.push_back(count);
  }
  const bool fresh = random.chance(50);
  return [=](int threads) {
    Outputs out;
    std::vector<void*> targets;
    for (size_t t = 0; t < counts.size(); ++t) targets.push_back(out.add(counts[t], views[t].dtype));
    cpu::gather_rows(views.data(), dims.data(), static_cast<int64_t>(views.size()), index.data(),
                     static_cast<int64_t>(index.size()), fresh, threads, targets.data());
    return xs->empty() ? 0 : out.digest();
  };
}

inline OpCall call_scatter(Random& random) {
  const auto grads = std::make_shared<std::vector<RandomTensor>>();
  std::vector<Tensor> views;
  std::vector<cpu::RowSum> sums;
  std::vector<int64_t> index;
  const int64_t n = random.size(0, 40), kept = random.size(0, 40);
  for (int64_t i = 0; i < kept; ++i) index.push_back(KeptCall::odd_position(random, n));
  for (int64_t t = random.some(4); t > 0; --t) {
    sums.push_back({random.some(4), random.chance(70) ? n : random.size(0, 50), random.size(0, 30)});
    const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16, DType::f64});
    grads->emplace_back(random, dtype, std::vector<int64_t>{sums.back().outer, kept, sums.back().columns},
                        hostile_values(random), Strides::contiguous);
    views.push_back(grads->back().view);
  }
  return [=](int threads) {
    Outputs out;
    std::vector<void*> targets;
    for (size_t t = 0; t < sums.size(); ++t) {
      const cpu::RowSum& s = sums[t];
      targets.push_back(out.add(s.outer * s.tokens * s.columns, views[t].dtype));
    }
    cpu::scatter_rows(views.data(), sums.data(), static_cast<int64_t>(views.size()), index.data(), kept, false, threads,
                      targets.data());
    return grads->empty() ? 0 : out.digest();
  };
}

inline OpCall call_repack(Random& random) {
  const auto call = std::make_shared<RepackCall>(random, random.chance(60));
  const uint64_t seed = random.next();
  return [=](int threads) {
    Random outputs(seed);
    uint64_t digest = 0;
    call->run(outputs, threads, [&](size_t t, const char* bytes, int64_t count) {
      digest = digest_of(digest, bytes, count, call->tensors[t].x.dtype);
    });
    return digest;
  };
}

inline OpCall call_paged(Random& random) {
  const auto call = std::make_shared<PagedCall>(random, random.chance(60), random.chance(30));
  const uint64_t seed = random.next();
  return [=](int threads) {
    Random outputs(seed);
    uint64_t digest = 0;
    const std::vector<int32_t> tables = call->run(outputs, threads, [&](size_t t, const char* bytes, int64_t count) {
      digest = digest_of(digest, bytes, count, call->tensors[t].x.dtype);
    });
    return digest_of(digest, reinterpret_cast<const char*>(tables.data()), 4 * static_cast<int64_t>(tables.size()),
                     DType::i32);
  };
}

inline cpu::DrawKey random_key(Random& random) {
  const uint64_t seed = random.pick({uint64_t{0}, ~uint64_t{0}, random.next()});
  const uint32_t step = random.pick({0u, ~0u, static_cast<uint32_t>(random.next())});
  return {seed, step, static_cast<uint32_t>(random.range(0, 255))};
}

inline OpCall call_gumbel(Random& random) {
  const int64_t rows = random.some(5), n = random.size(0, 300), k = random.range(0, n), samples = random.some(20);
  const auto logits = std::make_shared<RandomTensor>(random, random_score_type(random), std::vector<int64_t>{rows, n},
                                                     hostile_values(random));
  const cpu::DrawKey key = random_key(random);
  return [=](int threads) {
    Outputs out;
    int64_t* indices = out.add_i64(samples * rows * k);
    float* log_prob = out.add_f32(samples * rows);
    int32_t* status = out.add_i32(rows);
    cpu::gumbel_topk(logits->view, k, samples, key, threads, indices, log_prob, status);
    CHECK(inside(indices, samples * rows * k, -1, n));
    return out.digest();
  };
}

inline OpCall call_log_prob(Random& random) {
  const int64_t samples = random.some(5), rows = random.some(5), n = random.size(0, 60), k = random.size(0, 20);
  const DType dtype = random.pick({DType::f32, DType::bf16, DType::f16, DType::f64});
  const auto logits =
      std::make_shared<RandomTensor>(random, dtype, std::vector<int64_t>{rows, n}, hostile_values(random));
  const auto indices = std::make_shared<RandomTensor>(random, DType::i64, std::vector<int64_t>{samples, rows, k},
                                                      Values::bits, Strides::distinct);
  for (int64_t i = 0; i < indices->memory.bytes() / 8; ++i) {
    const int64_t position = KeptCall::odd_position(random, n);
    std::memcpy(indices->memory.data() + 8 * i, &position, sizeof position);
  }
  const auto grads = std::make_shared<std::vector<double>>();
  for (int64_t i = 0; i < std::max(samples, n) * rows; ++i) {
    grads->push_back(random.chance(80) ? random.real() : SelectCall::hostile_number(random));
  }
  return [=](int threads) {
    Outputs out;
    cpu::pl_log_prob(logits->view, indices->view, threads, out.add_f64(samples * rows));
    cpu::pl_log_prob_backward(grads->data(), logits->view, indices->view, threads, out.add_f64(rows * n));
    double* grad_grad = out.add_f64(samples * rows);
    cpu::pl_log_prob_double_backward(grads->data(), grads->data(), logits->view, indices->view, threads, grad_grad,
                                     out.add_f64(rows * n));
    return out.digest();
  };
}

inline OpCall call_combinations(Random& random) {
  std::vector<CombinationPlan> plans;
  int64_t frames = 0, tokens = 0, drawn = 0, drawn_frames = 0;
  for (int64_t v = random.some(3); v > 0; --v) {
    CombinationPlan p = {};
    p.frames = random.size(1, 9);
    p.tokens_per_frame = random.size(1, 300);
    p.num_groups = random.size(1, p.tokens_per_frame);
    p.num_draw = random.range(0, p.tokens_per_frame / p.num_groups);
    p.group_cap = random.chance(50) ? 1.0 : std::max(random.real(), 1e-6);
    p.num_frames = random.range(0, p.frames);
    plans.push_back(p);
    frames += p.frames;
    tokens += p.frames * p.tokens_per_frame;
    drawn += p.frames * p.num_draw;
    drawn_frames += p.num_frames;
  }
  const auto scores = std::make_shared<RandomTensor>(random, random_score_type(random), std::vector<int64_t>{tokens},
                                                     hostile_values(random));
  const auto frame_scores = std::make_shared<RandomTensor>(random, random_score_type(random),
                                                           std::vector<int64_t>{frames}, hostile_values(random));
  const cpu::CombinationSamples samples = {random.size(1, 70), random.size(0, 40), random.chance(50)};
  const cpu::DrawKey key = random_key(random);
  return [=](int threads) {
    Outputs out;
    const int64_t videos = static_cast<int64_t>(plans.size());
    const cpu::CombinationOutputs to = {
        out.add_i64(samples.tokens * drawn),         out.add_i64(samples.tokens * frames),
        out.add_f32(samples.tokens * frames),        out.add_i64(samples.frames * drawn_frames),
        out.add_f32(samples.frames * videos),        out.add_i32(frames),
        out.add_i32(samples.frames > 0 ? videos : 0)};
    cpu::sample_combinations(scores->view, frame_scores->view, plans.data(), videos, samples, key, threads, to);
    CHECK(inside(to.indices, samples.tokens * drawn, -1, tokens));
    CHECK(inside(to.frame_indices, samples.frames * drawn_frames, -1, frames));
    return out.digest();
  };
}

inline OpCall call_attention(Random& random) {
  const int64_t batch = random.some(3), key_heads = random.size(1, 3), heads = key_heads * random.size(1, 7);
  const int64_t rows = random.some(5), count = random.size(0, 90), columns = random.size(1, 40);
  const DType dtype = random_score_type(random);
  const auto tensor = [&](DType type, const std::vector<int64_t>& sizes) {
    return std::make_shared<RandomTensor>(random, type, sizes, hostile_values(random));
  };
  const auto query = tensor(dtype, {batch, heads, rows, columns}),
             keys = tensor(dtype, {batch, key_heads, count, columns});
  const auto mask = tensor(DType::u8, {batch, count}), positions = tensor(DType::i64, {batch, rows});
  mask->view.dtype = DType::b8;
  const bool masked = random.chance(50), causal = random.chance(50);
  const cpu::AttentionRule rule = {static_cast<float>(random.real()), random.chance(50)};
  return [=](int threads) {
    Outputs out;
    cpu::attention_scores(query->view, keys->view, masked ? mask->view : Tensor{}, causal ? positions->view : Tensor{},
                          rule, threads, out.add_f32(batch * count * (rule.per_head ? key_heads : 1)));
    return out.digest();
  };
}

inline OpCall random_call(Random& random) {
  using Maker = OpCall (*)(Random&);
  constexpr Maker makers[] = {call_select, call_topk,   call_pool,     call_gather,       call_scatter,  call_repack,
                              call_paged,  call_gumbel, call_log_prob, call_combinations, call_attention};
  return makers[random.range(0, static_cast<int64_t>(std::size(makers)) - 1)](random);
}

}  // namespace cacovid::test
