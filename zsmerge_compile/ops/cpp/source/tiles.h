// The two products of attention on rows that lie anywhere: sums stay in registers, one tile at a time.
#pragma once

#include "rows.h"

#include <c10/macros/Macros.h>

#include <type_traits>

namespace zsmerge {

constexpr int64_t HEADS = 4;  // query heads of one tile: an accumulator each, in registers
constexpr int64_t SLOTS = WIDTH == 8 ? 2 : 4;  // slots of one tile; AVX2 has half as many registers
constexpr int64_t LANES = WIDTH == 8 ? 1 : 2;  // pairs of output vectors of one tile

// logits[r][i .. i + N) of R heads: dot products of their queries [R, padded(dim)] with N keys.
template <typename T, int R, int N, typename Rows>
inline void dot_tile(
    const float* query, const Rows& rows_at, int64_t dim, int64_t i, float* logits, int64_t stride) {
  const T* rows[N];
  Lane total[R][N];
  for (int n = 0; n < N; ++n) {
    rows[n] = rows_at(i + n);
    for (int r = 0; r < R; ++r) total[r][n] = Lane(0.0f);
  }
  const int64_t size = padded(dim);
  auto add = [&](int n, int64_t d, const std::pair<Lane, Lane>& key) {
    for (int r = 0; r < R; ++r) {
      total[r][n] = at::vec::fmadd(Lane::loadu(query + r * size + d), key.first, total[r][n]);
      total[r][n] = at::vec::fmadd(Lane::loadu(query + r * size + d + WIDTH), key.second, total[r][n]);
    }
  };
  int64_t d = 0;
  for (; d + STEP <= dim; d += STEP) {
    for (int n = 0; n < N; ++n) add(n, d, read<T>(rows[n] + d));
  }
  if (d < dim) {
    for (int n = 0; n < N; ++n) add(n, d, read<T>(rows[n] + d, dim - d));
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) logits[r * stride + i + n] = sum(total[r][n]);
  }
}

template <typename T, int R, typename Rows>
void dots(const float* query, const Rows& rows, int64_t dim, int64_t start, int64_t stop, float* logits,
    int64_t stride) {
  int64_t i = start;
  for (; i + SLOTS <= stop; i += SLOTS) dot_tile<T, R, SLOTS>(query, rows, dim, i, logits, stride);
  for (; i < stop; ++i) dot_tile<T, R, 1>(query, rows, dim, i, logits, stride);
}

// Sums of one tile. Members of their own, not an array: compilers keep those in registers.
template <int P>
struct Pairs {
  Lane low, high;
  Pairs<P - 1> rest;

  template <typename T>
  C10_ALWAYS_INLINE static Pairs of(const T* from) {
    auto [low, high] = read<T>(from);
    return {low, high, Pairs<P - 1>::of(from + STEP)};
  }
  C10_ALWAYS_INLINE void add(const Lane& share, const Pairs& row) {
    low = at::vec::fmadd(share, row.low, low);
    high = at::vec::fmadd(share, row.high, high);
    rest.add(share, row.rest);
  }
  C10_ALWAYS_INLINE void store(float* to) const {
    low.store(to);
    high.store(to + WIDTH);
    rest.store(to + STEP);
  }
};

template <>
struct Pairs<0> {
  template <typename T>
  C10_ALWAYS_INLINE static Pairs of(const T*) {
    return {};
  }
  C10_ALWAYS_INLINE void add(const Lane&, const Pairs&) {}
  C10_ALWAYS_INLINE void store(float*) const {}
};

// R rows of sums; a row's share of what is added is shares[r * stride].
template <int R, int P>
struct Tile {
  Pairs<P> top;
  Tile<R - 1, P> rest;

  C10_ALWAYS_INLINE static Tile of(const float* from, int64_t stride) {
    return {Pairs<P>::of(from), Tile<R - 1, P>::of(from + stride, stride)};
  }
  C10_ALWAYS_INLINE void add(const float* shares, int64_t stride, const Pairs<P>& row) {
    top.add(Lane(*shares), row);
    rest.add(shares + stride, stride, row);
  }
  C10_ALWAYS_INLINE void store(float* to, int64_t stride) const {
    top.store(to);
    rest.store(to + stride, stride);
  }
};

template <int P>
struct Tile<0, P> {
  C10_ALWAYS_INLINE static Tile of(const float*, int64_t) {
    return {};
  }
  C10_ALWAYS_INLINE void add(const float*, int64_t, const Pairs<P>&) {}
  C10_ALWAYS_INLINE void store(float*, int64_t) const {}
};

// out[r][d ..) += p[r][i] * rows(i)[d ..), start <= i < stop, for R heads and P pairs of vectors.
template <typename T, int R, int P, typename Rows>
inline void weigh_tile(const float* p, int64_t stride, const Rows& rows, int64_t dim, int64_t start, int64_t stop,
    int64_t d, float* out) {
  const int64_t size = padded(dim), left = dim - d;
  Tile<R, P> total = Tile<R, P>::of(out + d, size);
  if (left >= P * STEP) {
    for (int64_t i = start; i < stop; ++i) total.add(p + i, stride, Pairs<P>::of(rows(i) + d));
  } else {
    T piece[P * STEP] = {};
    for (int64_t i = start; i < stop; ++i) {
      std::copy_n(rows(i) + d, left, piece);
      total.add(p + i, stride, Pairs<P>::of(piece));
    }
  }
  total.store(out + d, size);
}

template <typename T, int R, typename Rows>
void weigh(
    const float* p, int64_t stride, const Rows& rows, int64_t dim, int64_t start, int64_t stop, float* out) {
  int64_t d = 0;
  for (; d + LANES * STEP <= dim; d += LANES * STEP) {
    weigh_tile<T, R, LANES>(p, stride, rows, dim, start, stop, d, out);
  }
  for (; d < dim; d += STEP) weigh_tile<T, R, 1>(p, stride, rows, dim, start, stop, d, out);
}

// run(tag of R, first head) for tiles of HEADS heads and what is left.
template <typename Run>
inline void for_heads(int64_t heads, const Run& run) {
  int64_t r = 0;
  for (; r + HEADS <= heads; r += HEADS) run(std::integral_constant<int, HEADS>(), r);
  switch (heads - r) {
    case 3: return run(std::integral_constant<int, 3>(), r);
    case 2: return run(std::integral_constant<int, 2>(), r);
    case 1: return run(std::integral_constant<int, 1>(), r);
  }
}

}  // namespace zsmerge
