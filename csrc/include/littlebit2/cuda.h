/* The C ABI of the CUDA kernels. Planning is part of the core library and needs no GPU; the functions that
 * launch kernels are in liblittlebit2_cuda. The rules of littlebit2.h hold here too. Signs are read in packed
 * format v1; rows of words that start at multiples of 16 bytes are loaded 16 bytes at a time, other rows 4.
 */
#ifndef LITTLEBIT2_CUDA_H_
#define LITTLEBIT2_CUDA_H_

#include "littlebit2/littlebit2.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Activations as one float16 each, scaled by a power of two per slice of 512 channels; error about 2e-4. CUDA
 * only. AUTO means this mode for 16-bit activations of more than 16 tokens, and of fewer tokens on GPUs
 * without 1-bit tensor cores. The other modes are those of littlebit2.h, with slices of 512 channels instead
 * of its chunks; SIGN scales by the mean magnitude of a slice. */
#define LB2_ACTIVATION_FLOAT16 5

/* The properties of a GPU that planning needs. */
typedef struct lb2_cuda_device {
  uint64_t struct_size;
  int32_t capability;      /* 10 * major + minor, for example 90 */
  int32_t multiprocessors; /* SMs */
  int64_t shared_bytes;    /* largest shared memory per block, opt-in */
} lb2_cuda_device;

/* Kinds of launches. CONVERT writes the activations of a stage to the workspace in tensor-core layout, once
 * for all blocks that multiply them. DECODE multiplies signs by activations; its blocks convert the
 * activations themselves if no CONVERT launch precedes it. */
#define LB2_CUDA_CONVERT 1
#define LB2_CUDA_DECODE 2
/* Like DECODE, for more than 16 tokens in the modes EXACT, FLOAT16 and INT8: signs are expanded once for up
 * to 128 tokens. */
#define LB2_CUDA_GEMM 3
/* Both stages for more than 16 tokens in one launch without a workspace, for layers whose latents fit into
 * shared memory. Results have the bits of the GEMM. */
#define LB2_CUDA_FUSED 4

typedef struct lb2_cuda_launch {
  int32_t kind;
  int32_t stage;  /* 0, or 1 for U of a two-stage layer */
  int32_t grid_x; /* tiles of rows of all first stages, or of N: 16 * row_warps rows in decode, row_tile in
                     GEMM */
  int32_t grid_y; /* parts that the columns are split into; the next stage adds their sums in order (GEMM: the
                     sums of their slices of 512 columns). Fused: blocks per cluster; a cluster computes one
                     tile of tokens */
  int32_t grid_z; /* tiles of token_tile tokens */
  int32_t threads;    /* threads per block */
  int32_t token_tile; /* tokens per block */
  /* Decode launches only, else 0. A block has row_warps x split_warps warps. */
  int32_t row_warps;    /* warps with rows of their own, 16 each */
  int32_t split_warps;  /* warps that share rows and split the columns */
  int32_t chunk_slices; /* slices of 512 columns whose activations are in shared memory at the same time */
  int32_t shared_bytes; /* shared memory per block */
  int32_t
      chained; /* 1 if it may start before the previous kernel ends (sm_90 and newer); it then waits itself */
  int32_t estimated_cycles; /* what the shape was chosen by, not a measurement: decode for one token, others
                               for token_block tokens */
  int32_t row_tile;         /* rows per block; GEMM launches only, else 0 */
} lb2_cuda_launch;

/* What a call will do. Set struct_size = sizeof(lb2_cuda_plan) first. */
typedef struct lb2_cuda_plan {
  uint64_t struct_size;
  lb2_cuda_device device; /* the GPU it was made for */
  int64_t workspace_bytes;
  int64_t token_block;       /* tokens per round of launches */
  int64_t macs;              /* sign-accumulate operations of all stages, paths and tokens */
  lb2_activation activation; /* AUTO resolved */
  int32_t one_bit_mma;       /* 1: bit planes in 1-bit tensor cores; 0: signs expanded to float16 */
  int32_t first_stages;      /* first stages computed (paths that share one count once) */
  int32_t num_launches;
  lb2_cuda_launch launches[4];
  /* Estimates in clock cycles, not measurements, for more than 16 tokens in EXACT, FLOAT16 or INT8, else 0:
   * of this call; and, but for float32, of lb2_linear_unpack_cuda and matrix products of a library. */
  int64_t estimated_cycles, unpack_cycles;
} lb2_cuda_plan;

