// pybind11 module: build information, instruction sets, plans, and packing on numpy buffers. Knows no torch.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "littlebit2/cuda.h"
#include "littlebit2/littlebit2.h"

namespace py = pybind11;

namespace {

void throw_on_error(lb2_status status) {
  if (status == LB2_OK) return;
  if (status == LB2_ERROR_INVALID_ARGUMENT) throw py::value_error(lb2_last_error());
  throw std::runtime_error(lb2_last_error());
}

lb2_isa isa_from_name(const std::string& name) {
  for (lb2_isa isa = LB2_ISA_AUTO; std::string(lb2_isa_name(isa)) != "unknown"; ++isa)
    if (name == lb2_isa_name(isa)) return isa;
  throw py::value_error("isa must be auto, scalar, avx2, avx512, avx512vnni, neon or amx, got " + name);
}

std::string current_isa() {
  lb2_isa isa;
  throw_on_error(lb2_cpu_isa(&isa));
  return lb2_isa_name(isa);
}

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (lb2_isa isa = LB2_ISA_SCALAR; std::string(lb2_isa_name(isa)) != "unknown"; ++isa)
    if (lb2_cpu_isa_available(isa)) names.emplace_back(lb2_isa_name(isa));
  return names;
}

// Row stride in elements of a two-dimensional array with contiguous rows.
template <typename T>
int64_t row_stride(const char* name, const py::array_t<T>& array) {
  if (array.ndim() != 2) throw py::value_error(std::string(name) + " must be two-dimensional");
  if (array.size() == 0) return array.shape(1);  // numpy gives empty arrays any strides
  if (array.shape(1) > 1 && array.strides(1) != static_cast<py::ssize_t>(sizeof(T)))
    throw py::value_error(std::string(name) + " must have contiguous rows");
  if (array.shape(0) > 1 && array.strides(0) % static_cast<py::ssize_t>(sizeof(T)) != 0)
    throw py::value_error(std::string(name) + " must have a row stride of whole elements");
  return array.shape(0) > 1 ? array.strides(0) / static_cast<py::ssize_t>(sizeof(T)) : array.shape(1);
}

void pack_signs(const py::array_t<uint8_t>& negative, py::array_t<int32_t>& words) {
  const int64_t stride = row_stride("negative", negative), words_stride = row_stride("words", words);
  const int64_t rows = negative.shape(0), cols = negative.shape(1);
  if (words.shape(0) != rows || words.shape(1) != lb2_words_per_row(cols))
    throw py::value_error("words must have shape [rows, ceil(cols / 32)] of negative");
  const uint8_t* source = negative.data();
  int32_t* target = words.mutable_data();
  py::gil_scoped_release release;
  throw_on_error(lb2_pack_signs(source, stride, rows, cols, target, words_stride));
}

template <typename T>
void unpack_signs_as(const py::array_t<int32_t>& words, py::array out, lb2_dtype dtype) {
  if (!py::isinstance<py::array_t<T>>(out))
    throw py::type_error("out must have the dtype that `dtype` names");
  py::array_t<T> typed = py::reinterpret_borrow<py::array_t<T>>(out);
  const int64_t words_stride = row_stride("words", words), out_stride = row_stride("out", typed);
  const int64_t rows = typed.shape(0), cols = typed.shape(1);
  if (words.shape(0) != rows || words.shape(1) != lb2_words_per_row(cols))
    throw py::value_error("words must have shape [rows, ceil(cols / 32)] of out");
  const int32_t* source = words.data();
  T* target = typed.mutable_data();
  py::gil_scoped_release release;
  throw_on_error(lb2_unpack_signs(source, words_stride, rows, cols, dtype, target, out_stride));
}

void unpack_signs(const py::array_t<int32_t>& words, const py::array& out, const std::string& dtype) {
  // Half types travel as their 16-bit patterns: numpy has no bfloat16.
  if (dtype == "float32") return unpack_signs_as<float>(words, out, LB2_FLOAT32);
  if (dtype == "float16") return unpack_signs_as<int16_t>(words, out, LB2_FLOAT16);
  if (dtype == "bfloat16") return unpack_signs_as<int16_t>(words, out, LB2_BFLOAT16);
  if (dtype == "int8") return unpack_signs_as<int8_t>(words, out, LB2_INT8);
  throw py::value_error("dtype must be float32, float16, bfloat16 or int8, got " + dtype);
}

