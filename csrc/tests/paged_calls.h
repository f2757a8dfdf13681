// Random calls of repack_pages.
#pragma once

#include <numeric>

#include "repack_calls.h"

namespace cacovid::test {

struct PagedCall {
  struct List {
    std::vector<int64_t> index;
    std::vector<float> cos, sin;
    cpu::KeptRows rows = {};
  };

  int64_t batch, heads, blocks, block_size, width, out_width, per_head;
  bool in_place;
  std::vector<int32_t> table, out_table, lens;
  std::vector<List> lists;
  std::vector<RandomTensor> caches;
  std::vector<cpu::PagedTensor> tensors;

  // Every block once. `odd`: also ids and lengths out of range. `hostile`: positions that neither ascend nor exist.
  PagedCall(Random& random, bool odd, bool hostile)
      : batch(random.size(1, 4)),
        heads(random.size(1, 4)),
        block_size(random.size(1, 9)),
        width(random.size(1, 5)),
        out_width(random.size(1, 5)),
        in_place(random.chance(60)) {
    blocks = batch * (width + out_width) + random.size(0, 3);
    const int64_t room = (in_place ? width : out_width) * block_size;
    per_head = random.range(0, room);
    std::vector<int32_t> ids(static_cast<size_t>(blocks));
    std::iota(ids.begin(), ids.end(), 0);
    for (int64_t i = blocks - 1; i > 0; --i) std::swap(ids[i], ids[random.range(0, i)]);
    if (random.chance(30)) std::sort(ids.begin(), ids.end());
    if (odd) {
      for (int32_t& id : ids) {
        if (random.chance(10))
          id = random.pick({-1, static_cast<int32_t>(blocks), std::numeric_limits<int32_t>::min()});
      }
    }
    table.assign(ids.begin(), ids.begin() + batch * width);
    out_table.assign(ids.begin() + batch * width, ids.begin() + batch * (width + out_width));
    for (int64_t b = 0; b < batch; ++b) {
      lens.push_back(static_cast<int32_t>(random.range(0, width * block_size)));
      if (odd && random.chance(20)) lens.back() = random.pick({-3, std::numeric_limits<int32_t>::max()});
    }
    for (int64_t l = random.range(1, 3); l > 0; --l) add_list(random, hostile);
    for (int64_t t = random.range(1, 5); t > 0; --t) add_tensor(random);
  }

  void add_list(Random& random, bool hostile) {
    lists.emplace_back();
    List& list = lists.back();
    const auto axes = [&](int64_t& batch_step, int64_t& head_step) {
      const int64_t b = random.chance(50) ? batch : 1, h = random.chance(50) ? heads : 1;
      head_step = h == 1 ? 0 : 1;
      batch_step = b == 1 ? 0 : h;
      return b * h;
    };
    cpu::KeptRows& k = list.rows;
    k.per_head = per_head;
    for (int64_t entries = axes(k.batch_step, k.head_step); entries > 0; --entries) {
      std::vector<int64_t> positions(static_cast<size_t>(width * block_size));
      std::iota(positions.begin(), positions.end(), 0);
      const int64_t count = random.range(0, std::min<int64_t>(per_head, width * block_size));
      while (static_cast<int64_t>(positions.size()) > count) {
        const int64_t last = static_cast<int64_t>(positions.size()) - 1;
        positions.erase(positions.begin() + random.range(random.range(0, last), last));  // a prefix stays more often
      }
      positions.resize(static_cast<size_t>(per_head), -1);
      for (int64_t& p : positions) {
        if (hostile) p = KeptCall::odd_position(random, width * block_size);
      }
      list.index.insert(list.index.end(), positions.begin(), positions.end());
    }
    k.half = random.size(0, 12);
    for (int64_t entries = axes(k.table_batch_step, k.table_head_step) * per_head * k.half; entries > 0; --entries) {
      const bool still = random.chance(80);
      list.cos.push_back(still ? 1.0f : static_cast<float>(random.real() * 2.0 - 1.0));
      list.sin.push_back(still ? 0.0f : static_cast<float>(random.real() * 2.0 - 1.0));
    }
    k.index = list.index.data();
    k.cos = list.cos.data();
    k.sin = list.sin.data();
  }

  void add_tensor(Random& random) {
    const int64_t list = random.range(0, static_cast<int64_t>(lists.size()) - 1);
    const bool rotated = random.chance(40);
    const DType dtype = rotated ? random.pick({DType::f32, DType::bf16, DType::f16, DType::f64})
                                : random.pick({DType::f32, DType::bf16, DType::u8, DType::i64, DType::i16});
    const int64_t columns = (rotated ? 2 * lists[list].rows.half : 0) + random.size(0, rotated ? 8 : 80);
    caches.emplace_back(random, dtype, std::vector<int64_t>{blocks, block_size, heads, columns},
                        rotated ? Values::odd : Values::bits, Strides::distinct);
    tensors.push_back({caches.back().view, list, rotated});
  }

  int64_t columns() const { return (per_head + block_size - 1) / block_size; }

  // Runs it on copies, so that it can be repeated; hands the bytes of every tensor to `use(tensor, bytes, count)`, and
  // returns the tables: block table, lengths, freed blocks, their numbers and status, one after another.
  template <class Use>
  std::vector<int32_t> run(Random& random, int threads, Use use) const {
    std::vector<Memory> memories;
    std::vector<cpu::PagedTensor> calls = tensors;
    for (size_t t = 0; t < calls.size(); ++t) {
      const Memory& original = caches[t].memory;
      memories.push_back(random_memory(random, original.bytes(), item_size(calls[t].x.dtype)));
      if (original.bytes() > 0) {
        std::memcpy(memories.back().data(), original.data(), static_cast<size_t>(original.bytes()));
      }
      calls[t].x.data = memories.back().data();
    }
    std::vector<cpu::KeptRows> rows;
    for (const List& list : lists) rows.push_back(list.rows);
    const cpu::PagedSequences sequences = {batch,       blocks,
                                           block_size,  table.data(),
                                           lens.data(), in_place ? nullptr : out_table.data(),
                                           width,       in_place ? width : out_width};
    const Output<int32_t> new_table(random, batch * columns()), new_lens(random, batch), freed(random, batch * width),
        num_freed(random, batch), status(random, batch);
    cpu::repack_pages(calls.data(), static_cast<int64_t>(calls.size()), rows.data(), static_cast<int64_t>(rows.size()),
                      sequences, threads, {new_table, new_lens, freed, num_freed, status});
    for (size_t t = 0; t < calls.size(); ++t) use(t, memories[t].data(), memories[t].bytes());
    std::vector<int32_t> tables;
    for (const Output<int32_t>* out : {&new_table, &new_lens, &freed, &num_freed, &status}) {
      tables.insert(tables.end(), out->data(), out->data() + out->size());
    }
    return tables;
  }
};

}  // namespace cacovid::test
