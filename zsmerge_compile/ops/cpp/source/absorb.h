// Arrivals join the residual slots one by one (eqs. 6, 7): the loop of ops/fold.py's absorb_one, in place.
#pragma once

#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace zsmerge {

// The residual slots of one (row, key/value head), as fp32 masters.
struct Residual {
  float *key, *value, *weight, *score;  // [R, D] twice, [R] twice
  int32_t* position;  // [R] newest member
  float* mean;  // [R] mean position
  int32_t* opened;  // [R]
  int64_t slots, dim;
};

template <typename T>
struct Arrivals {
  const T *key, *value;  // [n, D]
  const float *weight, *score;  // [n]; weight 0: a hole
  const int32_t* position;
  const float* mean;
  int64_t count;
};

// A free slot, the one opened earliest before; else the largest dot product, of equals the slot opened first.
inline int64_t choose(const Residual& residual, const float* affinity) {
  constexpr float infinity = std::numeric_limits<float>::infinity();
  auto rank = [&](int64_t s) { return residual.weight[s] == 0.0f ? infinity : affinity[s]; };
  int64_t chosen = 0;
  for (int64_t s = 1; s < residual.slots; ++s) {
    const float mine = rank(s), best = rank(chosen);
    if (mine > best || (mine == best && residual.opened[s] < residual.opened[chosen])) chosen = s;
  }
  return chosen;
}

inline void running_mean(float* old, const float* arrived, float weight, float added, int64_t dim) {
  for (int64_t d = 0; d < dim; ++d) old[d] = (weight * old[d] + added * arrived[d]) / (weight + added);
}

template <typename T>
void absorb_all(const Residual& residual, const Arrivals<T>& arrivals) {
  const int64_t size = padded(residual.dim), dim = residual.dim;
  std::vector<float> key(size, 0.0f), value(dim), affinity(residual.slots);
  int32_t latest = *std::max_element(residual.opened, residual.opened + residual.slots);
  for (int64_t i = 0; i < arrivals.count; ++i) {
    const float added = arrivals.weight[i];
    if (added == 0.0f) continue;
    std::copy_n(arrivals.key + i * dim, dim, key.begin());
    std::copy_n(arrivals.value + i * dim, dim, value.begin());
    dots<float, 1>(key.data(), [&](int64_t s) { return residual.key + s * dim; }, dim, 0, residual.slots,
        affinity.data(), 0);
    const int64_t slot = choose(residual, affinity.data());
    const float held = residual.weight[slot];
    const bool opens = held == 0.0f;
    running_mean(residual.key + slot * dim, key.data(), held, added, dim);
    running_mean(residual.value + slot * dim, value.data(), held, added, dim);
    running_mean(residual.mean + slot, arrivals.mean + i, held, added, 1);
    residual.weight[slot] = held + added;
    residual.score[slot] += arrivals.score[i];
    const int32_t newest = arrivals.position[i];
    residual.position[slot] = opens ? newest : std::max(residual.position[slot], newest);
    if (opens) residual.opened[slot] = ++latest;
  }
}

}  // namespace zsmerge
