// The operators of this library: their schemas, their checks and the choice by dtype. Shapes as in ops/contracts.py.
#include "absorb.h"
#include "attention.h"
#include "prefill.h"

#include <torch/library.h>

#include <optional>

namespace zsmerge {

using at::Tensor;
using std::optional;

// run(element of the model's dtype)
template <typename Run>
void for_dtype(const char* what, at::ScalarType dtype, const Run& run) {
  switch (dtype) {
    case at::kFloat: return run(float());
    case at::kBFloat16: return run(at::BFloat16());
    case at::kHalf: return run(at::Half());
    default: TORCH_CHECK_VALUE(false, what, " must be float32, bfloat16 or float16, got ", dtype);
  }
}

void must_be(const char* what, const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(tensor.sizes() == sizes && tensor.scalar_type() == dtype, what, " must be ", dtype, " ", sizes,
      ", got ", tensor.scalar_type(), " ", tensor.sizes());
}

// The sizes of a state buffer [B, G, S, D] and its pair.
void must_be_state(const Tensor& key, const Tensor& value) {
  TORCH_CHECK_VALUE(key.dim() == 4, "key must have 4 dimensions, got ", key.dim());
  must_be("value", value, key.sizes(), key.scalar_type());
  TORCH_CHECK_VALUE(key.is_contiguous() && value.is_contiguous(),
      "key and value must be contiguous state buffers, got strides ", key.strides(), " and ", value.strides());
}

std::tuple<Tensor, Tensor> scored_attention(const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& bias, const Tensor& new_key, const Tensor& new_value, const Tensor& entering, double scale) {
  must_be_state(key, value);
  TORCH_CHECK_VALUE(query.dim() == 4, "query must have 4 dimensions, got ", query.dim());
  const int64_t batch = key.size(0), groups = key.size(1), slots = key.size(2), dim = key.size(3);
  const int64_t heads = query.size(2);
  const at::ScalarType dtype = query.scalar_type();
  must_be("query", query, {batch, groups, heads, dim}, key.scalar_type());
  TORCH_CHECK_VALUE(bias.dim() == 4, "bias must have 4 dimensions, got ", bias.dim());
  must_be("bias", bias, {batch, groups, bias.size(2) == 1 ? 1 : heads, slots}, at::kFloat);
  must_be("new_key", new_key, {batch, groups, dim}, dtype);
  must_be("new_value", new_value, {batch, groups, dim}, dtype);
  must_be("entering", entering, {batch}, at::kLong);
  Tensor out = at::empty(query.sizes(), query.options()), mass = at::empty({batch, groups, slots}, bias.options());
  const Shape shape{batch, groups, heads, slots, dim, ranges_for(batch * groups, slots), bias.size(2),
      static_cast<float>(scale)};
  for_dtype("query", dtype, [&](auto element) {
    attend_all<decltype(element)>(shape, query.contiguous(), key, value, bias.contiguous(), new_key.contiguous(),
        new_value.contiguous(), entering.contiguous(), out, mass);
  });
  return {out, mass};
}

std::tuple<Tensor, Tensor> prompt_attention(const Tensor& query, const Tensor& key, const Tensor& value,
    const Tensor& slot_key, const Tensor& slot_value, const Tensor& slot_bias, const Tensor& slot_position,
    const optional<Tensor>& new_bias, const Tensor& seen, const Tensor& pads, int64_t first, optional<int64_t> window,
    double scale, double decay) {
  must_be_state(slot_key, slot_value);
  const at::ScalarType dtype = query.scalar_type();
  const int64_t batch = slot_key.size(0), groups = slot_key.size(1), slots = slot_key.size(2), dim = slot_key.size(3);
  TORCH_CHECK_VALUE(query.dim() == 4 && query.size(1) % groups == 0, "query must be [", batch, ", r * ", groups,
      ", n, ", dim, "], got ", query.sizes());
  const int64_t heads = query.size(1) / groups, columns = query.size(2);
  must_be("query", query, {batch, groups * heads, columns, dim}, slot_key.scalar_type());
  must_be("key", key, {batch, groups, columns, dim}, dtype);
  must_be("value", value, {batch, groups, columns, dim}, dtype);
  TORCH_CHECK_VALUE(slot_bias.dim() == 4, "slot_bias must have 4 dimensions, got ", slot_bias.dim());
  must_be("slot_bias", slot_bias, {batch, groups, slot_bias.size(2) == 1 ? 1 : heads, slots}, at::kFloat);
  must_be("slot_position", slot_position, {batch, groups, slots}, at::kInt);
  if (new_bias) must_be("new_bias", *new_bias, {batch, groups, heads, columns}, at::kFloat);
  must_be("seen", seen, {batch}, at::kLong);
  must_be("pads", pads, {batch}, at::kLong);
  // rows of D numbers must be dense; their order is free, so a transposed projection is not copied
  auto dense = [](const Tensor& t) { return t.stride(3) == 1 || t.size(3) == 1 ? t : t.contiguous(); };
  const Tensor q = dense(query), k = dense(key), v = dense(value), bias = slot_bias.contiguous();
  const Tensor position = slot_position.contiguous(), had = seen.contiguous(), padding = pads.contiguous();
  const Tensor added = new_bias ? new_bias->contiguous() : Tensor();
  Tensor out = at::zeros(query.sizes(), query.options()), mass;
  for_dtype("query", dtype, [&](auto element) {
    using T = decltype(element);
    const Prompt<T> prompt{batch, groups, heads, columns, slots, dim, first, window.value_or(-1), bias.size(2),
        static_cast<float>(scale), static_cast<float>(decay), q.const_data_ptr<T>(), k.const_data_ptr<T>(),
        v.const_data_ptr<T>(), slot_key.const_data_ptr<T>(), slot_value.const_data_ptr<T>(),
        {q.stride(0), q.stride(1), q.stride(2)}, {k.stride(0), k.stride(1), k.stride(2)},
        {v.stride(0), v.stride(1), v.stride(2)}, bias.const_data_ptr<float>(),
        new_bias ? added.const_data_ptr<float>() : nullptr, position.const_data_ptr<int32_t>(),
        had.const_data_ptr<int64_t>(), padding.const_data_ptr<int64_t>(), out.data_ptr<T>()};
    mass = attend_prompt(prompt).view({batch, groups, slots + columns});
  });
  return {out, mass};
}

void absorb(Tensor& key, Tensor& value, Tensor& weight, Tensor& score, Tensor& position, Tensor& mean, Tensor& opened,
    const Tensor& new_key, const Tensor& new_value, const Tensor& new_weight, const Tensor& new_score,
    const Tensor& new_position, const Tensor& new_mean) {
  must_be_state(key, value);
  must_be_state(new_key, new_value);
  const int64_t batch = key.size(0), groups = key.size(1), slots = key.size(2), dim = key.size(3);
  const int64_t count = new_key.size(2), pairs = batch * groups;
  must_be("key", key, key.sizes(), at::kFloat);
  must_be("new_key", new_key, {batch, groups, count, dim}, new_key.scalar_type());
  for (const Tensor& one : {weight, score, mean}) {
    must_be("weight, score and mean", one, {batch, groups, slots}, at::kFloat);
  }
  for (const Tensor& one : {position, opened}) must_be("position and opened", one, {batch, groups, slots}, at::kInt);
  for (const Tensor& one : {weight, score, mean, position, opened}) {
    TORCH_CHECK_VALUE(one.is_contiguous(), "the residual slots must be contiguous, got strides ", one.strides());
  }
  const Tensor weights = new_weight.contiguous(), scores = new_score.contiguous(), means = new_mean.contiguous();
  const Tensor positions = new_position.contiguous();
  for (const Tensor& one : {weights, scores, means}) must_be("arrivals", one, {batch, groups, count}, at::kFloat);
  must_be("new_position", positions, {batch, groups, count}, at::kInt);
  if (slots == 0) return;
  for_dtype("new_key", new_key.scalar_type(), [&](auto element) {
    using T = decltype(element);
    at::parallel_for(0, pairs, 1, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t s = pair * slots, n = pair * count;
        absorb_all<T>({key.data_ptr<float>() + s * dim, value.data_ptr<float>() + s * dim,
                          weight.data_ptr<float>() + s, score.data_ptr<float>() + s, position.data_ptr<int32_t>() + s,
                          mean.data_ptr<float>() + s, opened.data_ptr<int32_t>() + s, slots, dim},
            {new_key.const_data_ptr<T>() + n * dim, new_value.const_data_ptr<T>() + n * dim,
                weights.const_data_ptr<float>() + n, scores.const_data_ptr<float>() + n,
                positions.const_data_ptr<int32_t>() + n, means.const_data_ptr<float>() + n, count});
      }
    });
  });
}

}  // namespace zsmerge

