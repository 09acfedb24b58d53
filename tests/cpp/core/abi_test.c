/* clang-format off */
/* The layout of the structs and the values of the constants of the C ABI on 64-bit machines. A line that has to change,
 * also the size of a struct that grows, breaks programs that were compiled before: once a version is released, that
 * needs a new LB2_ABI_VERSION (CMakeLists.txt). tests/project/clients/test_abi.py sees that nothing is left out. */
#include <stddef.h>

#include "littlebit2/cuda.h"

#define SIZE(type, bytes) _Static_assert(sizeof(type) == (bytes), "size of " #type)
#define FIELD(type, field, offset) _Static_assert(offsetof(type, field) == (offset), #type "." #field)
#define CONSTANT(name, value) _Static_assert((name) == (value), #name)

SIZE(lb2_path, 64);
FIELD(lb2_path, v, 0);
FIELD(lb2_path, v_stride, 8);
FIELD(lb2_path, u, 16);
FIELD(lb2_path, u_stride, 24);
FIELD(lb2_path, in_scale, 32);
FIELD(lb2_path, latent_scale, 40);
FIELD(lb2_path, out_scale, 48);
FIELD(lb2_path, rank, 56);

SIZE(lb2_layer_shape, 232);
FIELD(lb2_layer_shape, struct_size, 0);
FIELD(lb2_layer_shape, k, 8);
FIELD(lb2_layer_shape, n, 16);
FIELD(lb2_layer_shape, num_paths, 24);
FIELD(lb2_layer_shape, ranks, 32);
FIELD(lb2_layer_shape, shares, 160);
FIELD(lb2_layer_shape, single_stage, 224);

SIZE(lb2_linear_args, 128);
FIELD(lb2_linear_args, struct_size, 0);
FIELD(lb2_linear_args, m, 8);
FIELD(lb2_linear_args, k, 16);
FIELD(lb2_linear_args, n, 24);
FIELD(lb2_linear_args, paths, 32);
FIELD(lb2_linear_args, num_paths, 40);
FIELD(lb2_linear_args, bias, 48);
FIELD(lb2_linear_args, input, 56);
FIELD(lb2_linear_args, input_stride, 64);
FIELD(lb2_linear_args, output, 72);
FIELD(lb2_linear_args, output_stride, 80);
FIELD(lb2_linear_args, dtype, 88);
FIELD(lb2_linear_args, isa, 92);
FIELD(lb2_linear_args, workspace, 96);
FIELD(lb2_linear_args, workspace_bytes, 104);
FIELD(lb2_linear_args, parallel_for, 112);
FIELD(lb2_linear_args, parallel_context, 120);

SIZE(lb2_cpu_plan, 48);
FIELD(lb2_cpu_plan, struct_size, 0);
FIELD(lb2_cpu_plan, forward_workspace_bytes, 8);
FIELD(lb2_cpu_plan, backward_workspace_bytes, 16);
FIELD(lb2_cpu_plan, token_block, 24);
FIELD(lb2_cpu_plan, macs, 32);
FIELD(lb2_cpu_plan, isa, 40);
FIELD(lb2_cpu_plan, first_stages, 44);

SIZE(lb2_prepacked_args, 120);
FIELD(lb2_prepacked_args, struct_size, 0);
FIELD(lb2_prepacked_args, layer, 8);
FIELD(lb2_prepacked_args, layer_bytes, 16);
FIELD(lb2_prepacked_args, m, 24);
FIELD(lb2_prepacked_args, bias, 32);
FIELD(lb2_prepacked_args, input, 40);
FIELD(lb2_prepacked_args, input_stride, 48);
FIELD(lb2_prepacked_args, output, 56);
FIELD(lb2_prepacked_args, output_stride, 64);
FIELD(lb2_prepacked_args, dtype, 72);
FIELD(lb2_prepacked_args, activation, 76);
FIELD(lb2_prepacked_args, isa, 80);
FIELD(lb2_prepacked_args, num_threads, 84);
FIELD(lb2_prepacked_args, workspace, 88);
FIELD(lb2_prepacked_args, workspace_bytes, 96);
FIELD(lb2_prepacked_args, parallel_for, 104);
FIELD(lb2_prepacked_args, parallel_context, 112);

