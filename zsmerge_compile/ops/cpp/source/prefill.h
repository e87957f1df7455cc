// Many query tokens per row over the slots of a cache and the new tokens up to each: eq. 8 and eq. 5 in one pass.
//
// Blocks of queries, all heads of a group together, make a stripe of logits in fp32 that stays in the processor's
// caches: products with the keys, softmax of each row, the rows' discounted sum onto the keys, their product
// with the values. Blocks are dealt out to `parts` sums, added in a fixed order: the result does not depend
// on which thread is faster.
#pragma once

#include "attention.h"

#include <ATen/ops/zeros.h>

#include <memory>

namespace zsmerge {

constexpr int64_t QUERIES = WIDTH == 8 ? 4 : 8;  // query rows of one tile: two accumulators each
constexpr int64_t STRIPE = 1 << 20;  // fp32 numbers of a stripe, roughly
constexpr int64_t VALUES = 128;  // values that stay near while every row of a stripe takes its share

// One call's numbers; strides in elements. Token columns from `first` on are queries; `window` < 0: none.
template <typename T>
struct Prompt {
  int64_t batch, groups, heads, columns, slots, dim, first, window, biases;
  float scale, decay;
  const T *query, *key, *value, *slot_key, *slot_value;
  int64_t query_stride[3], key_stride[3], value_stride[3];
  const float *slot_bias, *new_bias;  // [b, G, biases, S], -inf where nothing is held; [b, G, r, n] or null
  const int32_t* slot_position;  // [b, G, S]
  const int64_t *seen, *pads;  // [b]
  T* out;  // [b, H, n, D]

  const T* query_row(int64_t pair, int64_t r, int64_t j) const {
    return query + pair / groups * query_stride[0] + (pair % groups * heads + r) * query_stride[1] +
        j * query_stride[2];
  }
  const T* key_row(int64_t pair, int64_t j) const {
    return key + pair / groups * key_stride[0] + pair % groups * key_stride[1] + j * key_stride[2];
  }
  const T* value_row(int64_t pair, int64_t j) const {
    return value + pair / groups * value_stride[0] + pair % groups * value_stride[1] + j * value_stride[2];
  }
};

// One block of queries of one (row, key/value head): columns [start, stop), which see new tokens from `oldest` on.
struct Stripe {
  int64_t pair, start, stop, oldest, slots, span;  // slots: 0 if none is live; span: padded slots + padded tokens
  int64_t rows, size;  // heads x (stop - start), padded(dim)
  float *queries, *logits, *keys, *turned;

  int64_t tokens() const {
    return stop - oldest;
  }
};

// rows(0 .. STEP) of fp32, turned: [dim][STEP]; zeros for rows beyond count.
template <typename T, typename Rows>
inline void turn(const Rows& rows, int64_t count, int64_t dim, float* flat, float* turned) {
  const int64_t size = padded(dim);
  for (int64_t n = 0; n < STEP; ++n) {
    float* to = flat + n * size;
    int64_t d = 0;
    if (n < count) {
      const T* row = rows(n);
      for (; d + STEP <= dim; d += STEP) {
        auto [low, high] = read<T>(row + d);
        low.store(to + d);
        high.store(to + d + WIDTH);
      }
      for (; d < dim; ++d) to[d] = static_cast<float>(row[d]);
    }
    std::fill(to + d, to + size, 0.0f);
  }
  for (int64_t n = 0; n < STEP; n += WIDTH) {
    for (int64_t d = 0; d < size; d += WIDTH) {
      at::vec::transpose_mxn<float, WIDTH, WIDTH>(flat + n * size + d, size, turned + d * STEP + n, STEP);
    }
  }
}

// logits [QUERIES][STEP] of turned queries [dim][QUERIES] and turned keys [dim][STEP].
inline void product_tile(const float* queries, const float* keys, int64_t dim, float* logits, int64_t stride) {
  constexpr float zeros[STEP] = {};
  auto total = Tile<QUERIES, 1>::of(zeros, 0);
  for (int64_t d = 0; d < dim; ++d) total.add(queries + d * QUERIES, 1, Pairs<1>::of(keys + d * STEP));
  total.store(logits, stride);
}

// logits [rows][count rounded up to STEP] at `to`: products of the stripe's queries with rows(0 .. count).
template <typename T, typename Rows>
void products(const Stripe& stripe, const Rows& rows, int64_t count, int64_t dim, float* to) {
  for (int64_t n = 0; n < count; n += STEP) {
    turn<T>([&](int64_t i) { return rows(n + i); }, std::min(STEP, count - n), dim, stripe.keys, stripe.turned);
    for (int64_t q = 0; q < stripe.rows; q += QUERIES) {
      product_tile(stripe.queries + q * stripe.size, stripe.turned, dim, to + q * stripe.span + n, stripe.span);
    }
  }
}

inline void add_to(float* row, const float* bias, int64_t count) {
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) (Lane::loadu(row + i) + Lane::loadu(bias + i)).store(row + i);
  for (; i < count; ++i) row[i] += bias[i];
}

