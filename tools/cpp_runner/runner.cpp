#include "runner.h"

#include <ATen/Context.h>

#include <map>
#include <regex>
#include <set>

#include "mapped.h"
#include "must.h"
#include "sha256.h"
#include "weights.h"

namespace zsmerge {
namespace {

constexpr int64_t kVersion = 2;

// The manifest, whose last line has the SHA-256 of all lines before it.
Json read_manifest(const std::filesystem::path& folder) {
  const auto file = folder / "manifest.json";
  if (!std::filesystem::is_regular_file(file)) throw must("bundle", "a folder with manifest.json", folder.string());
  const std::string_view text = mapped(file);
  Json json = Json::parse(text);
  if (json["version"].integer() != kVersion) throw must("bundle's version", kVersion, json["version"].integer());
  const std::string_view last = ",\n \"sha256\": \"";
  const size_t end = text.rfind(last);
  if (end == std::string_view::npos || json["sha256"].text() != sha256(text.substr(0, end)))
    throw must("manifest", "what was written (SHA-256)", "other content");
  return json;
}

at::ScalarType dtype(const std::string& name) {
  static const std::map<std::string, at::ScalarType> known = {
      {"float32", at::kFloat}, {"float16", at::kHalf}, {"bfloat16", at::kBFloat16}, {"int32", at::kInt}};
  const auto found = known.find(name);
  if (found == known.end()) throw must("dtype in the manifest", "one of a cache", name);
  return found->second;
}

int64_t count(const Json& number, const char* what, int64_t least) {
  if (number.integer() < least) throw must(what, "at least " + std::to_string(least), number.integer());
  return number.integer();
}

std::optional<int64_t> maybe(const Json& number, const char* what, int64_t least) {
  return number.null() ? std::nullopt : std::optional(count(number, what, least));
}

}  // namespace

Manifest::Manifest(const std::filesystem::path& folder) : json(read_manifest(folder)) {
  if (json["format"].text() != "aoti") throw must("bundle's format", "aoti", json["format"].text());
  if (const auto& written = json["versions"]["torch"].text(); written != ZSMERGE_TORCH)
    throw must("PyTorch", written + ", with which this bundle was written", ZSMERGE_TORCH);
  check_files(folder);
  const std::string& name = json["cache"]["device"].text();
  if (name != "cpu" && name != "cuda") throw must("bundle's device", "cpu or cuda", name);
  if (name == "cuda" && !at::hasCUDA()) throw must("this PyTorch", "one with CUDA, as the bundle needs", "none");
  device = name == "cuda" ? at::Device(at::kCUDA, 0) : at::Device(at::kCPU);
  batch_size = count(json["cache"]["batch_size"], "batch_size", 1);
  vocab_size = count(json["model"]["vocab_size"], "vocab_size", 1);
  max_positions = maybe(json["model"]["max_positions"], "max_positions", 0);
  max_places = maybe(json["model"]["max_places"], "max_places", 0);
  for (const Json& layer : json["cache"]["parts"].array()) {
    int64_t slots = 0;
    for (const char* part : {"proximity", "context", "residual"}) slots += count(layer[part], part, 0);
    held = std::max(held, slots);
  }
  chunk = maybe(json["chunk"], "chunk", 1);
}

void Manifest::check_files(const std::filesystem::path& folder) const {
  static const std::regex plain("[A-Za-z0-9_][A-Za-z0-9_.-]*(/[A-Za-z0-9_][A-Za-z0-9_.-]*)*");
  std::set<std::string> named;
  for (const auto& [name, facts] : json["files"].object()) {
    if (!std::regex_match(name, plain)) throw must("file name in the manifest", "a plain path inside the bundle", name);
    const auto file = folder / name;
    const std::string what = name + " of the bundle";
    if (!std::filesystem::is_regular_file(file)) throw must(what, "a file", "none");
    const std::string_view bytes = mapped(file);
    const int64_t size = facts["bytes"].integer();
    if (static_cast<int64_t>(bytes.size()) != size)
      throw must(what, std::to_string(size) + " bytes long", bytes.size());
    if (sha256(bytes) != facts["sha256"].text()) throw must(what, "what was written (SHA-256)", "other content");
    named.insert(name);
  }
  for (const char* graph : {"prefill", "decode"}) {
    const std::string& file = json["programs"][graph]["file"].text();
    if (!named.count(file)) throw must(std::string("file of ") + graph, "one of the bundle's", file);
  }
  if (!named.count("weights.safetensors")) throw must("manifest's files", "with weights.safetensors", "without");
}

std::vector<at::Tensor> Manifest::empty_cache() const {
  std::vector<at::Tensor> state;
  for (const Json& layer : json["cache"]["layers"].array()) {
    for (const Json& tensor : layer.array()) {
      const Json::Array& facts = tensor.array();  // [name, shape, dtype]
      if (facts.size() != 3) throw must("tensor of the cache", "name, shape and dtype", facts.size());
      std::vector<int64_t> shape;
      for (const Json& size : facts[1].array()) shape.push_back(count(size, "size in the cache", 0));
      if (shape.empty() || shape[0] != batch_size) throw must("rows of the cache", batch_size, "another count");
      state.push_back(at::zeros(shape, at::TensorOptions(device).dtype(dtype(facts[2].text()))));
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
  check_rows(ids, pads, rows);
  const int64_t length = ids.size(1), step = manifest_.chunk.value_or(length);
  check_tokens(ids);
  if (length == 0 || pads.lt(0).logical_or(pads.ge(length)).any().item<bool>())
    throw must("prompt", "at least one token long", "an empty row");
  const at::Tensor had = seen_.index({rows});
  check_positions(had + length - pads, manifest_.max_positions);
  const at::Tensor last = (length - pads).clamp_max(step);  // the last chunk
  check_positions((had + length - pads - last).clamp_max(manifest_.held) + last, manifest_.max_places);

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
  const int64_t batch = manifest_.batch_size;
  if (ids.sizes() != at::IntArrayRef({batch, 1})) throw must("tokens", "one per row", ids.sizes());
  if (active.scalar_type() != at::kBool || active.sizes() != at::IntArrayRef({batch}))
    throw must("active", "bool, one per row", active.toString());
  check_positions(seen_ + active, manifest_.max_positions);
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

void Runner::check_rows(const at::Tensor& ids, const at::Tensor& pads, const at::Tensor& rows) const {
  if (ids.dim() != 2) throw must("ids", "of shape [b, T]", ids.sizes());
  const int64_t count = ids.size(0);
  for (const at::Tensor& each : {pads, rows})
    if (each.scalar_type() != at::kLong || each.sizes() != at::IntArrayRef({count}))
      throw must("pads and rows", "int64, one per row of ids", each.sizes());
  const at::Tensor sorted = std::get<0>(rows.cpu().sort());
  const bool twice = count > 1 && sorted.slice(0, 1).eq(sorted.slice(0, 0, count - 1)).any().item<bool>();
  if (count == 0 || twice || sorted[0].item<int64_t>() < 0 || sorted[count - 1].item<int64_t>() >= manifest_.batch_size)
    throw must("rows", "distinct, in 0 .. " + std::to_string(manifest_.batch_size - 1), rows);
}

void Runner::check_tokens(const at::Tensor& ids) const {
  if (ids.scalar_type() != at::kLong) throw must("tokens", "int64", ids.toString());
  const at::Tensor wrong = ids.masked_select(ids.lt(0).logical_or(ids.ge(manifest_.vocab_size)));
  if (wrong.numel() > 0)
    throw must("tokens", "in 0 .. " + std::to_string(manifest_.vocab_size - 1), wrong[0].item<int64_t>());
}

void Runner::check_positions(const at::Tensor& seen, std::optional<int64_t> limit) const {
  const int64_t longest = seen.max().item<int64_t>();
  if (limit && longest > *limit) throw must("tokens seen", "at most " + std::to_string(*limit), longest);
}

}  // namespace zsmerge
