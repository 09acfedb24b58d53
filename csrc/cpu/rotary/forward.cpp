// Rotary position embedding: the tokens of a call in one parallel region.
#include "core/status.h"
#include "cpu/driver.h"
#include "cpu/rotary/turn.h"

namespace lb2::cpu {
namespace {

// Turns the rows of one tensor at one token. Rows of the output follow each other.
void turn_rows(const Turn& turn, const lb2_rotary_args& args, const void* in, const int64_t (&strides)[3],
               int64_t b, int64_t m, int64_t heads, const Angles& angles, void* out) {
  const int64_t bytes = element_bytes(args.dtype);
  const char* from = static_cast<const char*>(in) + (b * strides[0] + m * strides[2]) * bytes;
  char* to = static_cast<char*>(out) + (b * args.tokens + m) * heads * args.head_size * bytes;
  for (int64_t h = 0; h < heads; ++h)
    turn.row(from + h * strides[1] * bytes, angles, to + h * args.head_size * bytes);
}

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_rotary_forward_cpu(const lb2_rotary_args* args) {
  using namespace lb2::cpu;
  LB2_RETURN_IF_ERROR(lb2::check_rotary(args));
  const IsaKernels* isa;
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &isa));
  const Turn turn = {*isa->portable, args->dtype, args->head_size, args->rotary_size, args->interleaved != 0};
  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const int64_t b = index / args->tokens, m = index % args->tokens;
      Angles angles;
      turn.load(*args, b, m, &angles);
      turn_rows(turn, *args, args->query, args->query_strides, b, m, args->heads, angles, args->query_out);
      turn_rows(turn, *args, args->key, args->key_strides, b, m, args->kv_heads, angles, args->key_out);
    }
  };
  // An element costs about as much as sixteen multiply-adds of a kernel.
  const int64_t macs = (args->heads + args->kv_heads) * args->head_size * 16;
  return run_items(args->parallel_for, args->parallel_context, args->batch * args->tokens, macs, body);
}
