// Attention of few queries: blocks of queries, pieces of keys and their combination in one parallel region.
#include "core/check.h"
#include "core/status.h"
#include "cpu/attention/block.h"

namespace lb2::cpu {
namespace {

lb2_status run_block(const Block& block) {
  block.widen();
  const int64_t counts[] = {block.piece_tasks(), block.combine_tasks()};
  return run_phases(block, counts, [&](int phase, int64_t task) {
    if (phase == 0)
      block.piece_task(task);
    else
      block.combine_task(task);
  });
}

lb2_status forward(const lb2_attention_args* args) noexcept {
  LB2_RETURN_IF_ERROR(check_attention(args));
  const IsaKernels* isa;
  LB2_RETURN_IF_ERROR(find_kernels(args->isa, &isa));
  const Workspace space(*args);
  LB2_RETURN_IF_ERROR(check_attention_buffers(*args, space.bytes));
  if (args->batch == 0) return LB2_OK;
  float* floats = Workspace::floats(args->workspace);
  for (int64_t first = 0; first < args->queries; first += kQueryBlock)
    LB2_RETURN_IF_ERROR(
        run_block({*args, *isa, space, floats, first, std::min(kQueryBlock, args->queries - first)}));
  return LB2_OK;
}

}  // namespace
}  // namespace lb2::cpu

extern "C" lb2_status lb2_attention_workspace_cpu(const lb2_attention_args* args, int64_t* bytes) {
  LB2_RETURN_IF_ERROR(lb2::check_attention(args));
  if (bytes == nullptr) return lb2::fail(LB2_ERROR_INVALID_ARGUMENT, "bytes must not be NULL");
  *bytes = lb2::cpu::Workspace(*args).bytes;
  return LB2_OK;
}

extern "C" lb2_status lb2_attention_forward_cpu(const lb2_attention_args* args) {
  return lb2::cpu::forward(args);
}
