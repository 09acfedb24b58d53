// How a call on prepacked layers is divided into tasks. Pure functions; results do not depend on the plan.
#pragma once

#include "cpu/prepacked/layout.h"

namespace lb2::cpu {

struct LayerPlan {
  int64_t stage_splits;          // ranges that the tiles of a first stage are divided into
  int64_t row_splits;            // the same for the tiles of output rows
  int64_t parts[LB2_MAX_PATHS];  // per first stage, offset of [segment][token of the block][padded row] sums
};

// The workspace of a call holds what phases hand on, for a block of tokens, and then scratch memory of each
// worker. Offsets are in bytes.
struct CallPlan {
  int64_t token_block;  // tokens per pass over the layers
  int64_t token_tasks;  // most tasks that a block of tokens is divided into
  int64_t token_unit;   // tokens that tasks have multiples of
  int64_t workers;
  int64_t factors;        // of the norm: float [token of the block]
  int64_t hidden;         // of an MLP: float [token of the block][hidden_stride]
  int64_t hidden_stride;  // floats
  int64_t hidden_splits;  // ranges that the tiles of its columns are divided into
  int64_t worker_start, worker_bytes;
  int64_t worker_tables, worker_dots, worker_sums, worker_gate;  // from where the worker's operand is
  int64_t workspace_bytes;
};

// What a call computes with and on.
struct PlanInput {
  const LookupKernels& kernels;
  const LookupMode& mode;
  int64_t m, threads;
  bool norm;
};

// Layers on one input. Fills a LayerPlan for each.
CallPlan plan_group(const Layout* const* layouts, int num_layers, const PlanInput& input,
                    LayerPlan* layers) noexcept;

// The layers of an MLP, the last of which reads what the others compute.
CallPlan plan_mlp(const Layout* const* layouts, int num_layers, const PlanInput& input,
                  LayerPlan* layers) noexcept;

}  // namespace lb2::cpu
