// Errors as the Python package words them.
#pragma once

#include <sstream>
#include <stdexcept>

namespace zsmerge {

// "<what> must be <expected>, got <got>"
template <typename What, typename Expected, typename Got>
std::runtime_error must(const What& what, const Expected& expected, const Got& got) {
  std::ostringstream message;
  message << what << " must be " << expected << ", got " << got;
  return std::runtime_error(message.str());
}

}  // namespace zsmerge
