#include <algorithm>

#include "cacovid/ops.h"
#include "cacovid/order.h"
#include "cacovid/philox.h"
#include "plackett_luce.h"
#include "race.h"
#include "rows.h"
#include "scratch.h"
#include "thread_pool.h"

namespace cacovid::cpu {
namespace {

constexpr int64_t samples_per_task = 16;     // they share the loaded row and its weights
constexpr int64_t elements_per_task = 8192;  // about 10 us of noise: less does not pay for waking a thread

int64_t grain_for(int64_t elements) { return elements_per_task / std::max<int64_t>(elements, 1) + 1; }

double load_double(const Row& row, DType dtype, int64_t i) {
  if (dtype == DType::f64) return static_cast<const double*>(row.data)[i * row.stride];
  return static_cast<double>(load_element(row, dtype, i));
}

double* load_doubles(const Row& row, DType dtype, int64_t n) {
  double* items = scratch<struct logit_scratch, double>(n);
  for (int64_t i = 0; i < n; ++i) items[i] = load_double(row, dtype, i);
  return items;
}

// Draws of every sample and row, one after another in memory.
const int64_t* load_drawn(const Tensor& indices, int64_t sample, int64_t row) {
  const int64_t k = indices.sizes[2];
  int64_t* drawn = scratch<struct drawn_scratch, int64_t>(k);
  const int64_t* first = indices.as<int64_t>() + sample * indices.strides[0] + row * indices.strides[1];
  for (int64_t j = 0; j < k; ++j) drawn[j] = first[j * indices.strides[2]];
  return drawn;
}

// body(row number, its distribution) for every row of logits, in parallel.
template <class Body>
void for_rows(const Tensor& logits, int64_t samples, int threads, Body body) {
  const int64_t n = logits.sizes[1];
  parallel_for(logits.sizes[0], grain_for(n * samples), threads, [=](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; ++r) {
      PlackettLuce distribution = distribution_of(load_doubles(row_of(logits, r, 0), logits.dtype, n), n);
      body(r, distribution);
    }
  });
}

}  // namespace

void gumbel_topk(Tensor logits, int64_t k, int64_t samples, DrawKey key, int threads, int64_t* indices, float* log_prob,
                 int32_t* status) {
  const int64_t rows = logits.sizes[0], n = logits.sizes[1];
  const int64_t chunks = std::max<int64_t>((samples + samples_per_task - 1) / samples_per_task, 1);
  const int64_t grain = grain_for(n * std::min(samples, samples_per_task));
  parallel_for(rows * chunks, grain, threads, [=](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) {
      const int64_t r = task / chunks, begin = task % chunks * samples_per_task;
      const int64_t end = std::min(samples, begin + samples_per_task);
      const Row row = row_of(logits, r, 0);
      KeyRow scores = {scratch<struct key_scratch, uint32_t>(padded(n)), 0, 0, status_ok};
      if (n > 0) hot_loops().load_keys(row.data, logits.dtype, row.stride, n, scores);
      const Contestants from = {scores.keys, position_columns(n), n, count_valid(scores.keys, n)};
      PlackettLuce distribution = distribution_of(load_doubles(row, logits.dtype, n), n);
      const NoiseRow noise = {key.seed, static_cast<uint32_t>(r), key.step};
      for (int64_t s = begin; s < end; s += batch_rows) {
        const int64_t count = std::min(end - s, batch_rows);
        int64_t* drawn = indices + (s * rows + r) * k;
        draw(from, noise, stream_word(key.stream, static_cast<uint32_t>(s)), count, k, drawn, rows * k);
        for (int64_t i = 0; i < count; ++i) {
          log_prob[(s + i) * rows + r] = static_cast<float>(distribution.log_prob(drawn + i * rows * k, k));
        }
      }
      if (begin == 0) status[r] = scores.status | (from.valid < k ? status_short : 0);
    }
  });
}

void pl_log_prob(Tensor logits, Tensor indices, int threads, double* log_prob) {
  const int64_t samples = indices.sizes[0], rows = indices.sizes[1], k = indices.sizes[2];
  for_rows(logits, samples, threads, [=](int64_t r, PlackettLuce& distribution) {
    for (int64_t s = 0; s < samples; ++s) {
      log_prob[s * rows + r] = distribution.log_prob(load_drawn(indices, s, r), k);
    }
  });
}

void pl_log_prob_backward(const double* grad, Tensor logits, Tensor indices, int threads, double* grad_logits) {
  const int64_t samples = indices.sizes[0], rows = indices.sizes[1], k = indices.sizes[2], n = logits.sizes[1];
  for_rows(logits, samples, threads, [=](int64_t r, PlackettLuce& distribution) {
    std::fill(grad_logits + r * n, grad_logits + (r + 1) * n, 0.0);
    for (int64_t s = 0; s < samples; ++s) {
      distribution.add_gradient(load_drawn(indices, s, r), k, grad[s * rows + r], grad_logits + r * n);
    }
  });
}

void pl_log_prob_double_backward(const double* direction, const double* grad, Tensor logits, Tensor indices,
                                 int threads, double* grad_grad, double* grad_logits) {
  const int64_t samples = indices.sizes[0], rows = indices.sizes[1], k = indices.sizes[2], n = logits.sizes[1];
  for_rows(logits, samples, threads, [=](int64_t r, PlackettLuce& distribution) {
    std::fill(grad_logits + r * n, grad_logits + (r + 1) * n, 0.0);
    for (int64_t s = 0; s < samples; ++s) {
      grad_grad[s * rows + r] = distribution.add_second_gradient(load_drawn(indices, s, r), k, grad[s * rows + r],
                                                                 direction + r * n, grad_logits + r * n);
    }
  });
}

void gumbel_noise(const uint32_t* bits, int64_t n, float* noise) { noise_loops().gumbel(bits, n, noise); }

}  // namespace cacovid::cpu
