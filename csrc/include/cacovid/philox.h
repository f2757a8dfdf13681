// The library's randomness, part one: Philox4x32-10, a counter-based generator without state.
//
// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The 32 random bits of an element
// are word 0 of the block whose key and counter say who it is:
//
//   key     = (low word of the seed, high word of the seed)
//   counter = (column, row, step, stream << 24 | sample)
//
// So they depend on nothing else: not on the other rows of a batch, the shape, the thread or the device.
#pragma once

#include "cacovid/exact.h"

namespace cacovid {

// Streams from here on are the library's own, lower ones the caller's.
constexpr uint32_t first_reserved_stream = 240;
constexpr uint32_t stream_frames = 253;  // which frames a frame combination holds
constexpr uint32_t stream_groups = 254;  // which group a token combination takes from a frame
constexpr uint32_t stream_tokens = 255;  // which tokens of that group

constexpr uint32_t philox_multiplier_0 = 0xD2511F53u;
constexpr uint32_t philox_multiplier_1 = 0xCD9E8D57u;
constexpr uint32_t philox_key_step_0 = 0x9E3779B9u;  // golden ratio
constexpr uint32_t philox_key_step_1 = 0xBB67AE85u;  // square root of 3, less 1

struct PhiloxBlock {
  uint32_t word[4];
};

CACOVID_HD PhiloxBlock philox(PhiloxBlock c, uint64_t seed) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(philox_multiplier_0) * c.word[0];
    const uint64_t product1 = static_cast<uint64_t>(philox_multiplier_1) * c.word[2];
    c = {{static_cast<uint32_t>(product1 >> 32) ^ c.word[1] ^ key0, static_cast<uint32_t>(product1),
          static_cast<uint32_t>(product0 >> 32) ^ c.word[3] ^ key1, static_cast<uint32_t>(product0)}};
    key0 += philox_key_step_0;
    key1 += philox_key_step_1;
  }
  return c;
}

CACOVID_HD uint32_t stream_word(uint32_t stream, uint32_t sample) { return stream << 24 | sample; }

// The noise bits of one element.
CACOVID_HD uint32_t random_bits(uint64_t seed, uint32_t column, uint32_t row, uint32_t step, uint32_t stream_sample) {
  return philox({{column, row, step, stream_sample}}, seed).word[0];
}

}  // namespace cacovid