lb2_layer_shape make_shape(int64_t k, int64_t n, const std::vector<int64_t>& ranks, bool single_stage,
                           const std::vector<int64_t>& shares) {
  if (ranks.size() > LB2_MAX_PATHS || shares.size() != ranks.size())
    throw py::value_error("ranks must hold at most 16 entries, and shares as many");
  lb2_layer_shape shape = {};
  shape.struct_size = sizeof shape;
  shape.k = k;
  shape.n = n;
  shape.num_paths = static_cast<int64_t>(ranks.size());
  shape.single_stage = single_stage;
  for (size_t p = 0; p < ranks.size(); ++p) {
    if (shares[p] < 0 || shares[p] >= LB2_MAX_PATHS) throw py::value_error("shares must name paths");
    shape.ranks[p] = ranks[p];
    shape.shares[p] = static_cast<int32_t>(shares[p]);
  }
  return shape;
}

lb2_dtype dtype_from_name(const std::string& name) {
  if (name == "float32") return LB2_FLOAT32;
  if (name == "float16") return LB2_FLOAT16;
  if (name == "bfloat16") return LB2_BFLOAT16;
  throw py::value_error("dtype must be float32, float16 or bfloat16, got " + name);
}

py::dict plan_cpu(int64_t m, int64_t k, int64_t n, const std::vector<int64_t>& ranks, bool single_stage,
                  const std::vector<int64_t>& shares) {
  const lb2_layer_shape shape = make_shape(k, n, ranks, single_stage, shares);
  lb2_cpu_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_linear_plan_cpu(&shape, m, LB2_ISA_AUTO, &plan));
  py::dict result;
  result["isa"] = lb2_isa_name(plan.isa);
  result["token_block"] = plan.token_block;
  result["macs"] = plan.macs;
  result["first_stages"] = plan.first_stages;
  result["forward_workspace_bytes"] = plan.forward_workspace_bytes;
  result["backward_workspace_bytes"] = plan.backward_workspace_bytes;
  return result;
}

// A plan as Python sees it.
py::dict describe(const lb2_cuda_plan& plan) {
  py::list launches;
  for (int32_t i = 0; i < plan.num_launches; ++i) {
    const lb2_cuda_launch& planned = plan.launches[i];
    py::dict launch;
    launch["kind"] = planned.kind == LB2_CUDA_CONVERT  ? "convert"
                     : planned.kind == LB2_CUDA_DECODE ? "decode"
                     : planned.kind == LB2_CUDA_GEMM   ? "gemm"
                                                       : "fused";
    launch["stage"] = planned.stage;
    launch["grid"] = py::make_tuple(planned.grid_x, planned.grid_y, planned.grid_z);
    launch["threads"] = planned.threads;
    launch["token_tile"] = planned.token_tile;
    launch["row_warps"] = planned.row_warps;
    launch["split_warps"] = planned.split_warps;
    launch["chunk_slices"] = planned.chunk_slices;
    launch["shared_bytes"] = planned.shared_bytes;
    launch["chained"] = planned.chained != 0;
    launch["estimated_cycles"] = planned.estimated_cycles;
    launch["row_tile"] = planned.row_tile;
    launches.append(launch);
  }
  py::dict result;
  result["workspace_bytes"] = plan.workspace_bytes;
  result["token_block"] = plan.token_block;
  result["macs"] = plan.macs;
  result["activation"] = plan.activation;
  result["one_bit_mma"] = plan.one_bit_mma != 0;
  result["first_stages"] = plan.first_stages;
  result["launches"] = launches;
  result["estimated_cycles"] = plan.estimated_cycles;
  result["unpack_cycles"] = plan.unpack_cycles;
  return result;
}

lb2_cuda_device device_of(int32_t capability, int32_t multiprocessors, int64_t shared_bytes) {
  lb2_cuda_device device = {};
  device.struct_size = sizeof device;
  device.capability = capability;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = shared_bytes;
  return device;
}

// A layer: N, ranks, whether it has a single stage, and shares.
using LayerShape = std::tuple<int64_t, std::vector<int64_t>, bool, std::vector<int64_t>>;

// Plans a forward call of M tokens of layers on one input, on a GPU of the given properties.
py::dict plan_grouped_cuda(int64_t m, int64_t k, const std::vector<LayerShape>& layers,
                           const std::string& dtype, int32_t activation, int32_t capability,
                           int32_t multiprocessors, int64_t shared_bytes) {
  std::vector<lb2_layer_shape> shapes;
  for (const auto& [n, ranks, single_stage, shares] : layers)
    shapes.push_back(make_shape(k, n, ranks, single_stage, shares));
  const lb2_cuda_device device = device_of(capability, multiprocessors, shared_bytes);
  lb2_cuda_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_grouped_plan_cuda(shapes.data(), static_cast<int64_t>(shapes.size()), m,
                                       dtype_from_name(dtype), activation, &device, nullptr, &plan));
  return describe(plan);
}