SIZE(lb2_prepacked_plan, 56);
FIELD(lb2_prepacked_plan, struct_size, 0);
FIELD(lb2_prepacked_plan, workspace_bytes, 8);
FIELD(lb2_prepacked_plan, token_block, 16);
FIELD(lb2_prepacked_plan, workers, 24);
FIELD(lb2_prepacked_plan, k, 32);
FIELD(lb2_prepacked_plan, n, 40);
FIELD(lb2_prepacked_plan, isa, 48);
FIELD(lb2_prepacked_plan, activation, 52);

SIZE(lb2_norm, 24);
FIELD(lb2_norm, weight, 0);
FIELD(lb2_norm, dtype, 8);
FIELD(lb2_norm, eps, 12);
FIELD(lb2_norm, offset, 16);

SIZE(lb2_prepacked_layer, 24);
FIELD(lb2_prepacked_layer, data, 0);
FIELD(lb2_prepacked_layer, bytes, 8);
FIELD(lb2_prepacked_layer, bias, 16);

SIZE(lb2_rows, 16);
FIELD(lb2_rows, data, 0);
FIELD(lb2_rows, stride, 8);

SIZE(lb2_grouped_args, 128);
FIELD(lb2_grouped_args, struct_size, 0);
FIELD(lb2_grouped_args, layers, 8);
FIELD(lb2_grouped_args, outputs, 16);
FIELD(lb2_grouped_args, num_layers, 24);
FIELD(lb2_grouped_args, m, 32);
FIELD(lb2_grouped_args, norm, 40);
FIELD(lb2_grouped_args, input, 48);
FIELD(lb2_grouped_args, input_stride, 56);
FIELD(lb2_grouped_args, residual, 64);
FIELD(lb2_grouped_args, residual_stride, 72);
FIELD(lb2_grouped_args, dtype, 80);
FIELD(lb2_grouped_args, activation, 84);
FIELD(lb2_grouped_args, isa, 88);
FIELD(lb2_grouped_args, num_threads, 92);
FIELD(lb2_grouped_args, workspace, 96);
FIELD(lb2_grouped_args, workspace_bytes, 104);
FIELD(lb2_grouped_args, parallel_for, 112);
FIELD(lb2_grouped_args, parallel_context, 120);

SIZE(lb2_fused_plan, 112);
FIELD(lb2_fused_plan, struct_size, 0);
FIELD(lb2_fused_plan, workspace_bytes, 8);
FIELD(lb2_fused_plan, token_block, 16);
FIELD(lb2_fused_plan, workers, 24);
FIELD(lb2_fused_plan, k, 32);
FIELD(lb2_fused_plan, n, 40);
FIELD(lb2_fused_plan, isa, 104);
FIELD(lb2_fused_plan, activation, 108);

SIZE(lb2_mlp_args, 144);
FIELD(lb2_mlp_args, struct_size, 0);
FIELD(lb2_mlp_args, layers, 8);
FIELD(lb2_mlp_args, num_layers, 16);
FIELD(lb2_mlp_args, m, 24);
FIELD(lb2_mlp_args, norm, 32);
FIELD(lb2_mlp_args, input, 40);
FIELD(lb2_mlp_args, input_stride, 48);
FIELD(lb2_mlp_args, residual, 56);
FIELD(lb2_mlp_args, residual_stride, 64);
FIELD(lb2_mlp_args, output, 72);
FIELD(lb2_mlp_args, output_stride, 80);
FIELD(lb2_mlp_args, dtype, 88);
FIELD(lb2_mlp_args, activation, 92);
FIELD(lb2_mlp_args, function, 96);
FIELD(lb2_mlp_args, isa, 100);
FIELD(lb2_mlp_args, num_threads, 104);
FIELD(lb2_mlp_args, workspace, 112);
FIELD(lb2_mlp_args, workspace_bytes, 120);
FIELD(lb2_mlp_args, parallel_for, 128);
FIELD(lb2_mlp_args, parallel_context, 136);

SIZE(lb2_int8_args, 136);
FIELD(lb2_int8_args, struct_size, 0);
FIELD(lb2_int8_args, m, 8);
FIELD(lb2_int8_args, k, 16);
FIELD(lb2_int8_args, n, 24);
FIELD(lb2_int8_args, weight, 32);
FIELD(lb2_int8_args, weight_stride, 40);
FIELD(lb2_int8_args, scale, 48);
FIELD(lb2_int8_args, bias, 56);
FIELD(lb2_int8_args, input, 64);
FIELD(lb2_int8_args, input_stride, 72);
FIELD(lb2_int8_args, output, 80);
FIELD(lb2_int8_args, output_stride, 88);
FIELD(lb2_int8_args, dtype, 96);
FIELD(lb2_int8_args, isa, 100);
FIELD(lb2_int8_args, workspace, 104);
FIELD(lb2_int8_args, workspace_bytes, 112);
FIELD(lb2_int8_args, parallel_for, 120);
FIELD(lb2_int8_args, parallel_context, 128);

