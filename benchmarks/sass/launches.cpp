// Prints the launches of a call of one layer with two stages: a line for each with its kind, stage, tile of
// tokens, grid and the bytes of its parameters. Pointers are addresses that nothing lies at.
//
//   launches CAPABILITY SMS SHARED_BYTES ACTIVATION DTYPE M K N RANK...
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cuda/decode/plain_params.h"

namespace {

constexpr uintptr_t kFirstAddress = uintptr_t{1} << 36, kApart = uintptr_t{1} << 30;

// Each is 256 bytes past a multiple of kApart, as allocations of torch are aligned.
uintptr_t next_number() {
  static uintptr_t address = kFirstAddress;
  return address += kApart;
}

template <typename T>
T* next_address() {
  return reinterpret_cast<T*>(next_number() + 256);
}

int64_t padded_words(int64_t cols) {
  return lb2::cuda::divide_up(lb2::cuda::divide_up(cols, LB2_WORD_BITS), 4) * 4;
}

void print(const char* kind, const lb2_cuda_launch& launch, const void* params, size_t bytes) {
  std::printf("%s %d %d %d %d %d ", kind, launch.stage, launch.token_tile, launch.grid_x, launch.grid_y,
              launch.grid_z);
  for (size_t i = 0; i < bytes; ++i) std::printf("%02x", static_cast<const unsigned char*>(params)[i]);
  std::printf("\n");
}

}  // namespace

int main(int argc, char** argv) {
  using namespace lb2::cuda;
  if (argc < 10) return EXIT_FAILURE;
  const auto number = [&](int i) { return std::atoll(argv[i]); };
  const lb2_cuda_device device = {sizeof device, static_cast<int32_t>(number(1)),
                                  static_cast<int32_t>(number(2)), number(3)};
  lb2_linear_args args = {};
  args.struct_size = sizeof args;
  args.dtype = static_cast<lb2_dtype>(number(5));
  args.m = number(6);
  args.k = args.input_stride = number(7);
  args.n = args.output_stride = number(8);
  std::vector<lb2_path> paths(static_cast<size_t>(argc - 9));
  for (size_t p = 0; p < paths.size(); ++p) {
    lb2_path& path = paths[p];
    path.rank = number(static_cast<int>(p) + 9);
    path.v = next_address<int32_t>();
    path.u = next_address<int32_t>();
    path.v_stride = padded_words(args.k);
    path.u_stride = padded_words(path.rank);  // the pitch of LittleBitLinear on a GPU
    path.in_scale = next_address<float>();
    path.latent_scale = next_address<float>();
    path.out_scale = next_address<float>();
  }
  args.paths = paths.data();
  args.num_paths = static_cast<int64_t>(paths.size());
  args.input = next_address<char>();
  args.output = next_address<char>();
  Layers layers;
  Plan plan;
  lb2_status status = gather_layers(&args, 1, &layers);
  if (status == LB2_OK)
    status = make_plan(layers.shape, static_cast<lb2_activation>(number(4)), device, nullptr, &plan);
  if (status != LB2_OK || !is_decode(plan)) {
    std::fprintf(stderr, "%s\n", status != LB2_OK ? lb2_last_error() : "the call has no decode launches");
    return EXIT_FAILURE;
  }
  char* workspace = align_workspace(next_address<char>());
  bool queued = false;
  for (int i = 0; i < plan.num_launches; ++i) {
    DecodeLaunch next;
    if (!next_decode_launch(layers, plan, i, 0, args.m, queued, workspace, &next)) continue;
    queued = true;
    if (next.is_plain)
      print(next.plain.input_dtype == LB2_FLOAT32 ? "plain" : "plain16", next.launch, &next.plain,
            sizeof next.plain);
    else
      print(next.launch.kind == LB2_CUDA_CONVERT ? "convert" : "decode", next.launch, &next.params,
            sizeof next.params);
  }
  return EXIT_SUCCESS;
}
