// A GPU made of one CPU core: it runs the threads of a block as fibers that switch at warp and block operations, and
// stops with a message where a real GPU would hang or compute garbage: lanes of one warp that wait for different
// operations, a lane that asks for a value of a lane outside the mask, a thread that left before a barrier.
//
// Blocks and threads run in shuffled order. Shared memory starts as garbage. Under AddressSanitizer it has its exact
// size; under ThreadSanitizer each thread is one of its fibers and only __syncwarp and __syncthreads order memory, so
// that a race inside or between blocks is reported as one between threads of a program.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

namespace simt {

struct Dim {
  unsigned x = 1, y = 1, z = 1;
  constexpr Dim(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

extern __thread unsigned char* dynamic_shared;  // of the running block

enum class Operation : uint8_t { none, barrier, warp_barrier, ballot, shuffle, match, add, minimum, maximum, any_of };

// Waits until every lane of `mask` (every thread of the block for `barrier`) asks for the same operation, and returns
// the lane's result. `operand` is the source lane of a shuffle.
uint64_t wait(Operation operation, uint32_t mask, uint64_t value = 0, int operand = 0);

[[noreturn]] void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Runs `thread` once for every thread of the grid; dynamic shared memory of `shared_bytes` per block.
void run(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& thread);

// Most dynamic shared memory of a block of this kernel: 48 KiB, unless set before, to one value up to 99 KiB.
size_t shared_limit(const void* kernel);
bool set_shared_limit(const void* kernel, int bytes);

int64_t launches();  // grids that ran so far

// Memory that only kernels may touch: outside of a run every access to it faults, as does one behind its end.
void* device_alloc(size_t bytes);
void device_free(void* memory);
void copy_to_device(void* device, const void* host, size_t bytes);
void copy_from_device(void* host, const void* device, size_t bytes);

}  // namespace simt

// What the running thread knows of itself, by the names that kernels use.
struct uint3 {
  unsigned x, y, z;
};
extern __thread uint3 threadIdx, blockIdx, blockDim, gridDim;
