// Online combination space sampling in one launch: blocks for the tokens of every frame, and blocks for the frames of
// every video. A block ranks its scores once and then draws a chunk of samples.
//
// For 32 frames of 196 tokens, 23 samples, 25 groups of up to 8: 32 + 1 blocks, each of which holds all its samples in
// one round, 8 lanes apiece. What takes time is one chain: the load of the scores, the ranking (four barriers, some 40
// reads of shared memory), a division for every group that is capped (3 to 9 as a rule), ten rounds of Philox for the
// tokens of a group, 7 exchanges between lanes.
#include "combination_draws.cuh"
#include "scores.cuh"

namespace cacovid::cuda {
namespace {

constexpr int threads = 256;
constexpr int most_videos = 36;          // of one launch: their plans are a kernel's arguments
constexpr int64_t blocks_wanted = 1024;  // enough for every GPU: more of them would only repeat the ranking

struct Video {
  double group_cap;
  int64_t first_token, first_frame, first_column, first_frame_column, first_word;
  int32_t first_block;
  int32_t frames, tokens, num_draw, num_frames;
  int32_t num_groups, group_size, remainder;
  int32_t chunk, chunks;              // samples of a block, and blocks of a frame
  int32_t frame_chunk, frame_chunks;  // the same of frame combinations
};

struct Call {
  Video videos[most_videos];
  int32_t count, first_video, all_videos;
  Scores scores, frame_scores;
  const int64_t* added_steps;
  uint64_t seed;
  uint32_t step;
  bool strict;
  int32_t samples, frame_samples;
  int64_t columns, frame_columns, frames, words;  // of a row of the outputs
  cpu::CombinationOutputs out;
  uint32_t* packed;
};
static_assert(sizeof(Call) <= 4096, "the arguments of a kernel fit into 4 KiB");
static_assert(Space::bytes(most_combination_tokens, most_combination_tokens, most_combination_tokens, true) <=
                  static_cast<int64_t>(most_shared_bytes),
              "a block has this much shared memory");

__host__ __device__ constexpr int32_t lanes_of(int64_t largest_group) {
  return largest_group <= 8 ? 8 : largest_group <= 16 ? 16 : largest_group <= 32 ? 32 : 0;
}
int64_t larger_group(const Video& v) { return v.group_size + (v.remainder > 0 ? 1 : 0); }

__global__ void __launch_bounds__(threads, 2) combinations_kernel(const __grid_constant__ Call c) {
  int number = 0;
  while (number + 1 < c.count && static_cast<int>(blockIdx.x) >= c.videos[number + 1].first_block) ++number;
  const Video& v = c.videos[number];
  const int block = static_cast<int>(blockIdx.x) - v.first_block, token_blocks = v.frames * v.chunks;
  const bool frames = block >= token_blocks;
  const int64_t video = c.first_video + number;

  Draws d;
  d.seed = c.seed;
  d.step = c.step + (c.added_steps == nullptr ? 0 : static_cast<uint32_t>(*c.added_steps));
  d.row = static_cast<uint32_t>(video);
  int64_t first_score, score_step;
  int32_t* status;
  if (frames) {
    const int chunk = block - token_blocks;
    d.groups = {v.frames, 1, v.frames, 0};
    d.wanted = v.num_frames;
    d.begin = chunk * v.frame_chunk;
    d.end = min(d.begin + v.frame_chunk, c.frame_samples);
    d.stream = stream_frames;
    d.frame = d.first_column = 0;
    d.first_item = v.first_frame;
    d.indices = c.out.frame_indices + v.first_frame_column;
    d.group_of = nullptr;
    d.log_prob = c.out.frame_log_prob + video;
    d.packed = nullptr;
    d.index_stride = c.frame_columns;
    d.stride = c.all_videos;
    d.packed_stride = 0;
    status = c.out.frame_draw_status + video;
    first_score = score_step = 0;
  } else {
    const int frame = static_cast<int>(static_cast<unsigned>(block) / static_cast<unsigned>(v.chunks));
    const int64_t row = v.first_frame + frame, words = (v.tokens + 31) / 32;
    d.groups = {v.tokens, v.num_groups, v.group_size, v.remainder};
    d.wanted = v.num_draw;
    d.begin = (block - frame * v.chunks) * v.chunk;
    d.end = min(d.begin + v.chunk, c.samples);
    d.stream = stream_tokens;
    d.frame = static_cast<uint32_t>(frame);
    d.first_column = static_cast<uint32_t>(frame) * static_cast<uint32_t>(v.tokens);
    d.first_item = v.first_token + int64_t{frame} * v.tokens;
    d.indices = c.out.indices + v.first_column + int64_t{frame} * v.num_draw;
    d.group_of = c.out.groups + row;
    d.log_prob = c.out.log_prob + row;
    d.packed = c.packed == nullptr ? nullptr : c.packed + v.first_word + frame * words;
    d.index_stride = c.columns;
    d.stride = c.frames;
    d.packed_stride = c.words;
    status = c.out.frame_status + row;
    first_score = c.scores.row(row, d.first_item);
    score_step = c.scores.step();
  }
  const int items = d.groups.items;
  d.lanes = lanes_of(d.groups.length(0));
  const Space space(shared_memory<unsigned char>(), items, d.groups.count, frames ? items : d.groups.count,
                    d.lanes == 0);

  for (int i = threadIdx.x; i < padded_run(items); i += threads) {
    uint64_t word = 0;
    if (i < items) {
      const float score = frames ? c.frame_scores.load(c.frame_scores.element(v.first_frame + i))
                                 : c.scores.load(first_score + i * score_step);
      word = rank_word(order_key(score), static_cast<uint32_t>(i));
    }
    space.words[i] = word;
  }
  const uint32_t group_bits = frames ? 0 : d.group_bits(min(first_sample_of_lane(d), d.end - 1));
  __syncthreads();
  const uint64_t* ranked = sort_falling(space.words, space.other, items);
  fill_exps(ranked, space, items);
  __syncthreads();
  if (d.begin == 0 && threadIdx.x == 0) {
    const uint32_t best = static_cast<uint32_t>(ranked[0] >> 32),
                   worst = static_cast<uint32_t>(ranked[items - 1] >> 32);
    *status = (worst == key_nan ? status_nan : 0) | (best == key_posinf ? status_posinf : 0) |
              (*space.valid < d.wanted ? status_short : 0);
  }
  frames ? find_frames(space, items, c.frame_samples, c.strict) : find_groups(space, d.groups, d.wanted, v.group_cap);
  __syncthreads();
  d.lanes > 0 ? draw_by_lanes(d, space, ranked, group_bits) : draw_by_block(d, space, ranked, group_bits);
}

// Samples of a block: as many as it holds at once, several times that where there are many rows.
int32_t chunk_of(int64_t samples, int64_t largest_group, int64_t rows) {
  const int32_t lanes = lanes_of(largest_group);
  const int64_t round = lanes > 0 ? threads / lanes : 1, rounds = (samples + round - 1) / round;
  const int64_t blocks = rows < blocks_wanted ? blocks_wanted / rows : 1;
  return static_cast<int32_t>(round * ((rounds + blocks - 1) / blocks));
}

int32_t chunks_of(int64_t samples, int32_t chunk) { return static_cast<int32_t>((samples + chunk - 1) / chunk); }

}  // namespace

int sample_combinations(Tensor token_scores, Tensor frame_scores, const CombinationPlan* plans, int64_t videos,
                        cpu::CombinationSamples samples, cpu::DrawKey key, const int64_t* added_steps,
                        const cpu::CombinationOutputs& out, uint32_t* packed, Stream stream) {
  Call c = {};
  c.all_videos = static_cast<int32_t>(videos);
  c.scores = Scores(token_scores);
  if (samples.frames > 0) c.frame_scores = Scores(frame_scores);
  c.added_steps = added_steps;
  c.seed = key.seed;
  c.step = key.step;
  c.strict = samples.strict;
  c.samples = static_cast<int32_t>(samples.tokens);
  c.frame_samples = static_cast<int32_t>(samples.frames);
  c.out = out;
  c.packed = packed;
  for (int64_t i = 0; i < videos; ++i) {
    const CombinationPlan& p = plans[i];
    if (p.tokens_per_frame > most_combination_tokens) return cudaErrorInvalidValue;
    if (samples.frames > 0 && p.frames > most_combination_frames) return cudaErrorInvalidValue;
    c.columns += p.frames * p.num_draw;
    c.frame_columns += p.num_frames;
    c.frames += p.frames;
    c.words += p.frames * ((p.tokens_per_frame + 31) / 32);
  }
  Video next = {};  // what lies before it
  int64_t blocks = 0, shared = 0;
  for (int64_t i = 0; i < videos; ++i) {
    const CombinationPlan& p = plans[i];
    Video& v = c.videos[c.count++];
    v = next;
    v.group_cap = p.group_cap;
    v.first_block = static_cast<int32_t>(blocks);
    v.frames = static_cast<int32_t>(p.frames);
    v.tokens = static_cast<int32_t>(p.tokens_per_frame);
    v.num_draw = static_cast<int32_t>(p.num_draw);
    v.num_frames = static_cast<int32_t>(p.num_frames);
    v.num_groups = static_cast<int32_t>(p.num_groups);
    v.group_size = static_cast<int32_t>(p.tokens_per_frame / p.num_groups);
    v.remainder = static_cast<int32_t>(p.tokens_per_frame % p.num_groups);
    v.chunk = chunk_of(samples.tokens, larger_group(v), c.frames);
    v.chunks = chunks_of(samples.tokens, v.chunk);
    v.frame_chunk = samples.frames > 0 ? chunk_of(samples.frames, p.frames, videos) : 1;
    v.frame_chunks = chunks_of(samples.frames, v.frame_chunk);
    blocks += p.frames * v.chunks + v.frame_chunks;
    const int64_t tokens_bytes = Space::bytes(v.tokens, v.num_groups, v.num_groups, lanes_of(larger_group(v)) == 0);
    const int64_t frames_bytes = Space::bytes(v.frames, 1, v.frames, lanes_of(v.frames) == 0);
    shared = tokens_bytes > shared ? tokens_bytes : shared;
    shared = samples.frames > 0 && frames_bytes > shared ? frames_bytes : shared;
    next.first_token += p.frames * p.tokens_per_frame;
    next.first_frame += p.frames;
    next.first_column += p.frames * p.num_draw;
    next.first_frame_column += p.num_frames;
    next.first_word += p.frames * ((p.tokens_per_frame + 31) / 32);
    if (c.count < most_videos && i + 1 < videos) continue;
    const int error = launch(stream, combinations_kernel, blocks, threads, static_cast<size_t>(shared), c);
    if (error != 0) return error;
    c.first_video += c.count;
    c.count = 0;
    blocks = shared = 0;
  }
  return 0;
}

}  // namespace cacovid::cuda
