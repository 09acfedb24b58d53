// Random problems on the portable layout against a double reference, on every instruction set this machine
// runs, over a parallel_for that splits ranges unevenly. All instruction sets must agree to the bit.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "littlebit2/littlebit2.h"
#include "random_problem.h"

namespace {

bool run_problem(int index) {
  const Problem problem(true);
  std::vector<char> first_result;
  for (const lb2_isa isa : kIsas) {
    if (!lb2_cpu_isa_available(isa)) continue;
    const size_t output_bytes = static_cast<size_t>(problem.output_elements() * problem.element);
    const Buffer output = copy_out(std::vector<char>(output_bytes, 0x5A), problem.misaligned);
    lb2_linear_args args = problem.layer_args();
    args.m = problem.m;
    args.bias = problem.bias_data();
    args.input = problem.input.data;
    args.input_stride = problem.input_stride;
    args.output = output.data;
    args.output_stride = problem.output_stride;
    args.dtype = problem.dtype;
    args.isa = isa;
    if (engine() % 2) args.parallel_for = parallel_for;
    lb2_cpu_plan plan = {};
    plan.struct_size = sizeof plan;
    lb2_layer_shape shape;
    shape.struct_size = sizeof shape;
    if (lb2_linear_shape(&args, &shape) != LB2_OK ||
        lb2_linear_plan_cpu(&shape, args.m, isa, &plan) != LB2_OK) {
      std::fprintf(stderr, "problem %d: plan: %s\n", index, lb2_last_error());
      return false;
    }
    const int64_t bytes = problem.backward ? plan.backward_workspace_bytes : plan.forward_workspace_bytes;
    const Buffer workspace(bytes, problem.misaligned && bytes > 0);
    args.workspace = workspace.data;
    args.workspace_bytes = bytes;
    const lb2_status status =
        problem.backward ? lb2_linear_backward_x_cpu(&args) : lb2_linear_forward_cpu(&args);
    if (status != LB2_OK) {
      std::fprintf(stderr, "problem %d: %s: %s\n", index, lb2_isa_name(isa), lb2_last_error());
      return false;
    }
    const double error = problem.error_of(output.data);
    if (!(error <= tolerance(problem.dtype))) {
      std::fprintf(stderr, "problem %d: %s: relative error %.2e\n", index, lb2_isa_name(isa), error);
      problem.describe();
      return false;
    }
    const std::vector<char> result(output.data, output.data + output_bytes);
    if (isa == LB2_ISA_SCALAR) add_to_digest(first_result = result);
    if (result != first_result) {
      std::fprintf(stderr, "problem %d: %s and scalar differ in their bits\n", index, lb2_isa_name(isa));
      return false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) { return run_problems(argc, argv, 300, run_problem) != 0; }