SIZE(lb2_cuda_extras, 32);
FIELD(lb2_cuda_extras, struct_size, 0);
FIELD(lb2_cuda_extras, norm, 8);
FIELD(lb2_cuda_extras, residual, 16);
FIELD(lb2_cuda_extras, residual_stride, 24);

SIZE(lb2_cuda_mlp_plan, 640);
FIELD(lb2_cuda_mlp_plan, struct_size, 0);
FIELD(lb2_cuda_mlp_plan, workspace_bytes, 8);
FIELD(lb2_cuda_mlp_plan, first, 16);
FIELD(lb2_cuda_mlp_plan, last, 328);

SIZE(lb2_attention_args, 304);
FIELD(lb2_attention_args, struct_size, 0);
FIELD(lb2_attention_args, batch, 8);
FIELD(lb2_attention_args, heads, 16);
FIELD(lb2_attention_args, kv_heads, 24);
FIELD(lb2_attention_args, queries, 32);
FIELD(lb2_attention_args, keys, 40);
FIELD(lb2_attention_args, head_size, 48);
FIELD(lb2_attention_args, value_size, 56);
FIELD(lb2_attention_args, query, 64);
FIELD(lb2_attention_args, query_strides, 72);
FIELD(lb2_attention_args, key, 96);
FIELD(lb2_attention_args, key_strides, 104);
FIELD(lb2_attention_args, value, 128);
FIELD(lb2_attention_args, value_strides, 136);
FIELD(lb2_attention_args, output, 160);
FIELD(lb2_attention_args, output_strides, 168);
FIELD(lb2_attention_args, mask, 192);
FIELD(lb2_attention_args, mask_strides, 200);
FIELD(lb2_attention_args, dtype, 224);
FIELD(lb2_attention_args, mask_dtype, 228);
FIELD(lb2_attention_args, scale, 232);
FIELD(lb2_attention_args, softcap, 236);
FIELD(lb2_attention_args, offset, 240);
FIELD(lb2_attention_args, window, 248);
FIELD(lb2_attention_args, causal, 256);
FIELD(lb2_attention_args, isa, 260);
FIELD(lb2_attention_args, num_threads, 264);
FIELD(lb2_attention_args, workspace, 272);
FIELD(lb2_attention_args, workspace_bytes, 280);
FIELD(lb2_attention_args, parallel_for, 288);
FIELD(lb2_attention_args, parallel_context, 296);

SIZE(lb2_rotary_args, 216);
FIELD(lb2_rotary_args, struct_size, 0);
FIELD(lb2_rotary_args, batch, 8);
FIELD(lb2_rotary_args, tokens, 16);
FIELD(lb2_rotary_args, heads, 24);
FIELD(lb2_rotary_args, kv_heads, 32);
FIELD(lb2_rotary_args, head_size, 40);
FIELD(lb2_rotary_args, rotary_size, 48);
FIELD(lb2_rotary_args, query, 56);
FIELD(lb2_rotary_args, query_strides, 64);
FIELD(lb2_rotary_args, key, 88);
FIELD(lb2_rotary_args, key_strides, 96);
FIELD(lb2_rotary_args, cos, 120);
FIELD(lb2_rotary_args, sin, 128);
FIELD(lb2_rotary_args, cos_strides, 136);
FIELD(lb2_rotary_args, sin_strides, 152);
FIELD(lb2_rotary_args, query_out, 168);
FIELD(lb2_rotary_args, key_out, 176);
FIELD(lb2_rotary_args, dtype, 184);
FIELD(lb2_rotary_args, angle_dtype, 188);
FIELD(lb2_rotary_args, interleaved, 192);
FIELD(lb2_rotary_args, isa, 196);
FIELD(lb2_rotary_args, parallel_for, 200);
FIELD(lb2_rotary_args, parallel_context, 208);

SIZE(lb2_cuda_device, 24);
FIELD(lb2_cuda_device, struct_size, 0);
FIELD(lb2_cuda_device, capability, 8);
FIELD(lb2_cuda_device, multiprocessors, 12);
FIELD(lb2_cuda_device, shared_bytes, 16);

