#include "weights.h"

#include <cstring>
#include <map>
#include <string_view>

#include "json.h"
#include "mapped.h"
#include "must.h"

namespace zsmerge {
namespace {

at::ScalarType dtype(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"F64", at::kDouble}, {"F32", at::kFloat}, {"F16", at::kHalf}, {"BF16", at::kBFloat16},
      {"I64", at::kLong},   {"I32", at::kInt},   {"I16", at::kShort}, {"I8", at::kChar},
      {"U8", at::kByte},    {"BOOL", at::kBool}};
  const auto found = known.find(name);
  if (found == known.end()) throw must("dtype in the safetensors header", "one that bundles use", name);
  return found->second;
}

}  // namespace

std::unordered_map<std::string, at::Tensor> read_weights(const std::filesystem::path& file, at::Device device) {
  const std::string_view bytes = mapped(file);
  uint64_t length = 0;
  if (bytes.size() < sizeof length) throw must(file.filename().string(), "a safetensors file", "less than a header");
  std::memcpy(&length, bytes.data(), sizeof length);
  if (length > bytes.size() - sizeof length) throw must(file.filename().string(), "whole", "a header cut off");
  const Json header = Json::parse(bytes.substr(sizeof length, length));
  const std::string_view data = bytes.substr(sizeof length + length);

  std::unordered_map<std::string, at::Tensor> tensors;
  for (const auto& [name, entry] : header.object()) {
    if (name == "__metadata__") continue;
    std::vector<int64_t> shape;
    int64_t size = static_cast<int64_t>(at::elementSize(dtype(entry["dtype"].text())));
    for (const Json& dimension : entry["shape"].array()) {
      shape.push_back(dimension.integer());
      if (shape.back() < 0 || __builtin_mul_overflow(size, shape.back(), &size))
        throw must("shape of " + name, "one of sizes", shape.back());
    }
    const auto& place = entry["data_offsets"].array();
    if (place.size() != 2) throw must("data_offsets of " + name, "two", place.size());
    const int64_t begin = place[0].integer(), end = place[1].integer();
    if (begin < 0 || end < begin || end > static_cast<int64_t>(data.size()) || end - begin != size)
      throw must("bytes of " + name, size, std::to_string(begin) + " to " + std::to_string(end));
    const auto type = at::TensorOptions(dtype(entry["dtype"].text()));
    tensors[name] = at::from_blob(const_cast<char*>(data.data() + begin), shape, type).to(device);
  }
  return tensors;
}

}  // namespace zsmerge
