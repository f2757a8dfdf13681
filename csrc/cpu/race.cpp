#include "race.h"

#include <algorithm>
#include <vector>

#include "cacovid/order.h"
#include "scratch.h"

namespace cacovid::cpu {
namespace {

// Sorts words by falling key; equal keys keep their order, so ascending positions stay ascending.
void sort_falling(uint64_t* words, int64_t n) {
  if (n <= 64) {
    std::sort(words, words + n, [](uint64_t a, uint64_t b) { return a > b; });
    return;
  }
  uint64_t* from = words;
  uint64_t* to = scratch<struct sort_scratch, uint64_t>(n);
  for (int shift = 32; shift < 64; shift += 8) {
    int64_t begin[257] = {};
    for (int64_t i = 0; i < n; ++i) ++begin[256 - (from[i] >> shift & 255)];
    for (int d = 1; d <= 256; ++d) begin[d] += begin[d - 1];
    for (int64_t i = 0; i < n; ++i) to[begin[255 - (from[i] >> shift & 255)]++] = from[i];
    std::swap(from, to);
  }
}

}  // namespace

const uint32_t* position_columns(int64_t n) {
  thread_local std::vector<uint32_t> columns;
  for (int64_t i = static_cast<int64_t>(columns.size()); i < padded(n); ++i) {
    columns.push_back(static_cast<uint32_t>(i));
  }
  return columns.data();
}

void rank_by_sorting(const uint32_t* keys, int64_t n, uint32_t* order) {
  uint64_t* words = scratch<struct rank_scratch, uint64_t>(n);
  for (int64_t i = 0; i < n; ++i) words[i] = rank_word(keys[i], static_cast<uint32_t>(i));
  sort_falling(words, n);
  for (int64_t r = 0; r < n; ++r) order[r] = rank_index(words[r]);
}

void sort_ascending(uint32_t* words, int64_t n) { std::sort(words, words + n); }

int64_t count_valid(const uint32_t* keys, int64_t n) {
  int64_t valid = 0;
  for (int64_t i = 0; i < n; ++i) valid += keys[i] > key_neginf;
  return valid;
}

void draw(const Contestants& from, const NoiseRow& noise, uint32_t stream_sample, int64_t count, int64_t k,
          int64_t* out, int64_t out_stride) {
  const int64_t size = padded(from.n), found = std::min(k, from.valid);
  if (found > 0) {
    uint32_t* keys = scratch<struct perturbed_scratch, uint32_t>(count * size);
    uint64_t* words = scratch<struct race_mask_scratch, uint64_t>(count * size / key_block + found);
    KeyRow rows[batch_rows];
    uint64_t* masks[batch_rows];
    int64_t wanted[batch_rows];
    for (int64_t s = 0; s < count; ++s) {
      rows[s].keys = keys + s * size;
      masks[s] = words + s * size / key_block;
      wanted[s] = found;
      noise_loops().perturb(from.keys, from.columns, from.n, noise, stream_sample + static_cast<uint32_t>(s), rows[s]);
    }
    hot_loops().top_masks(rows, from.n, count, wanted, masks);
    uint64_t* winners = words + count * size / key_block;
    for (int64_t s = 0; s < count; ++s) {
      int64_t* positions = out + s * out_stride;
      hot_loops().list_bits(masks[s], from.n, 0, positions);
      for (int64_t j = 0; j < found; ++j) {
        winners[j] = rank_word(rows[s].keys[positions[j]], static_cast<uint32_t>(positions[j]));
      }
      sort_falling(winners, found);
      for (int64_t j = 0; j < found; ++j) positions[j] = rank_index(winners[j]);
    }
  }
  for (int64_t s = 0; s < count; ++s)
    std::fill(out + s * out_stride + std::max<int64_t>(found, 0), out + s * out_stride + k, -1);
}

}  // namespace cacovid::cpu
