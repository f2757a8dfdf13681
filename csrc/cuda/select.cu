// Budget, selection and uniform fill in one launch. Where a frame's tokens go follows from the budgets of its video
// alone, so every block computes these for itself and none waits for another; then a warp selects from a frame.
#include "budget.cuh"
#include "kept.cuh"
#include "row_topk.cuh"

namespace cacovid::cuda {
namespace {

constexpr int most_runs = 16;
constexpr int most_warps = 8;
constexpr int64_t longest_row = 32 * warp_lanes;  // that a warp holds in registers
constexpr int long_row_warps = 8;

// Consecutive videos with one plan. Their frames are cut into `shares` items each, whose warps all select the same but
// copy different parts of the kept rows; a block works on `items_of_block` of one video.
struct Run {
  BudgetPlan plan;
  UniformFill fill;
  int64_t first_video, first_frame, first_token, first_out;
  int64_t first_slot, slot_size;  // of scratch, where the budgets of long videos are known before
  int64_t videos, first_block;
  uint32_t items, items_of_block, blocks_of_video, shares, width;
};

struct Params {
  Run runs[most_runs];
  int32_t count;
  int64_t blocks;
  ScoreRows scores;
  FrameScores frames;
  KeptOutputs kept;
  const int64_t* scratch;
  int64_t most_frames;  // of a video whose budgets are computed in shared memory
};
static_assert(sizeof(Params) <= 4096, "the arguments of a kernel fit into 4 KiB");

// Which frame, and what of it, an item is.
struct Item {
  int64_t row, token, out;  // frame and first token over all videos, first kept token of the video
  uint32_t frame, share;

  __device__ __forceinline__ Item(const Run& run, int64_t video, uint32_t number)
      : frame(number / run.shares), share(number - frame * run.shares) {
    row = run.first_frame + video * run.plan.frames + frame;
    token = run.first_token + (video * run.plan.frames + frame) * run.plan.tokens_per_frame;
    out = run.first_out + video * run.plan.num_keep;
  }
};

struct Budget {
  uint32_t ranked, ranked_before;  // tokens of the frame, and of those before, that are chosen by score
  int64_t unranked_before;         // and those that are not
  int64_t first_pick, last_pick;   // uniform picks among these

