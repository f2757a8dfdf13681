// Copies of inputs and outputs in memory that only kernels may touch.
#pragma once

#include <memory>

#include "data.h"
#include "simt.h"

namespace cacovid::test {

// `bytes` of device memory; an access of the host faults, and one far enough behind the end does too.
class DeviceBytes {
 public:
  explicit DeviceBytes(int64_t bytes, const void* content = nullptr)
      : bytes_(bytes), data_(simt::device_alloc(static_cast<size_t>(bytes)), simt::device_free) {
    const std::vector<char> garbage(content ? 0 : static_cast<size_t>(bytes), '\x5a');
    simt::copy_to_device(data_.get(), content ? content : garbage.data(), static_cast<size_t>(bytes));
  }
  template <class T = void>
  T* as() const {
    return static_cast<T*>(data_.get());
  }
  std::vector<char> read() const {
    std::vector<char> host(static_cast<size_t>(bytes_));
    simt::copy_from_device(host.data(), data_.get(), host.size());
    return host;
  }

 private:
  int64_t bytes_;
  std::shared_ptr<void> data_;
};

// A tensor's memory on the device, as far off 16-byte alignment as it is on the host; `view` describes it there.
struct DeviceTensor {
  Tensor view;
  DeviceBytes memory;

  explicit DeviceTensor(const RandomTensor& x) : DeviceTensor(x, reinterpret_cast<uintptr_t>(x.memory.data()) % 16) {}

 private:
  DeviceTensor(const RandomTensor& x, size_t shift) : view(x.view), memory(moved(x, shift)) {
    view.data = memory.as<char>() + shift;
  }
  static DeviceBytes moved(const RandomTensor& x, size_t shift) {
    std::vector<char> content(shift + static_cast<size_t>(x.memory.bytes()), '\x5a');
    std::copy_n(x.memory.data(), x.memory.bytes(), content.data() + shift);
    return DeviceBytes(static_cast<int64_t>(content.size()), content.data());
  }
};

}  // namespace cacovid::test
