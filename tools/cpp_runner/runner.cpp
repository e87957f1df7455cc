#include "runner.h"

#include <torch/version.h>

#include <fstream>
#include <iterator>
#include <map>

#include "must.h"
#include "weights.h"

namespace zsmerge {
namespace {

constexpr int64_t kVersion = 1;

Json read_json(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  if (!stream) throw must("bundle", "a folder with manifest.json", file.parent_path().string());
  return Json::parse(std::string(std::istreambuf_iterator<char>(stream), {}));
}

at::ScalarType dtype(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int32", at::kInt}};
  const auto found = known.find(name);
  if (found == known.end()) throw must("dtype in the manifest", "one of a cache", name);
  return found->second;
}

std::optional<int64_t> maybe(const Json& number) {
  return number.null() ? std::nullopt : std::optional(number.integer());
}

// "2.13.0" of "2.13.0+cpu"
std::string release(const std::string& version) { return version.substr(0, version.find('+')); }

}  // namespace

Manifest::Manifest(const std::filesystem::path& folder) : json(read_json(folder / "manifest.json")) {
  if (json["version"].integer() != kVersion) throw must("bundle's version", kVersion, json["version"].integer());
  if (json["format"].text() != "aoti") throw must("bundle's format", "aoti", json["format"].text());
  if (const auto& written = json["versions"]["torch"].text(); release(written) != TORCH_VERSION)
    throw must("PyTorch", written + ", with which this bundle was written", TORCH_VERSION);
  for (const auto& [name, facts] : json["files"].object()) {
    const auto file = folder / name;
    if (!std::filesystem::is_regular_file(file)) throw must(name + " of the bundle", "a file", "none");
    const auto size = static_cast<int64_t>(std::filesystem::file_size(file));
    if (size != facts["bytes"].integer())
      throw must(name + " of the bundle", std::to_string(facts["bytes"].integer()) + " bytes long", size);
  }
  const std::string& name = json["cache"]["device"].text();
  if (name != "cpu" && name != "cuda") throw must("bundle's device", "cpu or cuda", name);
  device = name == "cuda" ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  batch_size = json["cache"]["batch_size"].integer();
  vocab_size = json["model"]["vocab_size"].integer();
  max_positions = maybe(json["model"]["max_positions"]);
  chunk = maybe(json["chunk"]);
}

std::vector<at::Tensor> Manifest::empty_cache() const {
  std::vector<at::Tensor> state;
  for (const Json& layer : json["cache"]["layers"].array()) {
    for (const Json& tensor : layer.array()) {  // [name, shape, dtype]
      std::vector<int64_t> shape;
      for (const Json& size : tensor.array().at(1).array()) shape.push_back(size.integer());
      state.push_back(at::zeros(shape, at::TensorOptions(device).dtype(dtype(tensor.array().at(2).text()))));
    }
  }
  return state;
}

Runner::Runner(const std::filesystem::path& folder)
    : manifest_(folder),
      weights_(read_weights(folder / "weights.safetensors", manifest_.device)),
      state_(manifest_.empty_cache()),
      seen_(at::zeros({manifest_.batch_size}, at::TensorOptions(manifest_.device).dtype(at::kLong))),
      prefill_(package(folder, "prefill")),
      decode_(package(folder, "decode")) {}

std::unique_ptr<Runner::Package> Runner::package(const std::filesystem::path& folder, const char* graph) {
  const auto file = folder / manifest_.json["programs"][graph]["file"].text();
  auto loaded = std::make_unique<Package>(file.string(), "model", false, 1, manifest_.device.index());
  std::unordered_map<std::string, at::Tensor> constants;
  for (const std::string& name : loaded->get_constant_fqns()) {
    const auto found = weights_.find(name);
    if (found == weights_.end()) throw must("weights.safetensors", "complete", "none named " + name);
    constants.insert(*found);
  }
  loaded->load_constants(constants, /*use_inactive=*/false, /*check_full_update=*/true, /*user_managed=*/true);
  return loaded;
}

at::Tensor Runner::prefill(at::Tensor ids, at::Tensor pads, const at::Tensor& rows) {
  const int64_t length = ids.size(1), step = manifest_.chunk.value_or(length);
  check_tokens(ids);
  if (length == 0 || pads.lt(0).logical_or(pads.ge(length)).any().item<bool>())
    throw must("prompt", "at least one token long", "an empty row");
  check_positions(seen_.index({rows}) + length - pads);

  // Chunks are aligned at the right end: what is missing is padding of the first one.
  const int64_t missing = (step - length % step) % step;
  ids = at::constant_pad_nd(ids, {missing, 0});
  pads = pads + missing;
  at::Tensor logits;
  for (int64_t start = 0; start < ids.size(1); start += step) {
    const at::Tensor padding = (pads - start).clamp(0, step);
    const at::Tensor seen = seen_.index({rows}), columns = at::arange(step, seen.options());
    const at::Tensor positions = (seen.unsqueeze(1) + columns - padding.unsqueeze(1)).clamp_min(0);
    logits = run(*prefill_, {ids.slice(1, start, start + step).contiguous(), positions, rows, seen_, padding});
    seen_.index_add_(0, rows, step - padding);
  }
  return logits;
}

at::Tensor Runner::decode(const at::Tensor& ids, const at::Tensor& active) {
  check_tokens(ids);
  if (ids.sizes() != at::IntArrayRef({manifest_.batch_size, 1})) throw must("tokens", "one per row", ids.sizes());
  check_positions(seen_ + active);
  const at::Tensor logits = run(*decode_, {ids.contiguous(), seen_, active.contiguous()});
  seen_ += active;
  return logits;
}

void Runner::reset() {
  for (at::Tensor& tensor : state_) tensor.zero_();
  seen_.zero_();
}

at::Tensor Runner::run(Package& graph, std::vector<at::Tensor> inputs) {
  inputs.insert(inputs.end(), state_.begin(), state_.end());
  return graph.run(inputs).at(0);
}

void Runner::check_tokens(const at::Tensor& ids) const {
  if (ids.lt(0).logical_or(ids.ge(manifest_.vocab_size)).any().item<bool>())
    throw must("tokens", "in 0 .. " + std::to_string(manifest_.vocab_size - 1), "others");
}

void Runner::check_positions(const at::Tensor& seen) const {
  const int64_t longest = seen.max().item<int64_t>();
  if (manifest_.max_positions && longest > *manifest_.max_positions)
    throw must("tokens seen", "at most " + std::to_string(*manifest_.max_positions), longest);
}

}  // namespace zsmerge
