// The hot loops of the sample family, compiled once per instruction set from noise_loops.inl.
#pragma once

#include "isa/hot_loops.h"

namespace cacovid::cpu {

// What the noise of a row's elements has in common (philox.h).
struct NoiseRow {
  uint64_t seed;
  uint32_t row, step;
};

struct NoiseLoops {
  // Gumbel noise of n words of random bits.
  void (*gumbel)(const uint32_t* bits, int64_t n, float* noise);

  // Order keys of score + Gumbel noise; 0 where the score is -inf or NaN. `keys` and `columns`, who each element is
  // to the generator, hold padded(n); so does out.keys.
  void (*perturb)(const uint32_t* keys, const uint32_t* columns, int64_t n, const NoiseRow& row, uint32_t stream_sample,
                  KeyRow& out);

  // e^(x - top) for x <= top; 0 for -inf and NaN.
  void (*exp_below)(const double* x, int64_t n, double top, double* e);

  // ln of n weights, each 0 (-inf) or a positive normal number. `logs` may be `weights`.
  void (*log_weights)(const float* weights, int64_t n, float* logs);

  // The sum of n doubles, always added in the same order.
  double (*sum)(const double* x, int64_t n);
};

inline const NoiseLoops& noise_loops() { return *hot_loops().noise; }

}  // namespace cacovid::cpu
