// zsmerge-run BUNDLE STEPS PROMPT...: greedy tokens after one prompt of token ids per row of the cache ("5,17,3").
// Prints a line of ids per row, and to standard error how long it took.

#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <iostream>
#include <string_view>

#include "must.h"
#include "runner.h"

namespace {

using Clock = std::chrono::steady_clock;

int64_t number(std::string_view text) {
  int64_t read = 0;
  const auto [stop, error] = std::from_chars(text.data(), text.data() + text.size(), read);
  if (error != std::errc() || stop != text.data() + text.size()) throw zsmerge::must("argument", "a number", text);
  return read;
}

std::vector<int64_t> numbers(std::string_view text) {
  std::vector<int64_t> found;
  for (size_t comma = 0; comma != std::string_view::npos; text.remove_prefix(std::min(comma + 1, text.size()))) {
    comma = text.find(',');
    found.push_back(number(text.substr(0, comma)));
  }
  return found;
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

void run(const std::filesystem::path& bundle, int64_t steps, const std::vector<std::vector<int64_t>>& prompts) {
  const c10::InferenceMode inference;
  if (steps < 1) throw zsmerge::must("steps", "at least 1", steps);
  zsmerge::Runner runner(bundle);
  const auto batch = runner.manifest().batch_size;
  if (static_cast<int64_t>(prompts.size()) != batch) throw zsmerge::must("prompts", batch, prompts.size());

  size_t longest = 0;
  for (const auto& prompt : prompts) longest = std::max(longest, prompt.size());
  const int64_t last = static_cast<int64_t>(longest) + steps - 1;
  if (const auto limit = runner.manifest().max_positions; limit && last > *limit)
    throw zsmerge::must("tokens seen", "at most " + std::to_string(*limit), last);
  std::vector<int64_t> padded, pads;
  for (const auto& prompt : prompts) {
    pads.push_back(static_cast<int64_t>(longest - prompt.size()));
    padded.insert(padded.end(), longest - prompt.size(), 0);
    padded.insert(padded.end(), prompt.begin(), prompt.end());
  }
  const auto integers = at::TensorOptions(runner.manifest().device).dtype(at::kLong);
  const auto ids = at::tensor(padded).view({batch, -1}).to(integers), skipped = at::tensor(pads).to(integers);
  const auto every = at::ones({batch}, integers.dtype(at::kBool));

  auto start = Clock::now();
  std::vector<at::Tensor> tokens = {runner.prefill(ids, skipped, at::arange(batch, integers)).argmax(-1, true)};
  const auto first = tokens.back().cpu();
  const double prompt_time = milliseconds_since(start);
  start = Clock::now();
  while (static_cast<int64_t>(tokens.size()) < steps)
    tokens.push_back(runner.decode(tokens.back(), every).argmax(-1, true));
  const auto written = at::cat(tokens, 1).cpu();
  const double step_time = milliseconds_since(start) / static_cast<double>(std::max<int64_t>(steps - 1, 1));

  for (int64_t row = 0; row < batch; ++row)
    for (int64_t step = 0; step < steps; ++step)
      std::cout << written[row][step].item<int64_t>() << (step + 1 < steps ? ',' : '\n');
  if (!std::cout.flush()) throw zsmerge::must("output", "written", "an error");
  std::cerr << "prompt " << prompt_time << " ms, then " << step_time << " ms per token\n";
}

}  // namespace

int main(int count, char** arguments) {
  if (count < 4) {
    std::cerr << "usage: zsmerge-run BUNDLE STEPS PROMPT...   (one prompt of token ids per row: 5,17,3)\n";
    return 2;
  }
  try {
    std::vector<std::vector<int64_t>> prompts;
    for (int i = 3; i < count; ++i) prompts.push_back(numbers(arguments[i]));
    run(arguments[1], number(arguments[2]), prompts);
  } catch (const c10::Error& error) {
    std::cerr << "error: " << error.what_without_backtrace() << '\n';
    return 1;
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
  return 0;
}
