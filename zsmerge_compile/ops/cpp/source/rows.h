// Rows of D elements of a model's dtype, read as pairs of float vectors and never widened in memory.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <utility>

namespace zsmerge {

using Lane = at::vec::Vectorized<float>;
constexpr int64_t WIDTH = Lane::size();
constexpr int64_t STEP = 2 * WIDTH;  // elements of one load: a vector of 16-bit numbers makes two of floats

inline int64_t padded(int64_t dim) {
  return (dim + STEP - 1) / STEP * STEP;
}

template <typename T>
inline std::pair<Lane, Lane> read(const T* from) {
  auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(from));
  return {low, high};
}

template <>
inline std::pair<Lane, Lane> read<float>(const float* from) {
  return {Lane::loadu(from), Lane::loadu(from + WIDTH)};
}

// The first `count` < STEP elements, zeros after them.
template <typename T>
inline std::pair<Lane, Lane> read(const T* from, int64_t count) {
  T piece[STEP] = {};
  std::copy_n(from, count, piece);
  return read<T>(piece);
}

inline float sum(const Lane& lane) {
  return at::vec::vec_reduce_all<float>(std::plus<Lane>(), lane);
}

// Bring a row near before it is needed.
template <typename T>
inline void prefetch(const T* row, int64_t dim) {
#if defined(__GNUC__) || defined(__clang__)
  const char* from = reinterpret_cast<const char*>(row);
  for (int64_t byte = 0; byte < dim * static_cast<int64_t>(sizeof(T)); byte += 64) {
    __builtin_prefetch(from + byte);
  }
#endif
}

}  // namespace zsmerge