/* Overrides of the planner's choice, to measure alternatives; 0 leaves a choice to the planner. Other values
 * may change the order of summation. */
typedef struct lb2_cuda_tuning {
  uint64_t struct_size;
  int32_t row_warps[2]; /* per stage: 1, 2, 4 or 8 */
  int32_t splits;       /* grid_y of the first of two stages: at most 65535, and its slices of 512 columns */
  int32_t max_chunk;    /* upper bound of chunk_slices */
  int32_t unchained;    /* 1: every launch starts when the previous kernel has ended, as before sm_90 */
  /* Rows and tokens per block of the GEMM, per stage: 64 x 32, 128 x 32, 128 x 64 or, except in EXACT, 128 x
   * 128. The GEMM ignores row_warps and max_chunk. */
  int32_t gemm_rows[2];
  int32_t gemm_tokens[2];
  /* 1, 2, 4 or 8: where there would be a GEMM, one launch for both stages in clusters of that many blocks
   * (more than one from sm_90 on), which has no splits and tiles to choose. -1: never. If 0, choosing splits
   * or tiles rules it out. */
  int32_t fused;
} lb2_cuda_tuning;

/* Fill *plan for calls with m tokens of `dtype` on a layer of this shape, on `device`: a pure function of its
 * arguments. tuning may be NULL. The result of a token has the same bits whatever other tokens are in the
 * batch. It is the same at any M up to 16. Above 16 tokens, EXACT, FLOAT16 and INT8 run as a GEMM, which adds
 * in another order, and AUTO may choose another mode; INT16 and SIGN are the same at any M. */
LB2_API lb2_status lb2_linear_plan_cuda(const lb2_layer_shape* shape, int64_t m, lb2_dtype dtype,
                                        lb2_activation activation, const lb2_cuda_device* device,
                                        const lb2_cuda_tuning* tuning, lb2_cuda_plan* plan);

/* Plan several layers with the same input, such as the projections of an attention or of a gated MLP, in the
 * launches of one layer. shapes [num_layers] must have equal k, all one stage or all two, and at most
 * LB2_MAX_PATHS paths together. Layers share no first stage with each other. The plan is for the group: a
 * layer's sums may be taken in another order than in a call of its own. */
LB2_API lb2_status lb2_grouped_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                         lb2_dtype dtype, lb2_activation activation,
                                         const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                                         lb2_cuda_plan* plan);

/* ---- What surrounds the layers of a decoder block, in their launches ----
 *
 * Up to 16 tokens (and for any number in INT16 and SIGN) the normalization of the input, the activation
 * function of an MLP and the residual sum are parts of the launches of the layers. For more tokens they are
 * launches of their own. */

/* Zero-initialize, then set struct_size = sizeof(lb2_cuda_extras). */
typedef struct lb2_cuda_extras {
  uint64_t struct_size;
  const lb2_norm* norm; /* of the input, read on the host, its weight on the GPU; or NULL. It is not rounded
                           to the dtype of the call, and needs a plan with `normed` */
  const void* residual; /* [M, N] of the call's dtype, added to the output of a call on one layer or an MLP
                           before it is rounded (after it, for more tokens); or NULL. It may be the output */
  int64_t residual_stride; /* elements between rows, >= 0; ignored when m <= 1 */
} lb2_cuda_extras;

/* lb2_grouped_plan_cuda for calls with a norm (normed = 1), or without (0). */
LB2_API lb2_status lb2_projections_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                             lb2_dtype dtype, lb2_activation activation,
                                             const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                                             int32_t normed, lb2_cuda_plan* plan);

/* What a call of an MLP will do. Set struct_size = sizeof(lb2_cuda_mlp_plan) first. */
typedef struct lb2_cuda_mlp_plan {
  uint64_t struct_size;
  int64_t workspace_bytes; /* of the whole call */
  lb2_cuda_plan first;     /* of gate and up, or up */
  lb2_cuda_plan last;      /* of down */
} lb2_cuda_mlp_plan;

