// A list of kept rows in device memory.
#pragma once

#include "device.h"

namespace cacovid::test {

// What a list of rows points to, on the device.
struct DeviceList {
  cpu::KeptRows rows;
  DeviceBytes index, bounds, cos, sin;

  DeviceList(const cpu::KeptRows& k, const std::vector<int64_t>& positions, const std::vector<int32_t>& heads,
             const std::vector<float>& cosines, const std::vector<float>& sines)
      : rows(k),
        index(static_cast<int64_t>(positions.size()) * 8, positions.data()),
        bounds(static_cast<int64_t>(heads.size()) * 4, heads.data()),
        cos(static_cast<int64_t>(cosines.size()) * 4, cosines.data()),
        sin(static_cast<int64_t>(sines.size()) * 4, sines.data()) {
    rows.index = index.as<int64_t>();
    if (k.cu_seqlens != nullptr) rows.cu_seqlens = bounds.as<int32_t>();
    rows.cos = cos.as<float>();
    rows.sin = sin.as<float>();
  }
};

}  // namespace cacovid::test
