// One query token per row over the slots of a cache: eq. 8, and what each slot received (eq. 5).
//
// Per (row, key/value head): logits of the group's r query heads from one read of the live keys, a softmax in fp32,
// outputs from one read of the live values. Slots whose bias is -inf are not read. Where there are fewer
// (row, head) pairs than threads, ranges of slots are handled apart and joined by their maxima and sums.
#pragma once

#include "tiles.h"

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <tuple>
#include <vector>

namespace zsmerge {

constexpr int64_t BLOCK = 16;  // slots whose values are read before the next columns are
constexpr int64_t AHEAD = 16;  // slots between a prefetch and its use
constexpr int64_t SMALLEST_RANGE = 256;  // slots worth a task of their own

struct Shape {
  int64_t batch, groups, heads, slots, dim, ranges, biases;  // heads r of a group; biases: 1 or r rows
  float scale;
};

// The live slots of one range, and where their keys and values lie; the new token's are given apart.
template <typename T>
struct Live {
  const T* key;
  const T* value;
  const T* new_key;
  const T* new_value;
  int64_t entering, dim;
  int32_t* slots;
  int64_t count = 0;

  const T* key_of(int64_t i) const {
    return slots[i] == entering ? new_key : key + slots[i] * dim;
  }
  const T* value_of(int64_t i) const {
    return slots[i] == entering ? new_value : value + slots[i] * dim;
  }
};

// logits -> exp(logits - their maximum), in place; returns the maximum and the sum.
inline std::pair<float, float> exponentials(float* logits, int64_t count) {
  Lane highest(-std::numeric_limits<float>::infinity());
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) highest = at::vec::maximum(highest, Lane::loadu(logits + i));
  float top = at::vec::vec_reduce_all<float>([](Lane& a, Lane& b) { return at::vec::maximum(a, b); }, highest);
  for (; i < count; ++i) top = std::max(top, logits[i]);
  Lane totals(0.0f);
  for (i = 0; i + WIDTH <= count; i += WIDTH) {
    const Lane p = (Lane::loadu(logits + i) - Lane(top)).exp();
    p.store(logits + i);
    totals = totals + p;
  }
  float total = sum(totals);
  for (; i < count; ++i) total += logits[i] = std::exp(logits[i] - top);
  return {top, total};
}

// What one range of slots comes to. p [r, span] unnormalised; top and total [r]; out [r, padded(dim)].
struct Part {
  float* p;
  float* top;
  float* total;
  float* out;
  int32_t* slots;
  int64_t count;
  bool dense;  // every slot of the range is live: numbers lie as in the range
};

// dot products -> logits: times scale, plus the slots' bias.
inline void compensate(float* row, const float* bias, const Part& part, int64_t begin, float scale) {
  int64_t i = 0;
  if (part.dense) {
    const Lane scales(scale);
    for (; i + WIDTH <= part.count; i += WIDTH) {
      at::vec::fmadd(Lane::loadu(row + i), scales, Lane::loadu(bias + begin + i)).store(row + i);
    }
  }
  for (; i < part.count; ++i) row[i] = row[i] * scale + bias[part.slots[i]];
}

// mass of the slots += their exponentials times share.
inline void receive(float* mass, const float* p, const Part& part, int64_t begin, float share) {
  int64_t i = 0;
  if (part.dense) {
    const Lane shares(share);
    for (; i + WIDTH <= part.count; i += WIDTH) {
      at::vec::fmadd(Lane::loadu(p + i), shares, Lane::loadu(mass + begin + i)).store(mass + begin + i);
    }
  }
  for (; i < part.count; ++i) mass[part.slots[i]] += p[i] * share;
}

template <typename T>
void attend_range(const Shape& shape, const float* query, Live<T>& live, const float* bias, int64_t begin,
    int64_t end, int64_t span, Part& part) {
  for (int64_t s = begin; s < end; ++s) {
    bool alive = false;
    for (int64_t r = 0; r < shape.biases; ++r) {
      alive |= bias[r * shape.slots + s] != -std::numeric_limits<float>::infinity();
    }
    live.slots[live.count] = static_cast<int32_t>(s);
    live.count += alive;
  }
  const int64_t size = padded(shape.dim), count = part.count = live.count;
  part.dense = count == end - begin;
  for (int64_t i = 0; i < count; i += BLOCK) {
    const int64_t stop = std::min(i + BLOCK, count);
    for (int64_t n = i + AHEAD; n < std::min(stop + AHEAD, count); ++n) prefetch(live.key_of(n), shape.dim);
    for_heads(shape.heads, [&](auto tile, int64_t r) {
      dots<T, decltype(tile)::value>(
          query + r * size, [&](int64_t n) { return live.key_of(n); }, shape.dim, i, stop, part.p + r * span, span);
    });
  }
  for (int64_t r = 0; r < shape.heads; ++r) {
    float* row = part.p + r * span;
    const float* added = bias + (shape.biases == 1 ? 0 : r) * shape.slots;
    compensate(row, added, part, begin, shape.scale);
    std::tie(part.top[r], part.total[r]) = exponentials(row, count);
  }
  std::fill_n(part.out, shape.heads * size, 0.0f);
  for (int64_t i = 0; i < count; i += BLOCK) {
    const int64_t stop = std::min(i + BLOCK, count);
    for (int64_t n = i + AHEAD; n < std::min(stop + AHEAD, count); ++n) prefetch(live.value_of(n), shape.dim);
    for_heads(shape.heads, [&](auto tile, int64_t r) {
      weigh<T, decltype(tile)::value>(
          part.p + r * span, span, [&](int64_t n) { return live.value_of(n); }, shape.dim, i, stop,
          part.out + r * size);
    });
  }
}

