// The CUDA half of the core, with the conventions of ops.h: tensors are on the device of the stream. Every function
// enqueues its kernels and returns; it neither allocates nor waits, and leaves the current device as it was. What it
// returns is 0 or the number of a CUDA error.
#pragma once

#include "cacovid/ops.h"

namespace cacovid::cuda {

struct Stream {
  int device;
  void* handle;  // a cudaStream_t
};

const char* error_text(int error);

// ---- gather -------------------------------------------------------------------------------------
// As cpu::gather_rows: one launch for every 8 tensors.
int gather_rows(const Tensor* xs, const int32_t* dims, int64_t count, const int64_t* index, int64_t kept,
                void* const* targets, Stream stream);

}  // namespace cacovid::cuda
