// Ordering keys, the search for the k-th largest, and work on bit masks.
#include "cacovid/order.h"
#include "cacovid/status.h"

namespace cacovid::cpu {
namespace {

template <class T>
void load_keys_as(const T* scores, int64_t stride, int64_t n, KeyRow& row) {
  uint32_t* keys = row.keys;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(load_float(scores[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) keys[i] = order_key(load_float(scores[i * stride]));
  }
  uint32_t smallest = 0xffffffffu, largest = 0;  // in a loop of its own: together they do not vectorise
  for (int64_t i = 0; i < n; ++i) {
    smallest = keys[i] < smallest ? keys[i] : smallest;
    largest = keys[i] > largest ? keys[i] : largest;
  }
  for (int64_t i = n; i < padded(n); ++i) keys[i] = 0;
  row.smallest = smallest;
  row.largest = largest;
  row.status = (smallest == key_nan ? status_nan : 0) | (largest == key_posinf ? status_posinf : 0);
}

void load_keys(const void* scores, DType dtype, int64_t stride, int64_t n, KeyRow& row) {
  switch (dtype) {
    case DType::bf16: return load_keys_as(static_cast<const bf16_t*>(scores), stride, n, row);
    case DType::f16: return load_keys_as(static_cast<const f16_t*>(scores), stride, n, row);
    default: return load_keys_as(static_cast<const float*>(scores), stride, n, row);
  }
}

// Bit i of the result: keys[i] >= threshold, for one block of 64 keys.
inline uint64_t at_least(const uint32_t* keys, uint32_t threshold) {
  uint64_t mask = 0;
#if defined(__AVX512F__)
  // Joined in mask registers: gcc 12 may spill a mask of 16 bits as such and reload it as 64.
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  __mmask16 part[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) part[i] = _mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + 16 * i), t);
  mask = _mm512_kunpackd(_mm512_kunpackw(part[3], part[2]), _mm512_kunpackw(part[1], part[0]));
#elif defined(__AVX2__)
  const __m256i t = _mm256_set1_epi32(static_cast<int>(threshold));
  for (int i = 0; i < 8; ++i) {
    const __m256i block = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(keys + 8 * i));
    const __m256i ge = _mm256_cmpeq_epi32(_mm256_max_epu32(block, t), block);
    mask |= static_cast<uint64_t>(static_cast<uint8_t>(_mm256_movemask_ps(_mm256_castsi256_ps(ge)))) << (8 * i);
  }
#else
  for (int i = 0; i < 64; ++i) mask |= static_cast<uint64_t>(keys[i] >= threshold) << i;
#endif
  return mask;
}

// Padding keys are 0, so only a threshold of 0 could count them; the search never asks for that.
inline int64_t count_at_least(const uint32_t* keys, int64_t n, uint32_t threshold) {
#if defined(__AVX512F__)
  const __m512i t = _mm512_set1_epi32(static_cast<int>(threshold));
  int64_t count = 0;
#pragma GCC unroll 8
  for (int64_t i = 0; i < n; i += 16) {
    count += __builtin_popcount(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(keys + i), t));
  }
  return count;
#else
  int32_t count = 0;
  for (int64_t i = 0; i < n; ++i) count += keys[i] >= threshold;
  return count;
#endif
}

// A threshold that exactly k keys reach, or else the k-th largest key itself, whose equals then share the
// last places. The search interpolates between the counts at both ends of a shrinking range and halves the
// range in every third step: 6 counting passes over 196 normal scores, at most 3 * 32 over any.
struct Search {
  uint64_t low, high;  // `many` >= k keys reach low, `few` < k reach high
  int64_t many, few, k;

  bool open() const { return many != k && high - low > 1; }

  uint32_t probe(int step) const {
    const int64_t width = static_cast<int64_t>(high - low);
    const float share = static_cast<float>(many - k) / static_cast<float>(many - few);
    const int64_t guess = static_cast<int64_t>(static_cast<float>(width) * share);
    const int64_t inside = guess < 1 ? 1 : guess > width - 1 ? width - 1 : guess;
    return static_cast<uint32_t>(low + static_cast<uint64_t>(step % 3 ? inside : width / 2));
  }

