// Random calls of repack_rows.
#pragma once

#include <algorithm>

#include "data.h"

namespace cacovid::test {

// Positions that one list of rows keeps, shared by batch rows or heads, or head after head with bounds.
struct KeptCall {
  std::vector<int64_t> index;
  std::vector<int32_t> bounds;
  std::vector<float> cos, sin;
  cpu::KeptRows rows = {};

  // In place each head keeps at most n rows: ascending positions, padding behind. `hostile`: any positions.
  KeptCall(Random& random, int64_t batch, int64_t heads, int64_t n, bool ragged, bool in_place, bool hostile) {
    const int64_t lists_b = random.chance(50) ? batch : 1, lists_h = random.chance(50) ? heads : 1;
    const int64_t per_head = in_place ? random.range(0, n) : random.size(0, 40);
    rows.per_head = ragged ? 0 : per_head;
    bounds.push_back(0);
    for (int64_t list = 0; list < (ragged ? batch * heads : lists_b * lists_h); ++list) {
      const int64_t count = !ragged ? per_head : in_place ? random.range(0, n) : random.size(0, 40);
      std::vector<int64_t> positions;
      for (int64_t i = 0; i < n; ++i) positions.push_back(i);
      while (static_cast<int64_t>(positions.size()) > count) {
        positions.erase(positions.begin() + random.range(0, static_cast<int64_t>(positions.size()) - 1));
      }
      positions.resize(static_cast<size_t>(count), -1);
      for (int64_t& p : positions) {
        if (!in_place && n > 0 && p >= 0 && random.chance(30)) p = random.range(0, n - 1);
        if ((!in_place && random.chance(5)) || hostile) p = odd_position(random, n);
      }
      index.insert(index.end(), positions.begin(), positions.end());
      bounds.push_back(static_cast<int32_t>(index.size()));
    }
    rows.head_step = lists_h == 1 ? 0 : 1;
    rows.batch_step = lists_b == 1 ? 0 : lists_h;
    const int64_t tables_b = random.chance(50) ? batch : 1, tables_h = random.chance(50) ? heads : 1;
    rows.table_head_step = tables_h == 1 ? 0 : 1;
    rows.table_batch_step = tables_b == 1 ? 0 : tables_h;
    rows.half = random.size(0, 20);
    const int64_t entries = (ragged ? bounds.back() : tables_b * tables_h * per_head) * rows.half;
    for (int64_t i = 0; i < entries; ++i) {
      cos.push_back(static_cast<float>(random.real() * 2.0 - 1.0));
      sin.push_back(static_cast<float>(random.real() * 2.0 - 1.0));
    }
    index.shrink_to_fit();
    rows.index = index.data();
    rows.total = bounds.back();
    rows.cu_seqlens = ragged ? bounds.data() : nullptr;
    rows.cos = cos.data();
    rows.sin = sin.data();
  }
  KeptCall(KeptCall&&) = default;

  static int64_t odd_position(Random& random, int64_t n) {
    if (n > 0 && random.chance(70)) return random.range(0, n - 1);
    return random.pick({int64_t{-1}, n, int64_t{1} << 32, std::numeric_limits<int64_t>::min(), int64_t{-2}});
  }
};

struct RepackCall {
  int64_t batch, heads, n;
  std::vector<KeptCall> kept;
  std::vector<RandomTensor> caches;
  std::vector<cpu::CacheTensor> tensors;  // without targets
  bool zero_tail, fresh;

  RepackCall(Random& random, bool hostile)
      : batch(random.size(1, 4)),
        heads(random.size(1, 5)),
        n(random.size(1, 40)),
        zero_tail(random.chance(50)),
        fresh(random.chance(30)) {
    std::vector<cpu::Placement> placements;
    for (int64_t i = random.range(1, 3); i > 0; --i) {
      using cpu::Placement;
      const auto placement = random.pick({Placement::elsewhere, Placement::in_heads, Placement::in_front});
      const bool ragged = placement != Placement::in_heads && random.chance(40);
      kept.emplace_back(random, batch, heads, n, ragged, placement != Placement::elsewhere, hostile);
      placements.push_back(placement);
    }
    for (int64_t t = random.some(5); t > 0; --t) {
      const int64_t list = random.range(0, static_cast<int64_t>(kept.size()) - 1);
      const cpu::Placement placement = placements[list];
      const bool rotated = random.chance(40);
      const DType dtype = rotated ? random.pick({DType::f32, DType::bf16, DType::f16, DType::f64})
                                  : random.pick({DType::f32, DType::bf16, DType::u8, DType::i64, DType::i16});
      const int64_t columns = (rotated ? 2 * kept[list].rows.half : 0) + random.size(0, rotated ? 8 : 80);
      const Strides strides = placement == cpu::Placement::elsewhere  ? Strides::any
                              : placement == cpu::Placement::in_heads ? Strides::distinct
                                                                      : Strides::contiguous;
      caches.emplace_back(random, dtype, std::vector<int64_t>{batch, heads, n, columns},
                          rotated ? Values::odd : Values::bits, strides);
      tensors.push_back({caches.back().view, list, rotated, placement, caches.back().view.data});
    }
  }