// Plans a forward call of M tokens on a GPU of the given properties.
py::dict plan_cuda(int64_t m, int64_t k, int64_t n, const std::vector<int64_t>& ranks, bool single_stage,
                   const std::vector<int64_t>& shares, const std::string& dtype, int32_t activation,
                   int32_t capability, int32_t multiprocessors, int64_t shared_bytes) {
  return plan_grouped_cuda(m, k, {{n, ranks, single_stage, shares}}, dtype, activation, capability,
                           multiprocessors, shared_bytes);
}

// Plans a forward call of M tokens of a prepacked layer.
py::dict plan_prepacked_cpu(const py::array_t<uint8_t>& layer, int64_t m, const std::string& dtype,
                            int32_t activation, int32_t threads) {
  const auto never_called = [](void*, int64_t, int64_t, lb2_task, void*) -> int32_t { return 1; };
  lb2_prepacked_args args = {};
  args.struct_size = sizeof args;
  args.layer = layer.data();
  args.layer_bytes = layer.size();
  args.m = m;
  args.dtype = dtype_from_name(dtype);
  args.activation = activation;
  args.num_threads = threads;
  args.parallel_for = never_called;
  lb2_prepacked_plan plan = {};
  plan.struct_size = sizeof plan;
  throw_on_error(lb2_prepacked_plan_cpu(&args, &plan));
  py::dict result;
  result["isa"] = lb2_isa_name(plan.isa);
  result["activation"] = plan.activation;
  result["token_block"] = plan.token_block;
  result["workers"] = plan.workers;
  result["workspace_bytes"] = plan.workspace_bytes;
  return result;
}

}  // namespace

PYBIND11_MODULE(_core, m) {
  m.doc() = "Native helpers of littlebit2_kernels that need no torch; see csrc/python/module.cpp.";
  m.attr("version") = lb2_version();
  m.attr("format_version") = LB2_FORMAT_VERSION;
#if defined(__clang__)
  m.attr("compiler") = "clang " __clang_version__;
#else
  m.attr("compiler") = "gcc " __VERSION__;
#endif
#ifdef LB2_CUDA_TARGETS
  m.attr("cuda_archs") = LB2_CUDA_TARGETS;
#else
  m.attr("cuda_archs") = py::none();
#endif
  m.def("cpu_isa", &current_isa,
        "Instruction set that the CPU kernels use; raises if LB2_CPU_ISA cannot be served.");
  m.def("cpu_isas", &available_isas, "Instruction sets that were built in and can run on this machine.");
  m.def(
      "set_cpu_isa", [](const std::string& name) { throw_on_error(lb2_cpu_set_isa(isa_from_name(name))); },
      py::arg("isa"), "Force an instruction set in this process; 'auto' undoes it.");
  m.def("pack_signs", &pack_signs, py::arg("negative").noconvert(), py::arg("words").noconvert(),
        "Pack uint8 negative[rows, cols] into int32 words[rows, ceil(cols/32)] in place.");
  m.def("unpack_signs", &unpack_signs, py::arg("words").noconvert(), py::arg("out"), py::arg("dtype"),
        "Expand int32 words into out[rows, cols] in place (16-bit floats as int16 patterns).");
  m.def("plan_cpu", &plan_cpu, py::arg("m"), py::arg("k"), py::arg("n"), py::arg("ranks"),
        py::arg("single_stage"), py::arg("shares"),
        "Plan a forward call: isa, token_block, macs, first_stages, workspace sizes.");
  m.def("plan_cuda", &plan_cuda, py::arg("m"), py::arg("k"), py::arg("n"), py::arg("ranks"),
        py::arg("single_stage"), py::arg("shares"), py::arg("dtype"), py::arg("activation"),
        py::arg("capability"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        "Plan a forward call on a GPU of these properties; needs no GPU.");
  m.def("plan_grouped_cuda", &plan_grouped_cuda, py::arg("m"), py::arg("k"), py::arg("layers"),
        py::arg("dtype"), py::arg("activation"), py::arg("capability"), py::arg("multiprocessors"),
        py::arg("shared_bytes"),
        "Plan a forward call of layers (n, ranks, single_stage, shares) on one input; needs no GPU.");
  m.def("plan_prepacked_cpu", &plan_prepacked_cpu, py::arg("layer").noconvert(), py::arg("m"),
        py::arg("dtype"), py::arg("activation"), py::arg("threads"),
        "Plan a forward call of a prepacked layer: isa, activation, token_block, workers, workspace_bytes.");
}
