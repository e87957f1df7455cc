// A bundle of format "aoti" (zs.export) without Python: prompts and tokens in, logits out, over a cache that never
// grows.
#pragma once

#include <ATen/ATen.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "json.h"

namespace zsmerge {

// What manifest.json says. Throws std::runtime_error for what zs.export did not write: the manifest and every file are
// compared with their SHA-256, as a package trusts the shapes it is given. (Python's zs.load does the same.)
struct Manifest {
  explicit Manifest(const std::filesystem::path& folder);

  Json json;
  at::Device device = at::kCPU;
  int64_t batch_size = 0, vocab_size = 0;
  std::optional<int64_t> max_positions, max_places, chunk;
  int64_t held = 0;  // tokens that a row holds at most

  std::vector<at::Tensor> empty_cache() const;

 private:
  void check_files(const std::filesystem::path& folder) const;
};

class Runner {
 public:
  // Throws for what is no bundle of this format, version, PyTorch and device: std::runtime_error, or c10::Error from
  // PyTorch itself. Packages are unpacked to TMPDIR.
  explicit Runner(const std::filesystem::path& folder);

  // ids [b, T] int64, pads [b] padding columns on the left of each, rows [b] of the cache -> logits [b, vocab] of the
  // last column. More of a prompt goes behind what a row holds. std::runtime_error comes before anything is written; after
  // an error of PyTorch's own, reset.
  at::Tensor prefill(at::Tensor ids, at::Tensor pads, const at::Tensor& rows);

  // ids [B, 1] int64, one token per row, active [B] bool -> logits [B, vocab]; an inactive row stays as it is.
  at::Tensor decode(const at::Tensor& ids, const at::Tensor& active);

  // Empty every row.
  void reset();

  const Manifest& manifest() const { return manifest_; }

 private:
  using Package = torch::inductor::AOTIModelPackageLoader;

  std::unique_ptr<Package> package(const std::filesystem::path& folder, const char* graph);
  at::Tensor run(Package& graph, std::vector<at::Tensor> inputs);
  void check_rows(const at::Tensor& ids, const at::Tensor& pads, const at::Tensor& rows) const;
  void check_tokens(const at::Tensor& ids) const;
  void check_positions(const at::Tensor& seen, std::optional<int64_t> limit) const;

  Manifest manifest_;
  std::unordered_map<std::string, at::Tensor> weights_;  // before the packages, which read them where they lie
  std::vector<at::Tensor> state_;
  at::Tensor seen_;  // [B] int64: tokens each row has seen
  std::unique_ptr<Package> prefill_, decode_;
};

}  // namespace zsmerge