/* Fill *plan for an MLP: shapes are those of (gate, up, down), or of (up, down) where N of up is K of down,
 * or twice that: then gate and up are the first and second half of its rows. */
LB2_API lb2_status lb2_mlp_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                     lb2_dtype dtype, lb2_activation activation,
                                     const lb2_cuda_device* device, int32_t normed, lb2_cuda_mlp_plan* plan);

/* ---- liblittlebit2_cuda ---- */

/* Describe a GPU by its ordinal. Fails with LB2_ERROR_UNSUPPORTED, and the reason, if it cannot run the
 * kernels. */
LB2_API lb2_status lb2_cuda_get_device(int32_t ordinal, lb2_cuda_device* device);

/* y = layer(x) on the current device, queued on `stream` (a cudaStream_t; NULL is the default stream). The
 * plan must be for the shape, m and dtype of args; it serves every call with those. `args` and its paths are
 * read on the host; all other pointers are device pointers. Words and floats must be aligned to 4 bytes,
 * input and output to their elements. The call allocates nothing, does not synchronize, and can be captured
 * into a CUDA graph. Results have the same bits from run to run and whatever the other tokens are (see
 * lb2_linear_plan_cuda). */
LB2_API lb2_status lb2_linear_forward_cuda(const lb2_linear_args* args, const lb2_cuda_plan* plan,
                                           void* stream);

/* The same for several layers, with a plan of lb2_grouped_plan_cuda. All must have the m, dtype, input and
 * input_stride of layers[0]; n, paths, bias and output are each layer's own. The workspace is that of
 * layers[0]. */
LB2_API lb2_status lb2_grouped_forward_cuda(const lb2_linear_args* layers, int64_t num_layers,
                                            const lb2_cuda_plan* plan, void* stream);

/* y_i = layer_i(norm(x)) + residual: lb2_grouped_forward_cuda with extras, which may be NULL. */
LB2_API lb2_status lb2_projections_forward_cuda(const lb2_linear_args* layers, int64_t num_layers,
                                                const lb2_cuda_extras* extras, const lb2_cuda_plan* plan,
                                                void* stream);

/* y = down(f(gate(h)) * up(h)) + residual, or down(f(up(h))) + residual, with h = norm(x)
 * (lb2_mlp_plan_cuda): in the launches of the layers alone up to 16 tokens, four or with conversions eight.
 * The input is that of layers[0], y the output of the last layer, the workspace that of layers[0]; m and
 * dtype are the same for all, other inputs and outputs are not read. f(gate(h)) and up(h) are rounded to the
 * call's dtype on their way through the workspace, as a module's outputs are, their product is not (for more
 * tokens, it is). extras may be NULL. */
LB2_API lb2_status lb2_mlp_forward_cuda(const lb2_linear_args* layers, int64_t num_layers,
                                        lb2_function function, const lb2_cuda_extras* extras,
                                        const lb2_cuda_mlp_plan* plan, void* stream);

/* Dense int8 rows (lb2_int8_args in littlebit2.h) on the current device, for few tokens: each 16 tokens read
 * all weights. Fastest where rows of weights start at multiples of 16 bytes. Of args, isa, workspace and
 * parallel_for are not used. weight, input and output must be aligned to their elements, scale and bias to 4
 * bytes. Sums are in fp32; results have the same bits from run to run and whatever the other tokens are. */
LB2_API lb2_status lb2_int8_forward_cuda(const lb2_int8_args* args, void* stream);

/* Dequantize the layer to dense matrices, queued on `stream`, for the caller's own matrix products where
 * there are many tokens (plan.unpack_cycles). Two stages: y = (x first^T) last^T + bias, with first = sign(V)
 * in_scale of all paths, [R, K], and last = out_scale sign(U) latent_scale of all paths, [N, R]. A single
 * stage: y = x last^T + bias, with last [N, K], the sum of the paths, and `first` NULL. Both matrices are
 * contiguous and have args->dtype: products of scales must fit into float32, and float16 cannot hold all
 * values that these can take. The input, output, bias and workspace of args are not read. */
LB2_API lb2_status lb2_linear_unpack_cuda(const lb2_linear_args* args, void* first, void* last, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LITTLEBIT2_CUDA_H_ */