  void narrow(uint32_t middle, int64_t reached) {
    const bool enough = reached >= k;
    low = enough ? middle : low;
    many = enough ? reached : many;
    high = enough ? high : middle;
    few = enough ? few : reached;
  }
};

template <int count>
void search_rows(const KeyRow* rows, int64_t n, Search* search) {
  for (int step = 1;; ++step) {
    bool open = false;
    uint32_t middle[count];
    int64_t reached[count];
    for (int r = 0; r < count; ++r) {
      open |= search[r].open();
      middle[r] = search[r].open() ? search[r].probe(step) : static_cast<uint32_t>(search[r].low);
    }
    if (!open) return;
    for (int r = 0; r < count; ++r) reached[r] = count_at_least(rows[r].keys, n, middle[r]);
    for (int r = 0; r < count; ++r) {
      if (search[r].open()) search[r].narrow(middle[r], reached[r]);
    }
  }
}

inline uint64_t bits_inside(int64_t block, int64_t n) {
  const int64_t left = n - key_block * block;
  return left < key_block ? (uint64_t{1} << left) - 1 : ~uint64_t{0};
}

void mark(const uint32_t* keys, int64_t n, const Search& found, uint64_t* mask) {
  const uint32_t threshold = static_cast<uint32_t>(found.low);
  const int64_t blocks = padded(n) / key_block;
  if (found.many == found.k) {
    for (int64_t b = 0; b < blocks; ++b) mask[b] = at_least(keys + key_block * b, threshold);
    return;
  }
  // Ties: everything above the threshold, and its first equals.
  const bool top = threshold == 0xffffffffu;
  int64_t ties = found.k - (top ? 0 : count_at_least(keys, n, threshold + 1));
  for (int64_t b = 0; b < blocks; ++b) {
    const uint32_t* block = keys + key_block * b;
    mask[b] = top ? 0 : at_least(block, threshold + 1);
    uint64_t equal = at_least(block, threshold) & ~mask[b] & bits_inside(b, n);
    for (; equal && ties > 0; --ties, equal &= equal - 1) mask[b] |= equal & -equal;
  }
}

void top_masks(const KeyRow* rows, int64_t n, int64_t count, const int64_t* k, uint64_t* const* masks) {
  Search search[batch_rows];
  for (int64_t r = 0; r < count; ++r) {
    const bool trivial = k[r] <= 0 || k[r] >= n;
    search[r] = {rows[r].smallest, static_cast<uint64_t>(rows[r].largest) + 1, trivial ? k[r] : n, 0, k[r]};
  }
  if (count == batch_rows) {
    search_rows<batch_rows>(rows, n, search);
  } else {
    for (int64_t r = 0; r < count; ++r) search_rows<1>(rows + r, n, search + r);
  }
  for (int64_t r = 0; r < count; ++r) {
    if (k[r] > 0 && k[r] < n) {
      mark(rows[r].keys, n, search[r], masks[r]);
    } else {
      for (int64_t b = 0; b < padded(n) / key_block; ++b) masks[r][b] = k[r] <= 0 ? 0 : bits_inside(b, n);
    }
  }
}

// The bit of `word` that has `rank` set bits below it.
inline uint64_t nth_bit(uint64_t word, int64_t rank) {
#if defined(__BMI2__)
  return _pdep_u64(uint64_t{1} << rank, word);
#else
  for (; rank > 0; --rank) word &= word - 1;
  return word & -word;
#endif
}

void set_ranked_zeros(uint64_t* mask, const int32_t* ranks, int64_t count) {
  uint64_t zeros = ~mask[0];
  int64_t below = 0, inside = __builtin_popcountll(zeros);
  for (int64_t i = 0, word = 0; i < count; ++i) {
    while (ranks[i] >= below + inside) {
      below += inside;
      zeros = ~mask[++word];
      inside = __builtin_popcountll(zeros);
    }
    mask[word] |= nth_bit(zeros, ranks[i] - below);
  }
}

void list_bits(const uint64_t* mask, int64_t n, int64_t base, int64_t* out) {
  for (int64_t b = 0; b < padded(n) / key_block; ++b, base += key_block) {
    for (uint64_t word = mask[b]; word; word &= word - 1) *out++ = base + __builtin_ctzll(word);
  }
}

}  // namespace
}  // namespace cacovid::cpu