SIZE(lb2_cuda_launch, 56);
FIELD(lb2_cuda_launch, kind, 0);
FIELD(lb2_cuda_launch, stage, 4);
FIELD(lb2_cuda_launch, grid_x, 8);
FIELD(lb2_cuda_launch, grid_y, 12);
FIELD(lb2_cuda_launch, grid_z, 16);
FIELD(lb2_cuda_launch, threads, 20);
FIELD(lb2_cuda_launch, token_tile, 24);
FIELD(lb2_cuda_launch, row_warps, 28);
FIELD(lb2_cuda_launch, split_warps, 32);
FIELD(lb2_cuda_launch, chunk_slices, 36);
FIELD(lb2_cuda_launch, shared_bytes, 40);
FIELD(lb2_cuda_launch, chained, 44);
FIELD(lb2_cuda_launch, estimated_cycles, 48);
FIELD(lb2_cuda_launch, row_tile, 52);

SIZE(lb2_cuda_plan, 312);
FIELD(lb2_cuda_plan, struct_size, 0);
FIELD(lb2_cuda_plan, device, 8);
FIELD(lb2_cuda_plan, workspace_bytes, 32);
FIELD(lb2_cuda_plan, token_block, 40);
FIELD(lb2_cuda_plan, macs, 48);
FIELD(lb2_cuda_plan, activation, 56);
FIELD(lb2_cuda_plan, one_bit_mma, 60);
FIELD(lb2_cuda_plan, first_stages, 64);
FIELD(lb2_cuda_plan, num_launches, 68);
FIELD(lb2_cuda_plan, launches, 72);
FIELD(lb2_cuda_plan, estimated_cycles, 296);
FIELD(lb2_cuda_plan, unpack_cycles, 304);

SIZE(lb2_cuda_tuning, 48);
FIELD(lb2_cuda_tuning, struct_size, 0);
FIELD(lb2_cuda_tuning, row_warps, 8);
FIELD(lb2_cuda_tuning, splits, 16);
FIELD(lb2_cuda_tuning, max_chunk, 20);
FIELD(lb2_cuda_tuning, unchained, 24);
FIELD(lb2_cuda_tuning, gemm_rows, 28);
FIELD(lb2_cuda_tuning, gemm_tokens, 36);
FIELD(lb2_cuda_tuning, fused, 44);

CONSTANT(LB2_FORMAT_VERSION, 1);
CONSTANT(LB2_WORD_BITS, 32);
CONSTANT(LB2_FIRST_BIT, 0);
CONSTANT(LB2_NEGATIVE_BIT, 1);
CONSTANT(LB2_PAD_BIT, 0);
CONSTANT(LB2_RANK_MULTIPLE, 8);
CONSTANT(LB2_MAX_PATHS, 16);
CONSTANT(LB2_MAX_LAYERS, 8);
CONSTANT(LB2_FUNCTION_SILU, 0);
CONSTANT(LB2_FUNCTION_GELU, 1);
CONSTANT(LB2_FUNCTION_GELU_TANH, 2);
CONSTANT(LB2_FUNCTION_RELU, 3);
CONSTANT(LB2_OK, 0);
CONSTANT(LB2_ERROR_INVALID_ARGUMENT, 1);
CONSTANT(LB2_ERROR_UNSUPPORTED, 2);
CONSTANT(LB2_ERROR_INTERNAL, 3);
CONSTANT(LB2_FLOAT32, 0);
CONSTANT(LB2_FLOAT16, 1);
CONSTANT(LB2_BFLOAT16, 2);
CONSTANT(LB2_INT8, 3);
CONSTANT(LB2_ISA_AUTO, 0);
CONSTANT(LB2_ISA_SCALAR, 1);
CONSTANT(LB2_ISA_AVX2, 2);
CONSTANT(LB2_ISA_AVX512, 3);
CONSTANT(LB2_ISA_AVX512_VNNI, 4);
CONSTANT(LB2_ISA_NEON, 5);
CONSTANT(LB2_ACTIVATION_AUTO, 0);
CONSTANT(LB2_ACTIVATION_EXACT, 1);
CONSTANT(LB2_ACTIVATION_INT16, 2);
CONSTANT(LB2_ACTIVATION_INT8, 3);
CONSTANT(LB2_ACTIVATION_SIGN, 4);
CONSTANT(LB2_ACTIVATION_FLOAT16, 5);
CONSTANT(LB2_CUDA_CONVERT, 1);
CONSTANT(LB2_CUDA_DECODE, 2);
CONSTANT(LB2_CUDA_GEMM, 3);
CONSTANT(LB2_CUDA_FUSED, 4);

int main(void) { return 0; }
