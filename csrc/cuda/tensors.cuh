// The tensors of one launch as arguments of its kernel: shapes once, pointers for each.
#pragma once

#include <cstring>
#include <type_traits>
#include <vector>

#include "move.cuh"

namespace cacovid::cuda {

constexpr int most_shapes = 4, most_pointers = 344, most_tensors = 224, most_lists = 128;

static_assert(most_lists <= 256, "numbers of lists are bytes");

struct List {
  const int64_t* index;
  const int32_t* cu_seqlens;
  const float *cos, *sin;
};

// Shape: what equal tensors share.
template <class Shape>
struct Tensors {
  Shape shapes[most_shapes];
  Walks walks[most_shapes];
  int32_t shape_count, list_count;
  int32_t targets, cu_seqlens, angles;  // where these pointers begin, behind those of the sources; 0: none
  int32_t index;
  uint8_t list_of[most_tensors];
  void* pointers[most_pointers];

  __device__ __forceinline__ int shape_of(uint32_t block) const {
    int s = 0;
    while (s + 1 < shape_count && block >= walks[s + 1].first_block) ++s;
    return s;
  }
  __device__ __forceinline__ char* source(uint32_t tensor) const { return static_cast<char*>(pointers[tensor]); }
  __device__ __forceinline__ char* target(uint32_t tensor) const {
    return static_cast<char*>(pointers[targets + tensor]);
  }
  __device__ __forceinline__ List list(int l) const {
    const int bounds = cu_seqlens > 0 ? cu_seqlens + l : 0, cos = angles > 0 ? angles + l : 0;
    const int sin = angles > 0 ? cos + list_count : 0;
    return {static_cast<const int64_t*>(pointers[index + l]), static_cast<const int32_t*>(pointers[bounds]),
            static_cast<const float*>(pointers[cos]), static_cast<const float*>(pointers[sin])};
  }
};

// Collects tensors until a launch is full.
template <class Shape>
class Packer {
  static_assert(std::has_unique_object_representations_v<Shape>, "shapes are compared byte by byte");

 public:
  struct Plan {
    Tensors<Shape> tensors;
    std::vector<const cpu::KeptRows*> lists;
    int64_t blocks;
    int threads;
  };

  bool empty() const { return lists_.empty(); }

  // Adds a list, unless it is the last one already, and what is to move of a tensor by it. False if there is no room.
  bool add_list(const cpu::KeptRows& list) {
    if (!lists_.empty() && lists_.back() == &list) return true;
    if (!has_room(0, 1, false, list.cu_seqlens != nullptr, list.cos != nullptr)) return false;
    lists_.push_back(&list);
    bounds_ = bounds_ || list.cu_seqlens != nullptr;
    angles_ = angles_ || list.cos != nullptr;
    return true;
  }
  bool add_tensor(const Shape& shape, const Work& work, void* source, void* target) {
    size_t s = 0;
    while (s < groups_.size() && std::memcmp(&groups_[s].shape, &shape, sizeof shape) != 0) ++s;
    if (s == most_shapes || !has_room(1, 0, source != target, false, false)) return false;
    if (s == groups_.size()) groups_.push_back({shape, work, {}});
    groups_[s].tensors.push_back({source, target, static_cast<uint8_t>(lists_.size() - 1)});
    targets_ = targets_ || source != target;
    ++count_;
    return true;
  }

  // What was collected, as walks of blocks behind the first `blocks`; forgets it.
  Plan take(int64_t blocks) {
    Plan plan = {{}, lists_, blocks, 32};
    Tensors<Shape>& t = plan.tensors;
    const auto lists = static_cast<int32_t>(lists_.size());
    t.list_count = lists;
    t.targets = targets_ ? count_ : 0;
    t.index = t.targets + count_;
    t.cu_seqlens = bounds_ ? t.index + lists : 0;
    t.angles = angles_ ? t.index + lists * (bounds_ ? 2 : 1) : 0;
    for (int32_t l = 0; l < lists; ++l) {
      t.pointers[t.index + l] = const_cast<int64_t*>(lists_[l]->index);
      if (bounds_) t.pointers[t.cu_seqlens + l] = const_cast<int32_t*>(lists_[l]->cu_seqlens);
      if (!angles_) continue;
      t.pointers[t.angles + l] = const_cast<float*>(lists_[l]->cos);
      t.pointers[t.angles + lists + l] = const_cast<float*>(lists_[l]->sin);
    }
    std::vector<uint32_t> lanes;
    for (const Group& g : groups_) {
      lanes.push_back(lanes_log2_of(g.work, static_cast<int64_t>(g.tensors.size())));
      plan.threads = std::max(plan.threads, threads_of(g.work, lanes.back()));
    }
    uint32_t tensor = 0;
    for (const Group& g : groups_) {
      Walks& w = t.walks[t.shape_count] = walks_of(g.work, lanes[t.shape_count], plan.threads);
      t.shapes[t.shape_count++] = g.shape;
      w.first_block = static_cast<uint32_t>(plan.blocks);
      w.first_tensor = tensor;
      plan.blocks += static_cast<int64_t>(g.tensors.size()) * w.walks.by * w.pieces.by;
      for (const Member& m : g.tensors) {
        t.pointers[tensor] = m.source;
        t.pointers[t.targets + tensor] = m.target;
        t.list_of[tensor++] = m.list;
      }
    }
    *this = Packer();
    return plan;
  }

 private:
  struct Member {
    void *source, *target;
    uint8_t list;
  };
  struct Group {
    Shape shape;
    Work work;
    std::vector<Member> tensors;
  };

  bool has_room(int32_t tensors, int32_t lists, bool targets, bool bounds, bool angles) const {
    const int32_t all = count_ + tensors, all_lists = static_cast<int32_t>(lists_.size()) + lists;
    const int32_t per_tensor = targets || targets_ ? 2 : 1;
    const int32_t per_list = 1 + (bounds || bounds_ ? 1 : 0) + (angles || angles_ ? 2 : 0);
    return all <= most_tensors && all_lists <= most_lists && all * per_tensor + all_lists * per_list <= most_pointers;
  }

  std::vector<const cpu::KeptRows*> lists_;
  std::vector<Group> groups_;
  int32_t count_ = 0;
  bool targets_ = false, bounds_ = false, angles_ = false;
};

}  // namespace cacovid::cuda
