// The plain decode kernels (csrc/cuda/decode/plain.h) on the host: the same bits as the other decode kernels
// give for the same layer at addresses that the plain ones do not take.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "cuda/call.h"
#include "cuda/decode/plain_params.h"
#include "cuda_host/device.h"

namespace {

struct Shape {
  int64_t k, n;
  std::vector<int64_t> ranks;
};

// A layer of random signs and scales. Rows of signs are whole multiples of 16 bytes apart; nothing lies past
// the last word of a matrix.
struct Data {
  const Shape shape;
  const int64_t m;
  const lb2_dtype dtype;
  std::vector<std::vector<uint32_t>> v, u;
  std::vector<std::vector<float>> in_scale, latent_scale, out_scale;
  std::vector<float> bias;
  std::vector<uint16_t> halves;
  std::vector<float> floats;

  static int64_t stride(int64_t cols) { return (lb2_words_per_row(cols) + 3) / 4 * 4; }

  static std::vector<uint32_t> signs(int64_t rows, int64_t cols) {
    std::vector<uint32_t> words(static_cast<size_t>((rows - 1) * stride(cols) + lb2_words_per_row(cols)));
    for (uint32_t& word : words) word = static_cast<uint32_t>(engine());
    return words;
  }

  Data(const Shape& layer, int64_t tokens, lb2_dtype type)
      : shape(layer),
        m(tokens),
        dtype(type),
        bias(random_floats(layer.n)),
        floats(random_floats(m * layer.k)) {
    for (const int64_t rank : shape.ranks) {
      v.push_back(signs(rank, shape.k));
      u.push_back(signs(shape.n, rank));
      in_scale.push_back(random_floats(shape.k));
      latent_scale.push_back(random_floats(rank));
      out_scale.push_back(random_floats(shape.n));
    }
    for (const float value : floats)
      halves.push_back(dtype == LB2_FLOAT16 ? lb2::cuda::float_to_half(value)
                                            : lb2::cuda::float_to_bfloat(value));
  }

