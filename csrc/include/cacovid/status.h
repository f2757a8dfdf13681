// What went wrong with the values of a row or video. The bits are part of the public contract.
#pragma once

#include <cstdint>

namespace cacovid {

enum StatusBit : int32_t {
  status_ok = 0,
  status_nan = 1,            // a score was NaN
  status_posinf = 2,         // a score was +inf
  status_short = 4,          // fewer candidates than asked for; padded with -1
  status_out_of_bounds = 8,  // an index was outside its axis; it was not followed
};

}  // namespace cacovid