inline void add_scaled(float* mass, const float* p, float share, int64_t count) {
  const Lane shares(share);
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH) {
    at::vec::fmadd(Lane::loadu(p + i), shares, Lane::loadu(mass + i)).store(mass + i);
  }
  for (; i < count; ++i) mass[i] += p[i] * share;
}

// Softmax of one query's row over the slots and tokens it sees, unnormalised and 0 elsewhere; returns its sum.
template <typename T>
float soften(const Prompt<T>& prompt, const Stripe& stripe, int64_t r, int64_t column, float* row) {
  constexpr float nothing = -std::numeric_limits<float>::infinity();
  const int64_t pair = stripe.pair, tokens = stripe.tokens(), held = stripe.span - (tokens + STEP - 1) / STEP * STEP;
  if (stripe.slots) {
    add_to(row, prompt.slot_bias + (pair * prompt.biases + (prompt.biases == 1 ? 0 : r)) * prompt.slots, stripe.slots);
    std::fill(row + stripe.slots, row + held, nothing);
    if (prompt.window >= 0) {
      const int64_t b = pair / prompt.groups, at = prompt.seen[b] + column - prompt.pads[b];
      const int32_t* position = prompt.slot_position + pair * prompt.slots;
      for (int64_t s = 0; s < stripe.slots; ++s) {
        if (at - position[s] >= prompt.window) row[s] = nothing;
      }
    }
  }
  if (prompt.new_bias) {
    add_to(row + held, prompt.new_bias + (pair * prompt.heads + r) * prompt.columns + stripe.oldest, tokens);
  }
  const int64_t oldest = prompt.window < 0 ? stripe.oldest : std::max(stripe.oldest, column - prompt.window + 1);
  const int64_t from = held + oldest - stripe.oldest, to = held + column + 1 - stripe.oldest;
  std::fill(row + held, row + from, nothing);
  std::fill(row + to, row + stripe.span, nothing);
  return exponentials(row, stripe.span).second;
}

// The block's outputs: rows of exponentials times values, over their sums.
template <typename T>
void put_out(const Prompt<T>& prompt, const Stripe& stripe, const std::vector<float>& sums, std::vector<float>& out) {
  const int64_t queries = stripe.stop - stripe.start, tokens = stripe.tokens(), dim = prompt.dim;
  const int64_t held = stripe.span - (tokens + STEP - 1) / STEP * STEP;
  out.assign(stripe.rows * stripe.size, 0.0f);
  const T* kept = prompt.slot_value + stripe.pair * prompt.slots * dim;
  auto take = [&](const float* p, int64_t count, auto rows) {
    for (int64_t n = 0; n < count; n += VALUES) {
      for_heads(prompt.heads * queries, [&](auto tile, int64_t r) {
        weigh<T, decltype(tile)::value>(p + r * stripe.span, stripe.span, rows, dim, n, std::min(n + VALUES, count),
            out.data() + r * stripe.size);
      });
    }
  };
  take(stripe.logits, stripe.slots, [&](int64_t s) { return kept + s * dim; });
  take(stripe.logits + held, tokens, [&](int64_t i) { return prompt.value_row(stripe.pair, stripe.oldest + i); });
  for (int64_t r = 0; r < prompt.heads; ++r) {
    for (int64_t j = 0; j < queries; ++j) {
      const int64_t row = r * queries + j;
      T* to = prompt.out + ((stripe.pair * prompt.heads + r) * prompt.columns + stripe.start + j) * dim;
      for (int64_t d = 0; d < dim; ++d) to[d] = static_cast<T>(out[row * stripe.size + d] / sums[row]);
    }
  }
}

