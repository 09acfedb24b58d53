// A step of decoding: queries and keys are turned, keys and values put into the cache, and attention
// computed, in one parallel region. The arithmetic is that of rotary/ and of forward.cpp, so that results
// have the same bits.
#include <cstring>

#include "core/check.h"
#include "core/status.h"
#include "cpu/attention/block.h"
#include "cpu/rotary/turn.h"

namespace lb2::cpu {
namespace {

// A block of queries of a step. The first one writes the keys and values of all tokens.
struct StepBlock {
  const lb2_attention_step_args& args;
  const Block& attention;
  const Turn& turn;

  // What head g of the cache needs before attention: its new rows, and the queries that read it.
  void begin(int64_t task) const {
    const int64_t b = task / args.kv_heads, g = task % args.kv_heads;
    const bool writes = attention.first == 0;
    const int64_t end = attention.first + attention.count;
    Angles angles;
    for (int64_t m = attention.first; m < (writes ? args.queries : end); ++m) {
      turn.load(args, b, m, &angles);
      if (writes) write(b, g, m, angles);
      if (m < end)
        for (int64_t h = g * attention.group(); h < (g + 1) * attention.group(); ++h) query(b, h, m, angles);
    }
  }

  // All of head g, where its keys are one piece: nothing else waits for it.
  void whole(int64_t task) const {
    begin(task);
    attention.piece_task(task);
    const int64_t rows = attention.group() * attention.count;
    for (int64_t row = task * rows; row < (task + 1) * rows; ++row) attention.combine_task(row);
  }

 private:
  void write(int64_t b, int64_t g, int64_t m, const Angles& angles) const {
    const auto row = [&](void* cache, const int64_t (&strides)[3]) {
      return const_cast<char*>(attention.at(cache, strides, b, g, args.position + m));
    };
    turn.row(attention.at(args.new_key, args.new_key_strides, b, g, m), angles,
             row(args.key, args.key_strides));
    std::memcpy(row(args.value, args.value_strides),
                attention.at(args.new_value, args.new_value_strides, b, g, m),
                static_cast<size_t>(args.value_size * attention.bytes()));
  }

  void query(int64_t b, int64_t h, int64_t m, const Angles& angles) const {
    char turned[kMaxRotaryHead * sizeof(float)];
    turn.row(attention.at(args.query, args.query_strides, b, h, m), angles, turned);
    attention.widen_row(turned, b, h, m - attention.first);
  }
};

lb2_status run_block(const StepBlock& step) {
  const Block& block = step.attention;
  const int64_t heads = block.args.batch * block.args.kv_heads;
  if (block.space.pieces == 1) {
    const int64_t counts[] = {heads};
    return run_phases(block, counts, [&](int, int64_t task) { step.whole(task); });
  }
  const int64_t counts[] = {heads, block.piece_tasks(), block.combine_tasks()};
  return run_phases(block, counts, [&](int phase, int64_t task) {
    if (phase == 0)
      step.begin(task);
    else if (phase == 1)
      block.piece_task(task);
    else
      block.combine_task(task);
  });
}

lb2_status forward(const lb2_attention_step_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_attention_step(args));
  const IsaKernels* isa;
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &isa));
  const lb2_attention_args attention = attention_of(*args);
  const Workspace space(attention);
  LB2_RETURN_IF_ERROR(check_attention_step_buffers(*args, space.bytes));
  if (args->batch == 0) return LB2_OK;
  const Turn turn = {*isa->portable, args->dtype, args->head_size, args->rotary_size, args->interleaved != 0};
  float* floats = Workspace::floats(args->workspace);
  for (int64_t first = 0; first < args->queries; first += kQueryBlock) {
    const Block block = {attention, *isa, space, floats, first, std::min(kQueryBlock, args->queries - first)};
    LB2_RETURN_IF_ERROR(run_block({*args, block, turn}));
  }
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_attention_step_workspace_cpu(const lb2_attention_step_args* args, int64_t* bytes) {
  LB2_RETURN_IF_ERROR(lb2::check_attention_step(args));
  if (bytes == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "bytes must not be NULL");
  *bytes = lb2::cpu::Workspace(lb2::attention_of(*args)).bytes;
  return LB2_OK;
}

extern "C" lb2_status lb2_attention_step_forward_cpu(const lb2_attention_step_args* args) {
  return lb2::cpu::forward(args);
}
