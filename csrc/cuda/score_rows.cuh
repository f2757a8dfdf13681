// Scores of frames and tokens, wherever their strides put them, as numbers and as order keys.
#pragma once

#include "cacovid/order.h"
#include "cacovid/status.h"
#include "cacovid/tensor.h"
#include "launch.cuh"

namespace cacovid::cuda {

__device__ __forceinline__ float load_score(const char* at, DType dtype) {
  if (dtype == DType::f32) return __ldg(reinterpret_cast<const float*>(at));
  const uint16_t bits = __ldg(reinterpret_cast<const uint16_t*>(at));
  return dtype == DType::bf16 ? load_float(bf16_t{bits}) : load_float(f16_t{bits});
}

// Order keys straight from a format's bits. Those of 16 bits leave the lower half of the key empty, so that a search
// need not look there; for negative scores that half is cleared.
struct KeyFormat {
  uint32_t infinity;  // its bits, moved to the front
  int32_t idle;       // bits at the end of a key that are 0

  __device__ __forceinline__ explicit KeyFormat(DType dtype)
      : infinity(dtype == DType::f16 ? 0x7c000000u : 0x7f800000u), idle(dtype == DType::f32 ? 0 : 16) {}
  // Bits of a score, where `raw` is what load_bits gave.
  __device__ __forceinline__ uint32_t key(uint32_t raw) const {
    return order_key_of(raw << idle, infinity) & (0xffffffffu << idle);
  }
  __device__ __forceinline__ uint32_t posinf() const { return infinity | 0x80000000u; }
  __device__ __forceinline__ int32_t flags(uint32_t key) const {
    return key == key_nan ? status_nan : key == posinf() ? status_posinf : status_ok;
  }
};

__device__ __forceinline__ uint32_t load_bits(const char* at, DType dtype) {
  return dtype == DType::f32 ? __ldg(reinterpret_cast<const uint32_t*>(at))
                             : __ldg(reinterpret_cast<const uint16_t*>(at));
}

// Offset of a frame of videos of equal length. Launchers refuse 2^32 frames: nobody pays for a longer division.
__device__ __forceinline__ int64_t in_videos(int64_t frame, uint32_t frames_of_video, int64_t video_stride,
                                             int64_t stride) {
  const uint32_t number = static_cast<uint32_t>(frame), video = number / frames_of_video;
  return video * video_stride + (number - video * frames_of_video) * stride;
}

// One number per frame, [F] or [B, T]; all 0 where there is no tensor.
struct FrameScores {
  const char* data;
  int64_t stride, video_stride;  // bytes
  uint32_t frames_of_video;      // 0: [F]
  DType dtype;

  explicit FrameScores(const Tensor& t)
      : data(t.as<const char>()), stride(0), video_stride(0), frames_of_video(0), dtype(t.dtype) {
    const int64_t item = item_size(t.dtype);
    if (t.ndim > 0) stride = t.strides[t.ndim - 1] * item;
    if (t.ndim == 2) {
      video_stride = t.strides[0] * item;
      frames_of_video = static_cast<uint32_t>(t.sizes[1]);
    }
  }

  __device__ __forceinline__ float operator[](int64_t frame) const {
    if (data == nullptr) return 0.0f;
    int64_t offset = frame * stride;
    if (frames_of_video > 0) offset = in_videos(frame, frames_of_video, video_stride, stride);
    return load_score(data + offset, dtype);
  }
};

// Rows of tokens: [N], one behind the other, [S, P] or [B, T, P].
struct ScoreRows {
  const char* data;
  int64_t stride, row_stride, video_stride;  // bytes
  uint32_t rows_of_video;                    // 0: not [B, T, P]
  DType dtype;
  bool packed;

  explicit ScoreRows(const Tensor& t)
      : data(t.as<const char>()), stride(0), row_stride(0), video_stride(0), rows_of_video(0), dtype(t.dtype) {
    const int64_t item = item_size(t.dtype);
    stride = t.strides[t.ndim - 1] * item;
    packed = t.ndim == 1;
    if (t.ndim >= 2) row_stride = t.strides[t.ndim - 2] * item;
    if (t.ndim == 3) {
      video_stride = t.strides[0] * item;
      rows_of_video = static_cast<uint32_t>(t.sizes[1]);
    }
  }

  // Row number `row`, which starts at flat position `start`.
  __device__ __forceinline__ const char* row(int64_t row, int64_t start) const {
    if (packed) return data + start * stride;
    if (rows_of_video == 0) return data + row * row_stride;
    return data + in_videos(row, rows_of_video, video_stride, row_stride);
  }
};

}  // namespace cacovid::cuda