// One block: mass [S + n] += the attention of its queries, discounted by their age.
template <typename T>
void attend_block(const Prompt<T>& prompt, Stripe& stripe, float* mass, std::vector<float>& out) {
  const int64_t queries = stripe.stop - stripe.start, pair = stripe.pair, tokens = stripe.tokens();
  const int64_t held = (stripe.slots + STEP - 1) / STEP * STEP;
  stripe.span = held + (tokens + STEP - 1) / STEP * STEP;
  stripe.rows = (prompt.heads * queries + QUERIES - 1) / QUERIES * QUERIES;
  std::fill_n(stripe.queries, stripe.rows * stripe.size, 0.0f);
  for (int64_t row = 0; row < prompt.heads * queries; ++row) {
    const T* from = prompt.query_row(pair, row / queries, stripe.start + row % queries);
    float* to = stripe.queries + row / QUERIES * QUERIES * stripe.size + row % QUERIES;  // tiles of [size][QUERIES]
    for (int64_t d = 0; d < prompt.dim; ++d) to[d * QUERIES] = static_cast<float>(from[d]) * prompt.scale;
  }
  const T* kept = prompt.slot_key + pair * prompt.slots * prompt.dim;
  products<T>(stripe, [&](int64_t s) { return kept + s * prompt.dim; }, stripe.slots, prompt.dim, stripe.logits);
  products<T>(stripe, [&](int64_t i) { return prompt.key_row(pair, stripe.oldest + i); }, tokens, prompt.dim,
      stripe.logits + held);
  std::vector<float> sums(prompt.heads * queries);
  for (int64_t row = 0; row < prompt.heads * queries; ++row) {
    float* logits = stripe.logits + row * stripe.span;
    const int64_t column = stripe.start + row % queries;
    sums[row] = soften(prompt, stripe, row / queries, column, logits);
    const float share = std::pow(prompt.decay, static_cast<float>(prompt.columns - 1 - column)) / sums[row];
    if (share == 0.0f) continue;
    add_scaled(mass, logits, share, stripe.slots);
    add_scaled(mass + prompt.slots + stripe.oldest, logits + held, share, tokens);
  }
  put_out(prompt, stripe, sums, out);
}

template <typename T>
bool any_live(const Prompt<T>& prompt, int64_t pair) {
  const float* bias = prompt.slot_bias + pair * prompt.biases * prompt.slots;
  return std::any_of(bias, bias + prompt.biases * prompt.slots,
      [](float b) { return b != -std::numeric_limits<float>::infinity(); });
}

// mass [pairs, S + n]: discounted attention of the queries on the slots and on the new tokens.
template <typename T>
at::Tensor attend_prompt(const Prompt<T>& prompt) {
  const int64_t pairs = prompt.batch * prompt.groups, reach = prompt.slots + prompt.columns;
  const int64_t threads = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t parts = std::max<int64_t>(1, (2 * threads + pairs - 1) / pairs), size = padded(prompt.dim);
  const int64_t wanted = std::clamp<int64_t>(STRIPE / reach, 32, 128);
  const int64_t queries = std::max<int64_t>(1, wanted / prompt.heads);  // columns of one block
  const int64_t rows = (prompt.heads * queries + QUERIES - 1) / QUERIES * QUERIES;
  at::Tensor sums = at::zeros({pairs, parts, reach}, at::TensorOptions().dtype(at::kFloat));
  float* base = sums.data_ptr<float>();
  at::parallel_for(0, pairs * parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> turned(size * STEP), keys(STEP * size), q(rows * size), out;
    std::unique_ptr<float[]> logits(new float[rows * (reach + 2 * STEP)]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t pair = task / parts, pad = prompt.pads[pair / prompt.groups];
      Stripe stripe{pair, 0, 0, 0, any_live(prompt, pair) ? prompt.slots : 0, 0, 0, size, q.data(), logits.get(),
          keys.data(), turned.data()};
      const int64_t first = std::max(prompt.first, pad);
      for (int64_t at = first + task % parts * queries; at < prompt.columns; at += parts * queries) {
        stripe.start = at;
        stripe.stop = std::min(at + queries, prompt.columns);
        stripe.oldest = prompt.window < 0 ? pad : std::max(pad, at - prompt.window + 1);
        attend_block(prompt, stripe, base + task * reach, out);
      }
    }
  });
  return parts == 1 ? sums.select(1, 0) : sums.sum(1);
}

}  // namespace zsmerge