  int64_t rows_of(const cpu::CacheTensor& t) const {
    const cpu::KeptRows& k = kept[t.kept].rows;
    return k.cu_seqlens != nullptr ? k.cu_seqlens[batch * heads] : batch * heads * k.per_head;
  }

  // Runs it on copies, so that it can be repeated; hands the bytes of every result to `use(tensor, bytes, count)`.
  template <class Use>
  void run(Random& random, int threads, Use use) const {
    std::vector<Memory> memories;
    std::vector<cpu::CacheTensor> calls = tensors;
    for (size_t t = 0; t < calls.size(); ++t) {
      const int64_t item = item_size(calls[t].x.dtype);
      if (calls[t].placement == cpu::Placement::elsewhere) {
        memories.push_back(random_memory(random, rows_of(calls[t]) * calls[t].x.sizes[3] * item, item));
        calls[t].target = memories.back().data();
      } else {
        const Memory& original = caches[t].memory;
        memories.push_back(random_memory(random, original.bytes(), item));
        if (original.bytes() > 0) {
          std::memcpy(memories.back().data(), original.data(), static_cast<size_t>(original.bytes()));
        }
        calls[t].target = calls[t].x.data = memories.back().data();
      }
    }
    std::vector<cpu::KeptRows> lists;
    for (const KeptCall& k : kept) lists.push_back(k.rows);
    cpu::repack_rows(calls.data(), static_cast<int64_t>(calls.size()), lists.data(), zero_tail, fresh, threads);
    for (size_t t = 0; t < calls.size(); ++t) use(t, memories[t].data(), memories[t].bytes());
  }
};

// One row: copied, or rotated in pairs with every product and sum rounded to float32 (float64 for f64).
inline void naive_row(const RandomTensor& x, int64_t row, const cpu::KeptRows& k, bool rotated, const float* cos,
                      const float* sin, std::vector<char>& out) {
  const int64_t columns = x.view.sizes[3], item = item_size(x.view.dtype);
  for (int64_t c = 0; c < columns; ++c) {
    const char* at = x.at(row * columns + c);
    char bytes[8];
    std::memcpy(bytes, at, static_cast<size_t>(item));
    if (rotated && c < 2 * k.half) {
      const int64_t j = c % k.half;
      const double own = x.value(row * columns + c), other = x.value(row * columns + (c + k.half) % (2 * k.half));
      const double turn = c < k.half ? -static_cast<double>(sin[j]) : static_cast<double>(sin[j]);
      if (x.view.dtype == DType::f64) {
        store_value(bytes, DType::f64, own * static_cast<double>(cos[j]) + other * turn);
      } else {
        const float stay = static_cast<float>(own) * cos[j],
                    come = static_cast<float>(other) * static_cast<float>(turn);
        store_value(bytes, x.view.dtype, static_cast<double>(stay + come));
      }
    }
    out.insert(out.end(), bytes, bytes + item);
  }
}

// Equal bits, or any NaN for another.
inline bool same_memory(const char* bytes, const std::vector<char>& expected, DType dtype) {
  const int64_t item = item_size(dtype);
  for (size_t i = 0; i < expected.size(); i += static_cast<size_t>(item)) {
    if (std::memcmp(bytes + i, expected.data() + i, static_cast<size_t>(item)) == 0) continue;
    if (!is_floating(dtype)) return false;
    const double a = value_of(bytes + i, dtype), b = value_of(expected.data() + i, dtype);
    if (a == a || b == b) return false;
  }
  return true;
}

}  // namespace cacovid::test
