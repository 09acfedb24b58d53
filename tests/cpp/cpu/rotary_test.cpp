// Random rotary embeddings against a double reference, on every instruction set this machine runs. All of
// them must agree to the bit.
#include <cstdio>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

namespace {

Buffer random_buffer(lb2_dtype dtype, int64_t count) {
  Buffer buffer(count * element_bytes(dtype), 0);
  for (int64_t i = 0; i < count; ++i) random_element(dtype, buffer.data + i * element_bytes(dtype));
  return buffer;
}

// Element i of a row that was turned.
double turned(const std::vector<double>& x, const std::vector<double>& cos, const std::vector<double>& sin,
              bool interleaved, int64_t i) {
  const int64_t rotary = static_cast<int64_t>(cos.size()), half = rotary / 2;
  if (i >= rotary) return x[i];
  const bool first = interleaved ? i % 2 == 0 : i < half;
  const int64_t distance = interleaved ? 1 : half, other = first ? i + distance : i - distance;
  return x[i] * cos[i] + (first ? -1.0 : 1.0) * x[other] * sin[i];
}

bool run_problem(int index) {
  const lb2_dtype dtype = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  const lb2_dtype angles = static_cast<lb2_dtype>(pick({LB2_FLOAT32, LB2_FLOAT16, LB2_BFLOAT16}));
  const int64_t batch = pick({0, 1, 2}), tokens = pick({0, 1, 3, 17}), heads = pick({1, 4}),
                kv_heads = pick({1, 2});
  const int64_t size = pick({2, 7, 16, 33, 64, 128}), rotary = size == 7 ? 6 : pick({2, size / 2 * 2});
  const int64_t element = element_bytes(dtype), bytes = element_bytes(angles);
  const Buffer query = random_buffer(dtype, batch * heads * tokens * size);
  const Buffer key = random_buffer(dtype, batch * kv_heads * tokens * size);
  const Buffer cos = random_buffer(angles, batch * tokens * rotary);
  const Buffer sin = random_buffer(angles, batch * tokens * rotary);
  lb2_rotary_args args = {};
  args.struct_size = sizeof args;
  args.batch = batch;
  args.tokens = tokens;
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.head_size = size;
  args.rotary_size = rotary;
  args.query = query.data;
  args.key = key.data;
  args.cos = cos.data;
  args.sin = sin.data;
  for (auto [strides, count] :
       {std::pair{args.query_strides, heads}, std::pair{args.key_strides, kv_heads}}) {
    strides[0] = count * tokens * size;
    strides[1] = tokens * size;
    strides[2] = size;
  }
  args.cos_strides[0] = args.sin_strides[0] = tokens * rotary;
  args.cos_strides[1] = args.sin_strides[1] = rotary;
  args.dtype = dtype;
  args.angle_dtype = angles;
  args.interleaved = static_cast<int32_t>(engine() % 2);
  const auto row = [](lb2_dtype type, const char* from, int64_t count) {
    std::vector<double> values(static_cast<size_t>(count));
    for (int64_t i = 0; i < count; ++i) values[i] = decode(type, from + i * element_bytes(type));
    return values;
  };
  std::vector<char> first_result;
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    const size_t query_bytes = static_cast<size_t>(batch * heads * tokens * size * element);
    const size_t key_bytes = static_cast<size_t>(batch * kv_heads * tokens * size * element);
    const Buffer query_out(static_cast<int64_t>(query_bytes), 0), key_out(static_cast<int64_t>(key_bytes), 0);
    args.query_out = query_out.data;
    args.key_out = key_out.data;
    args.isa = isa;
    args.parallel_for = engine() % 2 ? parallel_for : nullptr;
    if (lb2_rotary_forward_cpu(&args) != LB2_OK) {
      std::fprintf(stderr, "problem %d: %s: %s\n", index, lb2_isa_name(isa), lb2_last_error());
      return false;
    }
    double error = 0.0, norm = 0.0;
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t m = 0; m < tokens; ++m) {
        const std::vector<double> cosines = row(angles, cos.data + (b * tokens + m) * rotary * bytes, rotary);
        const std::vector<double> sines = row(angles, sin.data + (b * tokens + m) * rotary * bytes, rotary);
        for (int64_t h = 0; h < heads + kv_heads; ++h) {
          const bool of_query = h < heads;
          const int64_t count = of_query ? heads : kv_heads, head = of_query ? h : h - heads;
          const char* in = (of_query ? query : key).data + ((b * count + head) * tokens + m) * size * element;
          const char* out =
              (of_query ? query_out : key_out).data + ((b * tokens + m) * count + head) * size * element;
          const std::vector<double> x = row(dtype, in, size);
          for (int64_t i = 0; i < size; ++i) {
            const double truth = turned(x, cosines, sines, args.interleaved != 0, i);
            error += std::pow(decode(dtype, out + i * element) - truth, 2);
            norm += std::max(truth * truth, 1e-3);
          }
        }
      }
    if (!(std::sqrt(error) <= tolerance(dtype) * std::sqrt(norm))) {
      std::fprintf(stderr, "problem %d: %s: relative error %.2e\n", index, lb2_isa_name(isa),
                   std::sqrt(error / norm));
      return false;
    }
    std::vector<char> result(query_out.data, query_out.data + query_bytes);
    result.insert(result.end(), key_out.data, key_out.data + key_bytes);
    if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
    if (result != first_result) {
      std::fprintf(stderr, "problem %d: %s and scalar differ in their bits\n", index, lb2_isa_name(isa));
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return run_problems(argc, argv, problem_count(300), run_problem) != 0; }