  __device__ __forceinline__ Budget(const Run& run, const Item& item, const Ranked& r)
      : ranked(r.count), ranked_before(r.before), unranked_before(item.frame * run.plan.tokens_per_frame - r.before) {
    const int64_t behind = unranked_before + run.plan.tokens_per_frame - ranked;
    const int64_t picks = run.fill.below(threadIdx.x % warp_lanes == 0 ? unranked_before : behind);
    first_pick = __shfl_sync(all_lanes, picks, 0);
    last_pick = __shfl_sync(all_lanes, picks, 1);
  }
  __device__ __forceinline__ int64_t out(const Item& item) const { return item.out + ranked_before + first_pick; }
};

// What there is one of in a frame, and the bounds of its video.
__device__ __forceinline__ void store_frame(const Params& p, const Run& run, const Item& item, int64_t video,
                                            const Budget& budget, int32_t status) {
  const SelectOutputs& to = p.kept.to;
  if (to.frame_counts != nullptr) to.frame_counts[item.row] = budget.ranked + budget.last_pick - budget.first_pick;
  if (to.frame_status != nullptr) {
    to.frame_status[item.row] = status | KeyFormat(DType::f32).flags(order_key(p.frames[item.row]));
  }
  if (to.cu_seqlens != nullptr && item.frame == 0) {
    const int64_t number = run.first_video + video;
    if (number == 0) to.cu_seqlens[0] = 0;
    to.cu_seqlens[number + 1] = static_cast<int32_t>(item.out + run.plan.num_keep);
  }
}

// Selects from a frame whose keys a warp holds. `picked`: Keys words of shared memory; `numbers`: room for a list of
// all tokens of the frame.
template <int Keys>
__device__ __forceinline__ void select_row(const Params& p, const Run& run, const Item& item, const Budget& budget,
                                           const uint32_t (&keys)[Keys], uint32_t lane, uint32_t* picked,
                                           uint16_t* numbers) {
  const uint32_t tokens = static_cast<uint32_t>(run.plan.tokens_per_frame);
  const KeyFormat format(p.scores.dtype);
  if (lane < Keys) picked[lane] = 0;
  __syncwarp();
  for (int64_t j = budget.first_pick + lane; j < budget.last_pick; j += warp_lanes) {
    const uint32_t rank = static_cast<uint32_t>(run.fill[j] - budget.unranked_before);
    atomicOr(&picked[rank / 32], 1u << rank % 32);
  }
  const Threshold threshold = find_threshold(keys, budget.ranked, format.idle);
  const uint32_t own = ranked_words(keys, threshold, lane);
  __syncwarp();
  const bool first_share = item.share == 0;
  uint32_t listed = 0, passed = 0;  // kept tokens, and tokens not ranked, so far
#pragma unroll 4
  for (uint32_t i = 0; i * warp_lanes < tokens; ++i) {
    const uint32_t ranked = __shfl_sync(all_lanes, own, i), token = i * warp_lanes + lane;
    const uint32_t rank = passed + count_before(~ranked, lane);
    const bool is_ranked = ranked >> lane & 1, is_pick = picked[rank / 32] >> rank % 32 & 1;
    const bool is_kept = is_ranked || is_pick;  // no pick is as high as the rank of what is behind the row
    const uint32_t kept = __ballot_sync(all_lanes, is_kept);
    if (is_kept) numbers[listed + count_before(kept, lane)] = static_cast<uint16_t>(token);
    if (p.kept.to.mask != nullptr && first_share && token < tokens) p.kept.to.mask[item.token + token] = is_kept;
    listed += __popc(kept);
    passed += __popc(~ranked);
  }
  __syncwarp();
  const KeptList list = {numbers, listed, item.token, budget.out(item), item.frame, item.frame * tokens, 0};
  if (first_share) {
    const char* row = p.scores.row(item.row, item.token);
    store_list(p.kept, list, run.width, lane, warp_lanes,
               [&](uint32_t number) { return format.key(load_bits(row + number * p.scores.stride, p.scores.dtype)); });
  }
  if (p.kept.columns > 0) copy_list(p.kept, list, item.share, run.shares, lane);
}

// Selects from a frame of any length, by a block: the threshold first, then tile by tile. `memory`: histogram_words,
// then a list of one tile. Returns the status of the row.
__device__ inline int32_t select_long_row(const Params& p, const Run& run, const Item& item, const Budget& budget,
                                          uint32_t* memory, Warps& block) {
  const int64_t tokens = run.plan.tokens_per_frame;
  const KeyFormat format(p.scores.dtype);
  const char* row = p.scores.row(item.row, item.token);
  int32_t status;
  const Threshold threshold = find_long_threshold(row, p.scores, tokens, budget.ranked, memory, block, &status);
  uint16_t* numbers = reinterpret_cast<uint16_t*>(memory + histogram_words);
  int64_t out = budget.out(item);
  uint32_t above = 0, equal = 0;  // of the tiles so far
  for (int64_t start = 0; start < tokens; start += blockDim.x) {
    const int64_t token = start + threadIdx.x;
    const bool inside = token < tokens;
    const uint32_t key = inside ? format.key(load_bits(row + token * p.scores.stride, p.scores.dtype)) : 0;
    const uint32_t is_above = __ballot_sync(all_lanes, inside && key > threshold.key);
    const uint32_t is_equal = __ballot_sync(all_lanes, inside && key == threshold.key);
    uint32_t here;  // less than 2^16 of either
    const uint32_t before = block.before_warp(__popc(is_above) << 16 | __popc(is_equal), &here);
    const uint32_t equals = equal + (before & 0xffff) + count_before(is_equal, block.lane);
    const uint32_t ties = equals < threshold.ties ? equals : threshold.ties;
    const uint32_t ranked_before = above + (before >> 16) + count_before(is_above, block.lane) + ties;
    const bool is_ranked = (is_above >> block.lane & 1) || ((is_equal >> block.lane & 1) && equals < threshold.ties);
    above += here >> 16;
    equal += here & 0xffff;
    const int64_t rank = budget.unranked_before + token - ranked_before;
    const int64_t pick = run.fill.below(rank);
    const bool is_pick = pick < run.fill.count && run.fill[pick] == rank;
    const bool is_kept = inside && (is_ranked || is_pick);
    const uint32_t kept = __ballot_sync(all_lanes, is_kept);
    uint32_t listed;
    const uint32_t place = block.before_warp(__popc(kept), &listed) + count_before(kept, block.lane);
    if (is_kept) numbers[place] = static_cast<uint16_t>(threadIdx.x);
    block.barrier();
    const KeptList list = {numbers,
                           listed,
                           item.token + start,
                           out,
                           item.frame,
                           static_cast<uint32_t>(item.frame * tokens + start),
                           static_cast<uint32_t>(start)};
    if (item.share == 0) {
      if (p.kept.to.mask != nullptr && inside) p.kept.to.mask[item.token + token] = is_kept;
      store_list(p.kept, list, run.width, threadIdx.x, blockDim.x, [&](uint32_t number) {
        return format.key(load_bits(row + (start + number) * p.scores.stride, p.scores.dtype));
      });
    }
    if (p.kept.columns > 0) {
      copy_list(p.kept, list, item.share * block.count + block.warp, run.shares * block.count, block.lane);
    }
    out += listed;
    block.barrier();
  }
  return status;
}

__device__ __forceinline__ Ranked known_budget(const uint32_t* before, const BudgetPlan& plan, uint32_t frame) {
  const uint32_t here = before[frame];
  const uint32_t next = frame + 1 < plan.frames ? before[frame + 1] : static_cast<uint32_t>(plan.num_ranked);
  return {here, next - here};
}

template <int Keys>
__global__ void __launch_bounds__(most_warps* warp_lanes, 2) select_kernel(const __grid_constant__ Params p) {
  int number = 0;
  while (number + 1 < p.count && blockIdx.x >= p.runs[number + 1].first_block) ++number;
  const Run& run = p.runs[number];
  uint32_t* shared = shared_memory<uint32_t>();
  Warps block(shared);
  shared += 2 * block.count * warp_lanes;
  const BudgetMemory budgets(shared, p.most_frames);
  shared += BudgetMemory::words(p.most_frames);
  uint16_t* lists = reinterpret_cast<uint16_t*>(shared + block.count * Keys);

  const uint32_t place = static_cast<uint32_t>(blockIdx.x - run.first_block),
                 number_of_video = place / run.blocks_of_video;
  const int64_t video = number_of_video;
  const uint32_t first = (place - number_of_video * run.blocks_of_video) * run.items_of_block;
  const uint32_t last = first + run.items_of_block < run.items ? first + run.items_of_block : run.items;
  const uint32_t tokens = static_cast<uint32_t>(run.plan.tokens_per_frame);
  const bool is_short = run.plan.tokens_per_frame <= longest_row;
  Level level = {};
  bool leveled = false;
  // A warp for every frame, or all warps for a long one.
  for (uint32_t at = is_short ? first + block.warp : first;; at += is_short ? block.count : 1) {
    const Item item(run, video, at < last ? at : first);
    uint32_t keys[Keys] = {};  // of this turn alone: kept from one to the next they would cost registers
    if (is_short) load_row(p.scores.row(item.row, item.token), p.scores, tokens, block.lane, keys);
    if (!leveled) {  // the first row is on its way meanwhile
      if (run.plan.frames > 1 && run.slot_size == 0) {
        level = video_budget(run.plan, p.frames, run.first_frame + video * run.plan.frames, budgets, block);
      }
      leveled = true;
    }
    if (at >= last) break;
    Ranked ranked = {0, static_cast<uint32_t>(run.plan.num_ranked)};
    if (run.slot_size > 0) {
      const int64_t* slot = p.scratch + run.first_slot + video * run.slot_size;
      ranked = known_budget(BudgetMemory::counts_in(slot, run.plan.frames), run.plan, item.frame);
    } else if (run.plan.frames > 1) {
      ranked = ranked_of(budgets.counts, level, item.frame, block.lane);
    }
    const Budget budget(run, item, ranked);
    int32_t status;
    if (is_short) {
      status = make_keys(KeyFormat(p.scores.dtype), tokens, keys);
      select_row(p, run, item, budget, keys, block.lane, shared + block.warp * Keys,
                 lists + block.warp * Keys * warp_lanes);
    } else {
      status = select_long_row(p, run, item, budget, shared, block);
    }
    if (item.share == 0 && block.lane == 0 && (is_short || block.warp == 0)) {
      store_frame(p, run, item, video, budget, status);
    }
  }
}

constexpr int64_t most_rows = int64_t{1} << 32;

// ---- launches ----------------------------------------------------------------------------------

bool is_long(const Run& run) { return run.plan.tokens_per_frame > longest_row; }

int warps_of(const Run& run, bool copies) {
  if (is_long(run)) return long_row_warps;
  return copies || run.slot_size > 0 ? 8 : warps_for(run.plan.frames, 8);
}

// Budgets cost a block time by the number of frames, a frame costs a warp the same always. So few frames get a block
// each, and from 128 on, one for every multiprocessor, they share blocks; of several videos fewer blocks each suffice.
// Copies want four times as many, for more accesses in flight.
uint32_t blocks_for_video(int64_t videos, bool copies) {
  uint32_t blocks = copies ? 512 : 128;
  for (; videos >= 4 && blocks > 1; videos /= 4) blocks /= 2;
  return blocks;
}

// Warps, or blocks for long rows, that copy the rows of one frame: 2 KiB each, but not more than a GPU runs at once.
uint32_t shares_of(const Run& run, const KeptOutputs& kept, int64_t frames) {
  if (kept.columns == 0) return 1;
  const double bytes = static_cast<double>(run.plan.num_keep) * static_cast<double>(kept.to.tokens.row_bytes);
  const double tiles = bytes / static_cast<double>(run.plan.frames) / 2048.0;
  const double most = 4096.0 / static_cast<double>(frames);
  const double shares = (tiles < most ? tiles : most) / (is_long(run) ? long_row_warps : 1);
  return shares > 1.0 ? static_cast<uint32_t>(shares) : 1;
}

template <int Keys>
int enqueue(Params* p, int warps, Stream stream) {
  int64_t words = int64_t{warps} * (Keys + Keys * warp_lanes / 2);
  for (int32_t i = 0; i < p->count; ++i) {
    const int64_t block = histogram_words + warps * warp_lanes / 2;
    if (is_long(p->runs[i]) && words < block) words = block;
  }
  words += static_cast<int64_t>(Warps::shared_words(warps)) + BudgetMemory::words(p->most_frames);
  return launch(stream, select_kernel<Keys>, p->blocks, warps * warp_lanes, 4 * static_cast<size_t>(words), *p);
}

int enqueue(Params* p, Stream stream) {
  const bool copies = p->kept.columns > 0;
  int64_t videos = 0, frames = 0, longest = 0;
  int warps = 1;
  p->blocks = 0;
  p->most_frames = 0;
  for (int32_t i = 0; i < p->count; ++i) {
    const Run& run = p->runs[i];
    videos += run.videos;
    frames += run.videos * run.plan.frames;
    if (!is_long(run) && run.plan.tokens_per_frame > longest) longest = run.plan.tokens_per_frame;
    if (warps_of(run, copies) > warps) warps = warps_of(run, copies);
    if (run.plan.frames > 1 && run.slot_size == 0 && run.plan.frames > p->most_frames) p->most_frames = run.plan.frames;
  }
  for (int32_t i = 0; i < p->count; ++i) {
    Run& run = p->runs[i];
    run.shares = shares_of(run, p->kept, frames);
    run.items = static_cast<uint32_t>(run.plan.frames) * run.shares;
    const uint32_t blocks = blocks_for_video(videos, copies), even = (run.items + blocks - 1) / blocks;
    const uint32_t least = static_cast<uint32_t>(warps);
    run.items_of_block = is_long(run) ? 1 : even > least ? even : least;
    run.blocks_of_video = (run.items + run.items_of_block - 1) / run.items_of_block;
    run.first_block = p->blocks;
    p->blocks += run.videos * run.blocks_of_video;
  }
  const int error = longest <= 8 * warp_lanes    ? enqueue<8>(p, warps, stream)
                    : longest <= 16 * warp_lanes ? enqueue<16>(p, warps, stream)
                                                 : enqueue<32>(p, warps, stream);
  p->count = 0;
  return error;
}

}  // namespace

int select_tokens(Tensor token_scores, Tensor frame_scores, cpu::Videos videos, const int64_t* widths, bool words,
                  int64_t* scratch, const SelectOutputs& out, Stream stream) {
  const FrameScores frames(frame_scores);
  if (budget_scratch(videos) > 0) {
    const int error = video_budgets(frames, videos, false, scratch, nullptr, nullptr, stream);
    if (error != 0) return error;
  }
  int64_t kept = 0, rows = 0;
  for (int64_t v = 0; v < videos.count; ++v) {
    kept += videos.plans[v].num_keep;
    rows += videos.plans[v].frames;
  }
  if (rows >= most_rows) return cudaErrorInvalidValue;
  Params p = {{}, 0, 0, ScoreRows(token_scores), frames, KeptOutputs(out, kept, words), scratch, 0};
  Run run = {};
  for (int64_t v = 0; v < videos.count; v += run.videos) {
    run.plan = videos.plans[v];
    run.fill = UniformFill(run.plan);
    run.first_video = v;
    run.width = static_cast<uint32_t>(widths[v]);
    run.slot_size = scratch_of(run.plan);
    run.videos = 1;
    while (v + run.videos < videos.count && same_plan(videos.plans[v + run.videos], run.plan) &&
           widths[v + run.videos] == widths[v]) {
      ++run.videos;
    }
    p.runs[p.count++] = run;
    run.first_frame += run.videos * run.plan.frames;
    run.first_token += run.videos * run.plan.frames * run.plan.tokens_per_frame;
    run.first_out += run.videos * run.plan.num_keep;
    run.first_slot += run.videos * run.slot_size;
    if (p.count < most_runs && v + run.videos < videos.count) continue;
    const int error = enqueue(&p, stream);
    if (error != 0) return error;
  }
  return 0;
}

// A segment is a video of one frame, of which all kept tokens are chosen by score.
int segmented_topk(Tensor scores, const int64_t* offsets, const int64_t* k, int64_t segments, bool words,
                   int64_t* indices, int32_t* status, Stream stream) {
  if (segments >= most_rows) return cudaErrorInvalidValue;
  SelectOutputs out = {};
  out.indices = indices;
  out.frame_status = status;
  Params p = {{}, 0, 0, ScoreRows(scores), FrameScores(Tensor{}), KeptOutputs(out, 0, words), nullptr, 0};
  Run run = {};
  run.plan.frames = 1;
  run.width = 1;
  for (int64_t s = 0; s < segments; s += run.videos) {
    run.plan.tokens_per_frame = offsets[s + 1] - offsets[s];
    run.plan.num_keep = run.plan.num_ranked = k[s];
    run.first_frame = run.first_video = s;
    run.first_token = offsets[s];
    run.videos = 1;
    for (int64_t t = s + 1; t < segments && offsets[t + 1] - offsets[t] == run.plan.tokens_per_frame && k[t] == k[s];) {
      ++run.videos, ++t;
    }
    p.runs[p.count++] = run;
    run.first_out += run.videos * k[s];
    if (p.count < most_runs && s + run.videos < segments) continue;
    const int error = enqueue(&p, stream);
    if (error != 0) return error;
  }
  return 0;
}

}  // namespace cacovid::cuda
