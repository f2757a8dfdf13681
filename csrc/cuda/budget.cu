// Budgets by themselves: allocate_budget, and what a selection from very many frames needs beforehand.
#include "budget.cuh"

#include "cacovid/status.h"

namespace cacovid::cuda {
namespace {

constexpr int most_runs = 32;
constexpr int most_warps = 16;

// Videos with one plan, a block for each.
struct BudgetRun {
  BudgetPlan plan;
  int64_t first_frame, first_block;
  int64_t first_slot, slot_size;  // of scratch; none in shared memory
};

struct BudgetRuns {
  BudgetRun each[most_runs];
  int32_t count;
  int64_t blocks;
  FrameScores scores;
  int64_t* scratch;
  int64_t* counts;
  int32_t* status;
};
static_assert(sizeof(BudgetRuns) <= 4096, "the arguments of a kernel fit into 4 KiB");

__global__ void __launch_bounds__(most_warps* warp_lanes) budget_kernel(const __grid_constant__ BudgetRuns runs) {
  int number = 0;
  while (number + 1 < runs.count && blockIdx.x >= runs.each[number + 1].first_block) ++number;
  const BudgetRun& run = runs.each[number];
  const int64_t video = blockIdx.x - run.first_block;
  const int64_t first = run.first_frame + video * run.plan.frames;
  uint32_t* shared = shared_memory<uint32_t>();
  Warps block(shared);
  void* memory = shared + 2 * block.count * warp_lanes;
  if (run.slot_size > 0) memory = runs.scratch + run.first_slot + video * run.slot_size;
  const BudgetMemory budget(memory, run.plan.frames);
  const Level level = video_budget(run.plan, runs.scores, first, budget, block);

  const uint32_t frames = static_cast<uint32_t>(run.plan.frames);
  uint32_t sum_done = 0, level_done = 0;
  for (uint32_t start = 0; start < frames; start += blockDim.x) {
    const uint32_t f = start + threadIdx.x;
    const uint32_t raw = f < frames ? level.mirrored(budget.counts[f]) : 0;
    const uint32_t raised = f < frames ? Largest()(raw, level.water) : 0;
    const bool at_level = f < frames && raw <= level.water;
    uint32_t sum_here, level_here;
    const uint32_t sum = sum_done + block.before_thread(raised, &sum_here);
    const uint32_t levels = level_done + block.before_thread(at_level ? 1 : 0, &level_here);
    sum_done += sum_here;
    level_done += level_here;
    if (f >= frames) continue;
    const uint32_t before = sum + (levels < level.rest ? levels : level.rest);
    if (run.slot_size > 0) budget.counts[f] = level.down ? f * level.tokens - before : before;
    if (runs.counts != nullptr) {
      runs.counts[first + f] = level.mirrored(raised + (at_level && levels < level.rest ? 1 : 0));
    }
    if (runs.status != nullptr) {
      const uint32_t key = order_key(runs.scores[first + f]);
      runs.status[first + f] = key == key_nan ? status_nan : key == key_posinf ? status_posinf : status_ok;
    }
  }
}

int enqueue(BudgetRuns* runs, Stream stream) {
  int64_t most = 1, shared = 0;
  for (int32_t i = 0; i < runs->count; ++i) {
    const BudgetRun& run = runs->each[i];
    most = run.plan.frames > most ? run.plan.frames : most;
    const int64_t words = run.slot_size > 0 ? 0 : BudgetMemory::words(run.plan.frames);
    shared = words > shared ? words : shared;
  }
  const int warps = warps_for(most, most_warps);
  const size_t bytes = 4 * (Warps::shared_words(warps) + static_cast<size_t>(shared));
  const int error = launch(stream, budget_kernel, runs->blocks, warps * warp_lanes, bytes, *runs);
  runs->count = 0;
  runs->blocks = 0;
  return error;
}

}  // namespace

int64_t budget_scratch(cpu::Videos videos) {
  int64_t entries = 0;
  for (int64_t v = 0; v < videos.count; ++v) entries += scratch_of(videos.plans[v]);
  return entries;
}

int video_budgets(const FrameScores& scores, cpu::Videos videos, bool all, int64_t* scratch, int64_t* counts,
                  int32_t* status, Stream stream) {
  BudgetRuns runs = {{}, 0, 0, scores, scratch, counts, status};
  int64_t frame = 0, slot = 0;
  for (int64_t v = 0, end = 0; v < videos.count; v = end) {
    const BudgetPlan& plan = videos.plans[v];
    for (end = v + 1; end < videos.count && same_plan(videos.plans[end], plan);) ++end;
    const int64_t size = scratch_of(plan);
    if (all || size > 0) {
      runs.each[runs.count++] = {plan, frame, runs.blocks, slot, size};
      runs.blocks += end - v;
    }
    frame += (end - v) * plan.frames;
    slot += (end - v) * size;
    if (runs.count < most_runs && end < videos.count) continue;
    const int error = enqueue(&runs, stream);
    if (error != 0) return error;
  }
  return 0;
}

int allocate_budget(Tensor frame_scores, cpu::Videos videos, int64_t* scratch, int64_t* counts, int32_t* frame_status,
                    Stream stream) {
  return video_budgets(FrameScores(frame_scores), videos, true, scratch, counts, frame_status, stream);
}

}  // namespace cacovid::cuda