TORCH_LIBRARY_FRAGMENT(zsmerge, library) {
  library.def(
      "scored_attention(Tensor query, Tensor key, Tensor value, Tensor bias, Tensor new_key, Tensor new_value, "
      "Tensor entering, float scale) -> (Tensor out, Tensor mass)");
  library.def(
      "prompt_attention(Tensor query, Tensor key, Tensor value, Tensor slot_key, Tensor slot_value, "
      "Tensor slot_bias, Tensor slot_position, Tensor? new_bias, Tensor seen, Tensor pads, int first, int? window, "
      "float scale, float decay) -> (Tensor out, Tensor mass)");
  library.def(
      "absorb(Tensor(a!) key, Tensor(b!) value, Tensor(c!) weight, Tensor(d!) score, Tensor(e!) position, "
      "Tensor(f!) mean, Tensor(g!) opened, Tensor new_key, Tensor new_value, Tensor new_weight, Tensor new_score, "
      "Tensor new_position, Tensor new_mean) -> ()");
}

TORCH_LIBRARY_IMPL(zsmerge, CPU, library) {
  library.impl("scored_attention", TORCH_FN(zsmerge::scored_attention));
  library.impl("prompt_attention", TORCH_FN(zsmerge::prompt_attention));
  library.impl("absorb", TORCH_FN(zsmerge::absorb));
}
