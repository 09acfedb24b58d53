// How a call on a prepacked layer is divided into tasks. Pure functions; results do not depend on the plan.
#pragma once

#include "cpu/prepacked/layout.h"

namespace lb2::cpu {

// A call has two phases: the first stages (none in a single-stage layer), then the outputs.
struct PrepackedPlan {
  int64_t token_block;   // tokens per pass over the two phases
  int64_t task_tokens;   // tokens per task
  int64_t token_tasks;   // most tasks that a block of tokens is divided into
  int64_t stage_splits;  // ranges that the tiles of a first stage are divided into
  int64_t row_splits;    // the same for the tiles of output rows
  int64_t workers;
  // Offsets into the workspace, in bytes.
  int64_t parts[LB2_MAX_PATHS];  // per first stage: [segment][token of the block][padded row] sums
  int64_t worker_start;
  int64_t worker_bytes;
  int64_t worker_tables, worker_sums, worker_dots;  // from the start of the worker, where its operand is
  int64_t workspace_bytes;
};

PrepackedPlan plan_prepacked(const Layout& layout, const LookupKernels& kernels, const LookupMode& mode,
                             int64_t m, int64_t threads) noexcept;

}  // namespace lb2::cpu