// The factor that turns head r's exponentials of one range into attention.
inline float factor(const Part* parts, int64_t ranges, int64_t mine, int64_t r) {
  float top = -std::numeric_limits<float>::infinity(), total = 0.0f;
  for (int64_t k = 0; k < ranges; ++k) top = std::max(top, parts[k].top[r]);
  for (int64_t k = 0; k < ranges; ++k) {
    if (parts[k].count) total += parts[k].total[r] * std::exp(parts[k].top[r] - top);
  }
  return parts[mine].count ? std::exp(parts[mine].top[r] - top) / total : 0.0f;
}

// mass [slots] of one range; out [r, dim] too, from all ranges, where `mine` is the first.
template <typename T>
void join_range(const Shape& shape, const Part* parts, int64_t mine, int64_t begin, int64_t end, int64_t span,
    float* mass, T* out) {
  const Part& part = parts[mine];
  std::fill(mass + begin, mass + end, 0.0f);
  for (int64_t r = 0; r < shape.heads; ++r) {
    const float share = factor(parts, shape.ranges, mine, r);
    receive(mass, part.p + r * span, part, begin, share);
  }
  if (mine != 0) return;
  std::vector<float> row(shape.dim);
  for (int64_t r = 0; r < shape.heads; ++r) {
    std::fill(row.begin(), row.end(), 0.0f);
    for (int64_t k = 0; k < shape.ranges; ++k) {
      const float share = factor(parts, shape.ranges, k, r);
      const float* from = parts[k].out + r * padded(shape.dim);
      for (int64_t d = 0; d < shape.dim; ++d) row[d] += from[d] * share;
    }
    for (int64_t d = 0; d < shape.dim; ++d) out[r * shape.dim + d] = static_cast<T>(row[d]);
  }
}

// Ranges per (row, head): enough tasks for the threads, none smaller than is worth it, none empty.
inline int64_t ranges_for(int64_t pairs, int64_t slots) {
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  if (pairs % threads == 0 || pairs >= 4 * threads) return 1;
  const int64_t wanted = (4 * threads + pairs - 1) / pairs;
  const int64_t ranges = std::clamp<int64_t>(slots / SMALLEST_RANGE, 1, wanted), span = (slots + ranges - 1) / ranges;
  return (slots + span - 1) / span;  // spans rounded up may cover the slots before the last range begins
}

template <typename T>
void attend_all(Shape shape, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& bias, const at::Tensor& new_key, const at::Tensor& new_value, const at::Tensor& entering,
    at::Tensor& out, at::Tensor& mass) {
  const int64_t pairs = shape.batch * shape.groups, ranges = shape.ranges, size = padded(shape.dim);
  const int64_t span = (shape.slots + ranges - 1) / ranges, heads = shape.heads;
  const int64_t held = heads * (span + size + 2) + span;  // fp32 numbers of one part
  at::Tensor memory = at::empty({pairs * ranges, held}, mass.options());
  std::vector<Part> parts(pairs * ranges);
  const T *q = query.const_data_ptr<T>(), *k = key.const_data_ptr<T>(), *v = value.const_data_ptr<T>();
  const T *nk = new_key.const_data_ptr<T>(), *nv = new_value.const_data_ptr<T>();
  const float* biases = bias.const_data_ptr<float>();
  const int64_t* entry = entering.const_data_ptr<int64_t>();
  float *base = memory.data_ptr<float>(), *received = mass.data_ptr<float>();
  T* result = out.data_ptr<T>();

  auto join = [&](int64_t pair, int64_t range) {
    join_range<T>(shape, parts.data() + pair * ranges, range, range * span,
        std::min((range + 1) * span, shape.slots), span, received + pair * shape.slots,
        result + pair * heads * shape.dim);
  };
  at::parallel_for(0, pairs * ranges, 1, [&](int64_t first, int64_t last) {
    std::vector<float> queries(heads * size, 0.0f);
    for (int64_t task = first; task < last; ++task) {
      const int64_t pair = task / ranges, range = task % ranges;
      float* mine = base + (ranges == 1 ? first : task) * held;  // alone, a thread uses the same memory again
      Part& part = parts[task];
      part = {mine, mine + heads * span, mine + heads * (span + 1), mine + heads * (span + 2),
          reinterpret_cast<int32_t*>(mine + heads * (span + 2 + size)), 0, false};
      for (int64_t r = 0; r < heads; ++r) {
        for (int64_t d = 0; d < shape.dim; ++d) {
          queries[r * size + d] = static_cast<float>(q[(pair * heads + r) * shape.dim + d]);
        }
      }
      Live<T> live{k + pair * shape.slots * shape.dim, v + pair * shape.slots * shape.dim, nk + pair * shape.dim,
          nv + pair * shape.dim, entry[pair / shape.groups], shape.dim, part.slots};
      attend_range<T>(shape, queries.data(), live, biases + pair * shape.biases * shape.slots, range * span,
          std::min((range + 1) * span, shape.slots), span, part);
      if (ranges == 1) join(pair, 0);
    }
  });
  if (ranges == 1) return;
  at::parallel_for(0, pairs * ranges, 1, [&](int64_t first, int64_t last) {
    for (int64_t task = first; task < last; ++task) join(task / ranges, task % ranges);
  });
}

}  // namespace zsmerge
