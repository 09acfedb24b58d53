// Registration of the operators through the LibTorch stable ABI: one binary serves torch 2.11 and newer.
// Fakes and autograd are registered from Python (littlebit2_kernels/ops), CUDA in cuda/.
#include <torch/csrc/stable/library.h>

#include "torch/dense/int8.h"
#include "torch/dense/unpack.h"
#include "torch/fused.h"
#include "torch/grouped.h"
#include "torch/heads/attention.h"
#include "torch/heads/rotary.h"
#include "torch/heads/step.h"
#include "torch/linear.h"
#include "torch/prepacked.h"

// Per path p: v[p] int32 [R, ceil(K/32)], u[p] int32 [N, ceil(R/32)], in_scale[p] [K], latent_scale[p] [R],
// out_scale[p] [N] (float32). A single-stage layer passes no u and latent_scale, and v[p] [N, ceil(K/32)].
// Paths that pass the same v and in_scale share their first stage. activation is an lb2_activation: 0 auto, 1
// exact; on CUDA also 2 int16, 3 int8, 4 sign, 5 float16.
STABLE_TORCH_LIBRARY(littlebit2, m) {
  m.def(
      "linear(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] "
      "out_scale, "
      "Tensor? bias=None, int activation=0) -> Tensor");
  m.def(
      "linear_backward_x(Tensor grad, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, "
      "Tensor[] out_scale) -> Tensor");
  // The layer as dense matrices of an lb2_dtype, scales included: y = (x first^T) last^T for [first, last],
  // or of a single stage y = x last^T for [last]; see lb2_linear_unpack_cuda in cuda.h.
  m.def(
      "unpack(Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] out_scale, int "
      "dtype) -> Tensor[]");
  // linear and its gradient by unpack and torch's matrix products, in the dtype of x
  // (littlebit2_kernels/ops/dense.py).
  m.def(
      "blas_linear(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] "
      "out_scale, Tensor? bias=None) -> Tensor");
  m.def(
      "blas_linear_backward_x(Tensor grad, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? "
      "latent_scale, "
      "Tensor[] out_scale) -> Tensor");
  // Layers on one x: the lists of all, one after another, paths[i] tensors of layer i; one bias or None, and
  // one output, for each. On CUDA they share their launches.
  m.def(
      "grouped_linear(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] "
      "out_scale, Tensor?[] bias, int[] paths, int activation=0) -> Tensor[]");
  // The same, all side by side in one [..., sum N_i].
  m.def(
      "joined_linear(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] "
      "out_scale, Tensor?[] bias, int[] paths, int activation=0) -> Tensor");
  // grouped_linear of x / sqrt(mean(x^2) + eps) * (norm + offset), norm [K], plus the residual [..., N] of
  // one layer; and an MLP, of gate, up and down or of up and down, with an lb2_function: 0 silu, 1 gelu, 2
  // gelu_tanh, 3 relu. On CUDA only. Not differentiable.
  m.def(
      "fused_linear(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] "
      "out_scale, Tensor?[] bias, int[] paths, Tensor? norm, float eps, float offset, "
      "Tensor? residual, int activation=0) -> Tensor[]");
  m.def(
      "mlp(Tensor x, Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] out_scale, "
      "Tensor?[] bias, int[] paths, int function, Tensor? norm, float eps, float offset, "
      "Tensor? residual, int activation=0) -> Tensor");
  // The CPU's own layout, one uint8 tensor per layer. activation: 0 auto, 1 exact, 2 int16, 3 int8,
  // 4 sign, 6 int8x2.
  m.def(
      "prepack(Tensor[] v, Tensor[]? u, Tensor[] in_scale, Tensor[]? latent_scale, Tensor[] out_scale) -> "
      "Tensor");
  m.def("unprepack(Tensor layer) -> Tensor[]");
  m.def(
      "linear_prepacked(Tensor x, Tensor layer, Tensor? bias, int out_features, int activation=0) -> Tensor");
  m.def(
      "grouped_linear_prepacked(Tensor x, Tensor[] layers, Tensor?[] bias, int[] out_features, int "
      "activation=0) -> Tensor[]");
  m.def(
      "joined_linear_prepacked(Tensor x, Tensor[] layers, Tensor?[] bias, int[] out_features, int "
      "activation=0) -> Tensor");
  // grouped_linear_prepacked of x / sqrt(mean(x^2) + eps) * (norm + offset), norm [K], plus the residual
  // [..., N] of one layer; and an MLP, of gate, up and down or of up and down, with an lb2_function: 0 silu,
  // 1 gelu, 2 gelu_tanh, 3 relu. Not differentiable.
  m.def(
      "fused_linear_prepacked(Tensor x, Tensor[] layers, Tensor?[] bias, int[] out_features, Tensor? norm, "
      "float eps, float offset, Tensor? residual, int activation=0) -> Tensor[]");
  m.def(
      "mlp_prepacked(Tensor x, Tensor[] layers, Tensor?[] bias, int out_features, int function, Tensor? "
      "norm, "
      "float eps, float offset, Tensor? residual, int activation=0) -> Tensor");
  m.def("linear_prepacked_backward_x(Tensor grad, Tensor layer, int in_features) -> Tensor");
  // Dense int8 rows with a scale each: weight int8 [N, K], scale and bias float32 [N].
  m.def("int8_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias=None) -> Tensor");
  // Few queries [B, H, M, D] on keys [B, G, T, D] and values [B, G, T, E]; see lb2_attention_args. The mask
  // is bool, of which false hides, or what is added, and broadcasts to [B, H, M, T]. Causal calls end with
  // the last key. softcap and window are 0 for none. Returns [B, M, H, E].
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, float softcap=0.0, bool "
      "causal=False, int window=0) -> Tensor");
  // Turns queries [B, H, M, D] and keys [B, G, M, D] by cos and sin [B or 1, M, R]; see lb2_rotary_args.
  // Returns [B, M, H, D] and [B, M, G, D].
  m.def(
      "rotary(Tensor query, Tensor key, Tensor cos, Tensor sin, bool interleaved=False) -> (Tensor, Tensor)");
  // Both of these in a step of decoding: turns query [B, H, M, D] and new_key [B, G, M, D], writes new_key
  // and new_value [B, G, M, E] into key [B, G, T, D] and value [B, G, T, E] from row `position`, one int64,
  // on (by default the last M rows), and attends; see lb2_attention_step_args. Returns [B, M, H, E]. Not
  // differentiable.
  m.def(
      "attention_step(Tensor query, Tensor new_key, Tensor new_value, Tensor cos, Tensor sin, Tensor(a!) "
      "key, "
      "Tensor(b!) value, Tensor? position, Tensor? mask, float scale, float softcap=0.0, bool causal=False, "
      "int window=0, bool interleaved=False) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(littlebit2, CPU, m) {
  m.impl("linear", TORCH_BOX(&lb2::torch_ops::linear_cpu));
  m.impl("linear_backward_x", TORCH_BOX(&lb2::torch_ops::linear_backward_x_cpu));
  m.impl("unpack", TORCH_BOX(&lb2::torch_ops::unpack_cpu));
  m.impl("grouped_linear", TORCH_BOX(&lb2::torch_ops::grouped_linear_cpu));
  m.impl("grouped_linear_prepacked", TORCH_BOX(&lb2::torch_ops::grouped_linear_prepacked_cpu));
  m.impl("fused_linear_prepacked", TORCH_BOX(&lb2::torch_ops::fused_linear_prepacked_cpu));
  m.impl("mlp_prepacked", TORCH_BOX(&lb2::torch_ops::mlp_prepacked_cpu));
  m.impl("joined_linear", TORCH_BOX(&lb2::torch_ops::joined_linear_cpu));
  m.impl("joined_linear_prepacked", TORCH_BOX(&lb2::torch_ops::joined_linear_prepacked_cpu));
  m.impl("prepack", TORCH_BOX(&lb2::torch_ops::prepack_cpu));
  m.impl("unprepack", TORCH_BOX(&lb2::torch_ops::unprepack_cpu));
  m.impl("linear_prepacked", TORCH_BOX(&lb2::torch_ops::linear_prepacked_cpu));
  m.impl("attention", TORCH_BOX(&lb2::torch_ops::attention_cpu));
  m.impl("rotary", TORCH_BOX(&lb2::torch_ops::rotary_cpu));
  m.impl("attention_step", TORCH_BOX(&lb2::torch_ops::attention_step_cpu));
  m.impl("int8_linear", TORCH_BOX(&lb2::torch_ops::int8_linear_cpu));
  m.impl("linear_prepacked_backward_x", TORCH_BOX(&lb2::torch_ops::linear_prepacked_backward_x_cpu));
}
