// Runs one layer of a checkpoint on raw activations, as the workers of a server would: several requests at
// the same time, each on a thread of its own, share one pool of threads.
//
//   layer_client FILE.safetensors LAYER INPUT OUTPUT [--dtype float32|float16|bfloat16] [--threads N]
//   [--requests N]
//
// INPUT holds x [M, K] and OUTPUT gets y [M, N], contiguous values of the dtype without a header. The tokens
// are shared out among the requests. A token's result has the same bits whatever the requests and threads
// are.
#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "layer.h"

namespace {

struct Options {
  std::string file, layer, input, output;
  lb2_dtype dtype = LB2_FLOAT32;
  int threads = 1;
  int requests = 1;
};

constexpr const char* kUsage =
    "usage: layer_client FILE.safetensors LAYER INPUT OUTPUT [--dtype float32|float16|bfloat16] [--threads "
    "N] "
    "[--requests N]";

int parse_count(const std::string& option, const std::string& text) {
  char* end = nullptr;
  errno = 0;
  const long value = std::strtol(text.c_str(), &end, 10);
  if (errno != 0 || end == text.c_str() || *end != '\0' || value < 1 || value > 1024)
    throw std::invalid_argument(option + " must be between 1 and 1024, got " + text);
  return static_cast<int>(value);
}

lb2_dtype parse_dtype(const std::string& text) {
  if (text == "float32") return LB2_FLOAT32;
  if (text == "float16") return LB2_FLOAT16;
  if (text == "bfloat16") return LB2_BFLOAT16;
  throw std::invalid_argument("--dtype must be float32, float16 or bfloat16, got " + text);
}

Options parse(int argc, char** argv) {
  std::vector<std::string> positional;
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument.compare(0, 2, "--") != 0) {
      positional.push_back(argument);
      continue;
    }
    if (argument != "--dtype" && argument != "--threads" && argument != "--requests")
      throw std::invalid_argument("unknown option " + argument + "; " + kUsage);
    if (++i == argc) throw std::invalid_argument(argument + " needs a value; " + kUsage);
    if (argument == "--dtype") options.dtype = parse_dtype(argv[i]);
    if (argument == "--threads") options.threads = parse_count(argument, argv[i]);
    if (argument == "--requests") options.requests = parse_count(argument, argv[i]);
  }
  if (positional.size() != 4) throw std::invalid_argument(kUsage);
  options.file = positional[0];
  options.layer = positional[1];
  options.input = positional[2];
  options.output = positional[3];
  return options;
}

std::vector<char> read_all(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) throw std::runtime_error(path + " cannot be opened");
  return {std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>()};
}

void run(const Options& options) {
  ThreadPool pool(options.threads);
  const SafetensorsFile file(options.file);
  const Layer layer(file, options.layer, pool);

  const std::vector<char> x = read_all(options.input);
  const int64_t item = options.dtype == LB2_FLOAT32 ? 4 : 2;
  const int64_t row = layer.in_features() * item, out_row = layer.out_features() * item;
  const auto input_bytes = static_cast<int64_t>(x.size());
  if (input_bytes % row != 0)
    throw std::runtime_error(options.input + " must hold rows of " + std::to_string(row) + " bytes, got " +
                             std::to_string(input_bytes) + " bytes");
  const int64_t tokens = input_bytes / row;
  std::vector<char> y(static_cast<size_t>(tokens * out_row));

  std::vector<std::exception_ptr> errors(static_cast<size_t>(options.requests));
  std::vector<std::thread> requests;
  for (int r = 0; r < options.requests; ++r) {
    const int64_t begin = tokens * r / options.requests, end = tokens * (r + 1) / options.requests;
    requests.emplace_back([&, r, begin, end] {
      try {
        Workspace workspace;
        layer.forward(options.dtype, end - begin, x.data() + begin * row, y.data() + begin * out_row, pool,
                      workspace);
      } catch (...) {
        errors[static_cast<size_t>(r)] = std::current_exception();
      }
    });
  }
  for (std::thread& request : requests) request.join();
  for (const std::exception_ptr& error : errors)
    if (error) std::rethrow_exception(error);

  std::ofstream out(options.output, std::ios::binary);
  out.write(y.data(), static_cast<std::streamsize>(y.size()));
  out.close();
  if (!out) throw std::runtime_error(options.output + " cannot be written");
  std::printf(
      "littlebit2 %s: %s, K=%lld, N=%lld, %lld paths, %lld bytes; %lld tokens in %d requests on %d threads\n",
      lb2_version(), options.layer.c_str(), static_cast<long long>(layer.in_features()),
      static_cast<long long>(layer.out_features()), static_cast<long long>(layer.paths()),
      static_cast<long long>(layer.bytes()), static_cast<long long>(tokens), options.requests,
      options.threads);
}

}  // namespace

int main(int argc, char** argv) {
  try {
    run(parse(argc, argv));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "layer_client: %s\n", error.what());
    return 1;
  }
  return 0;
}
