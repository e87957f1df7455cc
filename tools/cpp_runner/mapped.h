// A file as memory.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <string_view>

#include "must.h"

namespace zsmerge {

// The file's bytes, mapped read-only for as long as the process lives: nothing is copied, and processes share it.
// Throws std::runtime_error.
inline std::string_view mapped(const std::filesystem::path& file) {
  std::error_code missing;
  const size_t size = std::filesystem::file_size(file, missing);
  if (missing) throw must(file.string(), "a file", missing.message());
  if (size == 0) return {};
  const int descriptor = open(file.c_str(), O_RDONLY);
  void* start = descriptor < 0 ? MAP_FAILED : mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
  const int error = errno;
  if (descriptor >= 0) close(descriptor);
  if (start == MAP_FAILED) throw must(file.string(), "readable", std::strerror(error));
  return {static_cast<const char*>(start), size};
}

}  // namespace zsmerge
