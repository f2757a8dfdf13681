// Compiled without ThreadSanitizer's instrumentation: what the machine does is no access of a kernel.
#include "simt.h"

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <random>
#include <vector>

#if defined(SIMT_ADDRESS_SANITIZER)
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(SIMT_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif

__thread uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace simt {

__thread unsigned char* dynamic_shared = nullptr;

namespace {

constexpr size_t stack_bytes = 256 << 10;
constexpr int warp_lanes = 32;
constexpr int epochs = 16;  // a lane is at most one barrier ahead of another

#if defined(SIMT_THREAD_SANITIZER)
constexpr int fiber_sets = 2;  // neighbouring blocks have threads of their own
#else
constexpr int fiber_sets = 1;
#endif

struct Lane {
  uint3 thread = {};
  ucontext_t registers;
  unsigned char* stack = nullptr;
  void* stack_pointer = nullptr;
  void* fiber = nullptr;
  void* fake_stack = nullptr;
  Operation operation = Operation::none;
  uint32_t mask = 0;
  uint64_t value = 0, result = 0;
  int operand = 0;
  void* order = nullptr;  // what a barrier orders memory through
  bool done = true;
};

class Machine;
thread_local Machine* machine = nullptr;

// Saves the callee's registers, and continues where `to` was saved. ucontext would ask the kernel about signals.
#if defined(__x86_64__)
extern "C" void simt_switch(void** from, void* to);
asm(R"(
.text
.hidden simt_switch
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

void start_lane();

class Machine {
 public:
  void run_grid(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& thread) {
    threads_ = int64_t{block.x} * block.y * block.z;
    if (threads_ < 1 || threads_ > 1024) stop("a block of %lld threads", static_cast<long long>(threads_));
    thread_ = &thread;
    int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
    if (blocks < 1 || grid.y > 65535 || grid.z > 65535) stop("a grid of %u x %u x %u", grid.x, grid.y, grid.z);
    std::vector<int64_t> order(blocks);
    for (int64_t b = 0; b < blocks; ++b) order[b] = b;
    std::shuffle(order.begin(), order.end(), random_);
    allocate_shared(blocks, shared_bytes);
    release(&begin_);
    for (int64_t at = 0; at < blocks; ++at) {
      const int64_t b = order[at];
      const uint3 place = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                           static_cast<unsigned>(b / grid.x / grid.y)};
      run_block(lanes_of(static_cast<int>(at % fiber_sets)), place, grid, block, shared_of(at, shared_bytes));
    }
    acquire(&end_);
    free_shared(blocks, shared_bytes);
  }

  uint64_t wait(Operation operation, uint32_t mask, uint64_t value, int operand) {
    Lane& lane = *current_;
    lane.operation = operation;
    lane.mask = mask;
    lane.value = value;
    lane.operand = operand;
    const bool orders = operation == Operation::barrier || operation == Operation::warp_barrier;
    if (orders) release(lane.order = next_order(lane));
    leave(false);
    if (orders) acquire(lane.order);
    return lane.result;
  }

  void lane_main() {
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
    acquire(&begin_);
    (*thread_)();
    release(&end_);
    current_->done = true;
    leave(true);
    std::abort();
  }

 private:
  std::vector<Lane>& lanes_of(int set) {
    std::vector<Lane>& lanes = lanes_[set];
    while (static_cast<int64_t>(lanes.size()) < threads_) {
      Lane lane;
      void* memory = mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (memory == MAP_FAILED) stop("no memory for the stack of a thread");
      lane.stack = static_cast<unsigned char*>(memory);
#if defined(SIMT_THREAD_SANITIZER)
      lane.fiber = __tsan_create_fiber(0);
#endif
      lanes.push_back(lane);
    }
    return lanes;
  }

  void prepare(Lane& lane) {
    lane.done = false;
    lane.operation = Operation::none;
    lane.fake_stack = nullptr;
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(lane.stack + stack_bytes) - 2;
    *--top = nullptr;  // where start_lane would return to; keeps its frame aligned to 16 bytes
    *--top = reinterpret_cast<void*>(&start_lane);
    top -= 6;  // callee-saved registers
    std::fill(top, top + 6, nullptr);
    lane.stack_pointer = top;
#else
    getcontext(&lane.registers);
    lane.registers.uc_stack.ss_sp = lane.stack;
    lane.registers.uc_stack.ss_size = stack_bytes;
    lane.registers.uc_link = nullptr;
    makecontext(&lane.registers, &start_lane, 0);
#endif
  }

  void run_block(std::vector<Lane>& lanes, uint3 place, Dim grid, Dim block, unsigned char* shared) {
    lanes_here_ = &lanes;
    blockIdx = place;
    blockDim = {block.x, block.y, block.z};
    gridDim = {grid.x, grid.y, grid.z};
    dynamic_shared = shared;
    epoch_.assign((threads_ + warp_lanes - 1) / warp_lanes + 1, 0);
    std::vector<int64_t> order(threads_);
    for (int64_t i = 0; i < threads_; ++i) {
      order[i] = i;
      prepare(lanes[i]);
      lanes[i].thread = {static_cast<unsigned>(i % block.x), static_cast<unsigned>(i / block.x % block.y),
                         static_cast<unsigned>(i / block.x / block.y)};
    }
    std::shuffle(order.begin(), order.end(), random_);
    for (int64_t left = threads_; left > 0;) {
      bool moved = false;
      for (const int64_t i : order) {
        if (lanes[i].done || lanes[i].operation != Operation::none) continue;
        enter(lanes[i]);
        left -= lanes[i].done;
        moved = true;
      }
      moved = resolve_warps(lanes) || moved;
      moved = resolve_barrier(lanes) || moved;
      if (!moved && left > 0) report_hang(lanes);
    }
  }

  void enter(Lane& lane) {
    current_ = &lane;
    threadIdx = lane.thread;
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(&fake_stack_, lane.stack, stack_bytes);
#endif
#if defined(SIMT_THREAD_SANITIZER)
    scheduler_fiber_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(lane.fiber, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    simt_switch(&scheduler_, lane.stack_pointer);
#else
    swapcontext(&scheduler_registers_, &lane.registers);
#endif
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  void leave(bool forever) {
    Lane& lane = *current_;
    (void)forever;
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_start_switch_fiber(forever ? nullptr : &lane.fake_stack, scheduler_stack_, scheduler_stack_bytes_);
#endif
#if defined(SIMT_THREAD_SANITIZER)
    __tsan_switch_to_fiber(scheduler_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__x86_64__)
    simt_switch(&lane.stack_pointer, scheduler_);
#else
    swapcontext(&lane.registers, &scheduler_registers_);
#endif
#if defined(SIMT_ADDRESS_SANITIZER)
    __sanitizer_finish_switch_fiber(lane.fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
#endif
  }

  int64_t number_of(const Lane& lane) const { return &lane - lanes_here_->data(); }

  // Barriers that follow each other order memory through different words, so that a lane which is one ahead says
  // nothing to those behind.
  void* next_order(const Lane& lane) {
    const bool block = lane.operation == Operation::barrier;
    const size_t group = block ? epoch_.size() - 1 : static_cast<size_t>(number_of(lane) / warp_lanes);
    return &orders_[group][epoch_[group] % epochs];
  }

  bool resolve_warps(std::vector<Lane>& lanes) {
    bool moved = false;
    for (int64_t first = 0; first < threads_; first += warp_lanes) {
      const int count = static_cast<int>(std::min<int64_t>(warp_lanes, threads_ - first));
      for (int i = 0; i < count; ++i) {
        const Lane& asking = lanes[first + i];
        if (asking.done || asking.operation == Operation::none || asking.operation == Operation::barrier) continue;
        uint32_t together = 0;
        for (int j = 0; j < count; ++j) {
          const Lane& lane = lanes[first + j];
          if (!lane.done && lane.operation == asking.operation && lane.mask == asking.mask) together |= 1u << j;
        }
        if ((asking.mask >> i & 1u) == 0) stop("lane %d is not in its own mask %08x", i, asking.mask);
        if (together != asking.mask) continue;
        if (asking.operation == Operation::warp_barrier) ++epoch_[static_cast<size_t>(first / warp_lanes)];
        resolve(&lanes[first], together);
        moved = true;
      }
    }
    return moved;
  }

  static void resolve(Lane* warp, uint32_t mask) {
    uint64_t results[warp_lanes] = {};
    for (int i = 0; i < warp_lanes; ++i) {
      if ((mask >> i & 1u) != 0) results[i] = result_of(warp, mask, i);
    }
    for (int i = 0; i < warp_lanes; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      warp[i].result = results[i];
      warp[i].operation = Operation::none;
    }
  }

  static uint64_t result_of(const Lane* warp, uint32_t mask, int asking) {
    const Operation operation = warp[asking].operation;
    if (operation == Operation::shuffle) {
      const int source = warp[asking].operand;
      if (source < 0 || source >= warp_lanes || (mask >> source & 1u) == 0) {
        stop("lane %d asks for a value of lane %d, which mask %08x leaves out", asking, source, mask);
      }
      return warp[source].value;
    }
    uint64_t result = operation == Operation::minimum ? ~uint64_t{0} : 0;
    for (int i = 0; i < warp_lanes; ++i) {
      if ((mask >> i & 1u) == 0) continue;
      const uint64_t value = warp[i].value;
      switch (operation) {
        case Operation::ballot: result |= static_cast<uint64_t>(value != 0) << i; break;
        case Operation::match: result |= static_cast<uint64_t>(value == warp[asking].value) << i; break;
        case Operation::add: result += value; break;
        case Operation::minimum: result = std::min(result, value); break;
        case Operation::maximum: result = std::max(result, value); break;
        case Operation::any_of: result |= value; break;
        default: break;
      }
    }
    return result;
  }

  bool resolve_barrier(std::vector<Lane>& lanes) {
    int64_t waiting = 0, done = 0, sum = 0;
    for (int64_t i = 0; i < threads_; ++i) {
      const bool here = !lanes[i].done && lanes[i].operation == Operation::barrier;
      waiting += here;
      done += lanes[i].done;
      sum += here ? static_cast<int64_t>(lanes[i].value) : 0;
    }
    if (waiting == 0 || waiting + done < threads_) return false;
    if (done > 0)
      stop("%lld threads of a block wait at a barrier, the others have left", static_cast<long long>(waiting));
    ++epoch_.back();
    for (int64_t i = 0; i < threads_; ++i) {
      lanes[i].result = static_cast<uint64_t>(sum);
      lanes[i].operation = Operation::none;
    }
    return true;
  }

  [[noreturn]] void report_hang(const std::vector<Lane>& lanes) const {
    std::fprintf(stderr, "simt: threads of a block wait for each other\n");
    for (int64_t i = 0; i < threads_; ++i) {
      if (lanes[i].done) continue;
      std::fprintf(stderr, "  thread %lld: operation %d, mask %08x\n", static_cast<long long>(i),
                   static_cast<int>(lanes[i].operation), lanes[i].mask);
    }
    stop("a hang");
  }

  // ---- shared memory
  void allocate_shared(int64_t blocks, size_t bytes) {
    (void)blocks;
#if defined(SIMT_THREAD_SANITIZER)
    // A place of its own for every block: a second use would look like a race.
    arena_bytes_ = std::max<size_t>(static_cast<size_t>(blocks) * ((bytes + 15) / 16 * 16), 16);
    void* memory = mmap(nullptr, arena_bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) stop("no memory for shared memory");
    arena_ = static_cast<unsigned char*>(memory);
#else
    arena_ = static_cast<unsigned char*>(aligned_alloc(16, std::max<size_t>((bytes + 15) / 16 * 16, 16)));
#endif
  }

  unsigned char* shared_of(int64_t block, size_t bytes) {
    unsigned char* shared = arena_;
#if defined(SIMT_THREAD_SANITIZER)
    shared += static_cast<size_t>(block) * ((bytes + 15) / 16 * 16);
#else
    (void)block;
#endif
    for (size_t i = 0; i < bytes; ++i) shared[i] = static_cast<unsigned char>(random_());
    return shared;
  }

  void free_shared(int64_t, size_t) {
#if defined(SIMT_THREAD_SANITIZER)
    munmap(arena_, arena_bytes_);
#else
    free(arena_);
#endif
  }

  static void acquire(void* at) {
    (void)at;
#if defined(SIMT_THREAD_SANITIZER)
    __tsan_acquire(at);
#endif
  }
  static void release(void* at) {
    (void)at;
#if defined(SIMT_THREAD_SANITIZER)
    __tsan_release(at);
#endif
  }

  int64_t threads_ = 0;
  const std::function<void()>* thread_ = nullptr;
  std::vector<Lane> lanes_[fiber_sets];
  std::vector<Lane>* lanes_here_ = nullptr;
  Lane* current_ = nullptr;
  void* scheduler_ = nullptr;
  ucontext_t scheduler_registers_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
  void *fake_stack_ = nullptr, *scheduler_fiber_ = nullptr;
  std::vector<int64_t> epoch_;
  char orders_[1024 / warp_lanes + 1][epochs] = {};
  char begin_ = 0, end_ = 0;
  unsigned char* arena_ = nullptr;
  size_t arena_bytes_ = 0;
  std::minstd_rand random_{1};
};

void start_lane() { machine->lane_main(); }

struct DeviceMemory {
  unsigned char* pages;
  size_t page_bytes;
};
std::mutex device_lock;
std::map<void*, DeviceMemory>& device_memory() {
  static auto* all = new std::map<void*, DeviceMemory>;
  return *all;
}
std::map<const void*, size_t>& shared_limits() {
  static auto* all = new std::map<const void*, size_t>;
  return *all;
}
int device_users = 0;
std::atomic<int64_t> grids{0};

void open_device_memory(bool open) {
  const std::lock_guard<std::mutex> lock(device_lock);
  device_users += open ? 1 : -1;
  if (device_users != (open ? 1 : 0)) return;
  for (const auto& [start, m] : device_memory()) {
    mprotect(m.pages, m.page_bytes, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
}

}  // namespace

uint64_t wait(Operation operation, uint32_t mask, uint64_t value, int operand) {
  return machine->wait(operation, mask, value, operand);
}

void stop(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::fprintf(stderr, "simt: ");
  std::vfprintf(stderr, format, arguments);
  std::fprintf(stderr, " (block %u, thread %u)\n", blockIdx.x, threadIdx.x);
  va_end(arguments);
  std::abort();
}

void run(Dim grid, Dim block, size_t shared_bytes, const std::function<void()>& thread) {
  thread_local Machine here;
  machine = &here;
  ++grids;
  open_device_memory(true);
  here.run_grid(grid, block, shared_bytes, thread);
  open_device_memory(false);
}

size_t shared_limit(const void* kernel) {
  const std::lock_guard<std::mutex> lock(device_lock);
  const auto found = shared_limits().find(kernel);
  return found == shared_limits().end() ? size_t{48} << 10 : found->second;
}

bool set_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || bytes > 99 << 10) return false;
  const std::lock_guard<std::mutex> lock(device_lock);
  return shared_limits().emplace(kernel, bytes).first->second == static_cast<size_t>(bytes);
}

int64_t launches() { return grids; }

void* device_alloc(size_t bytes) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t used = (bytes + page - 1) / page * page;
  void* memory = mmap(nullptr, used + page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) stop("no memory");
  unsigned char* pages = static_cast<unsigned char*>(memory);
  // As far back as alignment to 16 bytes allows: the page behind is never opened.
  void* start = pages + (used - (bytes + 15) / 16 * 16);
  const std::lock_guard<std::mutex> lock(device_lock);
  device_memory()[start] = {pages, used};
  return start;
}

void device_free(void* memory) {
  if (memory == nullptr) return;
  const std::lock_guard<std::mutex> lock(device_lock);
  const DeviceMemory m = device_memory().at(memory);
  munmap(m.pages, m.page_bytes + static_cast<size_t>(sysconf(_SC_PAGESIZE)));
  device_memory().erase(memory);
}

void copy_to_device(void* device, const void* host, size_t bytes) {
  open_device_memory(true);
  std::copy_n(static_cast<const unsigned char*>(host), bytes, static_cast<unsigned char*>(device));
  open_device_memory(false);
}

void copy_from_device(void* host, const void* device, size_t bytes) {
  open_device_memory(true);
  std::copy_n(static_cast<const unsigned char*>(device), bytes, static_cast<unsigned char*>(host));
  open_device_memory(false);
}

}  // namespace simt
