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

// What manifest.json says. Files are compared by their sizes; checksums are left to Python's zs.load.
struct Manifest {
  explicit Manifest(const std::filesystem::path& folder);

  Json json;
  at::Device device = at::kCPU;
  int64_t batch_size = 0, vocab_size = 0;
  std::optional<int64_t> max_positions, chunk;

  std::vector<at::Tensor> empty_cache() const;
};

class Runner {
 public:
  // Throws std::runtime_error (c10::Error is one) for what is no bundle of this format, version, PyTorch and device.
  explicit Runner(const std::filesystem::path& folder);

  // ids [b, T] int64, pads [b] padding columns on the left of each, rows [b] of the cache -> logits [b, vocab] of the
  // last column. More of a prompt goes behind what a row holds. Throws before anything is written.
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
  void check_tokens(const at::Tensor& ids) const;
  void check_positions(const at::Tensor& seen) const;

  Manifest manifest_;
  std::unordered_map<std::string, at::Tensor> weights_;  // before the packages, which read them where they lie
  std::vector<at::Tensor> state_;
  at::Tensor seen_;  // [B] int64: tokens each row has seen
  std::unique_ptr<Package> prefill_, decode_;
};

}  // namespace zsmerge
