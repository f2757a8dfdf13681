// A list of kept rows in device memory.
#pragma once

#include "device.h"

namespace cacovid::test {

// What a list of rows points to, on the device. Tables of every other size are not aligned to 16 bytes.
struct DeviceList {
  cpu::KeptRows rows;
  size_t shift;
  DeviceBytes index, bounds, cos, sin;

  DeviceList(const cpu::KeptRows& k, const std::vector<int64_t>& positions, const std::vector<int32_t>& heads,
             const std::vector<float>& cosines, const std::vector<float>& sines)
      : rows(k),
        shift(positions.size() % 2),
        index(static_cast<int64_t>(positions.size()) * 8, positions.data()),
        bounds(static_cast<int64_t>(heads.size()) * 4, heads.data()),
        cos(shifted(cosines)),
        sin(shifted(sines)) {
    rows.index = index.as<int64_t>();
    if (k.cu_seqlens != nullptr) rows.cu_seqlens = bounds.as<int32_t>();
    rows.cos = cos.as<float>() + shift;
    rows.sin = sin.as<float>() + shift;
  }

 private:
  DeviceBytes shifted(const std::vector<float>& angles) const {
    std::vector<float> content(shift, 0.0f);
    content.insert(content.end(), angles.begin(), angles.end());
    return DeviceBytes(static_cast<int64_t>(content.size()) * 4, content.data());
  }
};

}  // namespace cacovid::test