  // The output of a call with all of it `offset` bytes past multiples of 16, and how many of the launches
  // were plain.
  std::vector<char> run(lb2_activation activation, const lb2_cuda_device& device,
                        const lb2_cuda_tuning& tuning, int64_t offset, int* plain) const {
    std::vector<Buffer> memory;
    std::vector<lb2_path> paths(shape.ranks.size());
    const auto keep = [&](const auto& values) {
      memory.push_back(copy_out(values, offset));
      return memory.back().data;
    };
    for (size_t p = 0; p < paths.size(); ++p) {
      paths[p].rank = shape.ranks[p];
      paths[p].v = reinterpret_cast<const int32_t*>(keep(v[p]));
      paths[p].u = reinterpret_cast<const int32_t*>(keep(u[p]));
      paths[p].v_stride = stride(shape.k);
      paths[p].u_stride = stride(shape.ranks[p]);
      paths[p].in_scale = reinterpret_cast<const float*>(keep(in_scale[p]));
      paths[p].latent_scale = reinterpret_cast<const float*>(keep(latent_scale[p]));
      paths[p].out_scale = reinterpret_cast<const float*>(keep(out_scale[p]));
    }
    std::vector<char> output(static_cast<size_t>(m * shape.n * element_bytes(dtype)));
    lb2_linear_args args = {};
    args.struct_size = sizeof args;
    args.m = m;
    args.k = args.input_stride = shape.k;
    args.n = args.output_stride = shape.n;
    args.paths = paths.data();
    args.num_paths = static_cast<int64_t>(paths.size());
    args.bias = reinterpret_cast<const float*>(keep(bias));
    args.input = dtype == LB2_FLOAT32 ? keep(floats) : keep(halves);
    args.output = output.data();
    args.dtype = dtype;
    const lb2_cuda_plan plan = make_plan({args}, activation, device, &tuning);
    if (!forward({args}, plan, lb2::cuda::Order::kShuffled)) std::abort();
    *plain = 0;
    for (const lb2::cuda::host::Runtime::Launch& launch : lb2::cuda::host::runtime().launches)
      *plain += launch.params_bytes == sizeof(lb2::cuda::PlainParams);
    return output;
  }
};

bool report(const char* what, const Data& data, lb2_activation activation, const lb2_cuda_tuning& tuning,
            int plain) {
  std::fprintf(
      stderr,
      "%s: activation %d, dtype %d, m=%d k=%d n=%d, %d paths, rank %d, row warps %d and %d, %d splits, "
      "%d plain launches\n",
      what, activation, data.dtype, static_cast<int>(data.m), static_cast<int>(data.shape.k),
      static_cast<int>(data.shape.n), static_cast<int>(data.shape.ranks.size()),
      static_cast<int>(data.shape.ranks[0]), tuning.row_warps[0], tuning.row_warps[1], tuning.splits, plain);
  return false;
}

// Tokens fewer than a tile, several turns of a warp, slices that end within a run of 16, a last row of which
// 16 bytes cannot be read, several items of a warp, and more parts than are added at once.
int many_plain = 0;  // plain launches of five and more tokens

bool same_bits_as_the_others(int index, int only_mode) {
  const Shape shapes[] = {{512, 41, {40}},           {1096, 40, {136, 24}}, {4104, 24, {16, 16}},
                          {520, 130, {520, 8, 264}}, {8, 33, {8}},          {3584, 17, {24}}};
  const Shape& shape = shapes[index % 6];
  const lb2_dtype dtypes[] = {LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16};
  const Data data(shape, pick({1, 2, 3, 4, 5, 8, 13, 16}), dtypes[engine() % 3]);
  lb2_cuda_tuning tuning = {};
  tuning.struct_size = sizeof tuning;
  for (int32_t& row_warps : tuning.row_warps) row_warps = static_cast<int32_t>(pick({0, 1, 2, 8}));
  const int64_t slices = (shape.k + lb2::cuda::kSliceCols - 1) / lb2::cuda::kSliceCols;
  tuning.splits = static_cast<int32_t>(std::min(slices, pick({0, 1, 2, 3, 5, 7})));
  const lb2_cuda_device device = {sizeof device, static_cast<int32_t>(pick({80, 90})), 132, 166912};
  const lb2_activation activation =
      static_cast<lb2_activation>(only_mode > 0 ? only_mode : LB2_ACTIVATION_EXACT + index % 5);
  int plain = 0, others = 0;
  const std::vector<char> fast = data.run(activation, device, tuning, 0, &plain);
  const std::vector<char> slow = data.run(activation, device, tuning, 4, &others);
  // From five tokens on, stages with much to convert take the others, and a launch that converts.
  if (others != 0 || plain > 2 || (data.m <= 4 && plain != 2))
    return report("not the kernels that were meant", data, activation, tuning, plain);
  if (data.m > 4) many_plain += plain;
  if (fast != slow) return report("the bits differ", data, activation, tuning, plain);
  return true;
}

int report_none() {
  std::fprintf(stderr, "no call of five and more tokens was plain\n");
  return EXIT_FAILURE;
}

// A call that is plain but for one thing takes the other kernels.
bool refuses_what_it_cannot_do() {
  using namespace lb2::cuda;
  alignas(16) static float scale[16];
  lb2_cuda_launch launch = {};
  launch.kind = LB2_CUDA_DECODE;
  launch.token_tile = 2;
  launch.shared_bytes = 4096;
  DecodeParams params = {};
  params.num_terms = params.num_groups = params.num_parts = 1;
  params.m = 2;
  params.chunk_slices = 1;
  params.groups[0].rows = 16;
  params.groups[0].last_term = 1;
  params.groups[0].part_slices = 1;
  Term& term = params.terms[0];
  term.input = term.scale = scale;
  term.words = reinterpret_cast<const uint32_t*>(scale);
  term.word_stride = 4;
  term.input_stride = 64;
  term.cols = 64;
  term.slices = 1;
  PlainParams plain;
  if (!plain_params(launch, params, &plain)) return failed("a plain call is not taken as one", 0);
  const auto refuses = [&](void (*change)(lb2_cuda_launch&, DecodeParams&)) {
    lb2_cuda_launch other = launch;
    DecodeParams changed = params;
    change(other, changed);
    return !plain_params(other, changed, &plain);
  };
  using Change = void (*)(lb2_cuda_launch&, DecodeParams&);
  const Change changes[] = {
      [](lb2_cuda_launch& l, DecodeParams& p) {
        l.token_tile = 8;
        p.m = 9;
      },
      [](lb2_cuda_launch& l, DecodeParams& p) {
        l.token_tile = 16;
        p.chunk_slices = p.groups[0].part_slices = 3;
      },
      [](lb2_cuda_launch& l, DecodeParams&) { l.kind = LB2_CUDA_CONVERT; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.num_terms = kPlainTerms + 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.extras.normed = 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.extras.factor = scale; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.extras.residual = scale; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.extras.function_rows = 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.groups[0].rows = 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.groups[0].part_rest = 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].cols = 60; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].word_stride = 5; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].word_stride = int64_t{1} << 28; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].input_stride = 66; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].input_stride = int64_t{1} << 30; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].scale += 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].words += 1; },
      [](lb2_cuda_launch&, DecodeParams& p) { p.terms[0].input = scale + 1; },
      [](lb2_cuda_launch&, DecodeParams& p) {
        p.num_parts = 2;
        p.terms[0].part_stride = 66;
      },
  };
  for (const Change change : changes)
    if (!refuses(change))
      return failed("a call is taken as plain that is not", static_cast<int>(&change - changes));
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  const int count = argc > 1 ? std::atoi(argv[1]) : problem_count(90);
  const int only_mode = argc > 2 ? std::atoi(argv[2]) : 0;
  if (!refuses_what_it_cannot_do()) return EXIT_FAILURE;
  for (int i = 0; i < count; ++i)
    if (!same_bits_as_the_others(i, only_mode)) return EXIT_FAILURE;
  if (count >= 20 && many_plain == 0) return report_none();
  std::printf("%d problems passed\n", count);
  return EXIT_SUCCESS;
}
