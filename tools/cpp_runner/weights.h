// Tensors of a safetensors file, by name.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>
#include <string>
#include <unordered_map>

namespace zsmerge {

// On the CPU they are the file itself, mapped read-only for as long as the process lives: nothing is copied, and
// processes share it. Elsewhere they are copied to the device. Throws std::runtime_error.
std::unordered_map<std::string, at::Tensor> read_weights(const std::filesystem::path& file, at::Device device);

}  // namespace zsmerge
