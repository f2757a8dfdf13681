// Sorting in the shared memory of a block.
#pragma once

#include "cacovid/host_device.h"
#include "launch.cuh"

namespace cacovid::cuda {

constexpr int sort_run = 32;  // words that are ranked by counting

CACOVID_HD constexpr int64_t padded_run(int64_t n) { return (n + sort_run - 1) / sort_run * sort_run; }

// Sorts n distinct words, the largest first, and returns which of the two buffers holds them. `words` is followed by
// zeros up to padded_run(n), both buffers are aligned to 16 bytes. A barrier has to lie between the writes of `words`
// and the call; one lies behind the last write here.
//
// A word's place in its run is how many are larger there; in two runs together, its place in its own and how many are
// larger in the other, by binary search. For 196 words that is 32 comparisons, three searches and four barriers.
__device__ inline uint64_t* sort_falling(uint64_t* words, uint64_t* other, int n) {
  struct alignas(16) Pair {
    uint64_t a, b;
  };
  for (int i = threadIdx.x; i < n; i += blockDim.x) {
    const int first = i & ~(sort_run - 1);
    const uint64_t word = words[i];
    const Pair* run = reinterpret_cast<const Pair*>(words + first);
    int larger = 0;
#pragma unroll
    for (int j = 0; j < sort_run / 2; ++j) {
      const Pair pair = run[j];
      larger += (pair.a > word) + (pair.b > word);
    }
    other[first + larger] = word;
  }
  __syncthreads();
  for (int run = sort_run; run < n; run *= 2) {
    uint64_t* from = other;
    other = words;
    words = from;
    for (int i = threadIdx.x; i < n; i += blockDim.x) {
      const uint64_t word = words[i];
      const int rival = (i & ~(run - 1)) ^ run;  // start of the run to meet
      const int length = min(max(n - rival, 0), run);
      int low = 0, high = length;
      while (low < high) {
        const int middle = (low + high) / 2;
        const bool larger = words[rival + middle] > word;
        low = larger ? middle + 1 : low;
        high = larger ? high : middle;
      }
      other[(i & ~(2 * run - 1)) + (i & (run - 1)) + low] = word;
    }
    __syncthreads();
  }
  return other;
}

}  // namespace cacovid::cuda
