/* The C ABI of the CUDA kernels. Planning is part of the core library and needs no GPU; what launches is in
 * liblittlebit2_cuda. The rules of littlebit2.h hold here too. Signs are read as they lie in packed format
 * v1; rows of words that start at multiples of 16 bytes are read 16 bytes at a time, others 4. */
#ifndef LITTLEBIT2_CUDA_H_
#define LITTLEBIT2_CUDA_H_

#include "littlebit2/littlebit2.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Activations as one float16 each, scaled by a power of two per slice of 512 channels; error about 2e-4. CUDA
 * only; what AUTO means for 16-bit activations of more than 16 tokens, and of fewer where the GPU has no
 * 1-bit tensor cores. The other modes are those of littlebit2.h, with slices of 512 channels in place of its
 * chunks; SIGN scales by the mean magnitude of a slice. */
#define LB2_ACTIVATION_FLOAT16 5

/* What planning needs to know of a GPU. */
typedef struct lb2_cuda_device {
  uint64_t struct_size;
  int32_t capability;      /* 10 * major + minor, for example 90 */
  int32_t multiprocessors; /* SMs */
  int64_t shared_bytes;    /* that one block can have, opt-in */
} lb2_cuda_device;

/* What a launch does: activations of a stage as the tensor cores take them, into the workspace, once for all
 * blocks that multiply them; or signs times activations, which its blocks convert themselves if there was no
 * such launch before. */
#define LB2_CUDA_CONVERT 1
#define LB2_CUDA_DECODE 2
/* The same for more than 16 tokens in the modes EXACT, FLOAT16 and INT8: signs are expanded once for up to
 * 128 tokens. */
#define LB2_CUDA_GEMM 3
/* Both stages of more than 16 tokens, with the bits of the GEMM, in one launch that needs no workspace, for
 * layers whose latents fit into shared memory. */
#define LB2_CUDA_FUSED 4

typedef struct lb2_cuda_launch {
  int32_t kind;
  int32_t stage;  /* 0, or 1 for U of a layer with two stages */
  int32_t grid_x; /* decode: tiles of 16 * row_warps rows, GEMM: of row_tile, of all first stages or of N */
  int32_t grid_y; /* parts that the columns are split into; their sums, GEMM: those of their slices of 512
                     columns, are added in order by the next stage. Fused: blocks of a cluster, which share
                     a tile of tokens */
  int32_t grid_z; /* blocks of token_tile tokens */
  int32_t threads;
  int32_t token_tile;
  /* Of decode launches; 0 for others. Warps of a block are row_warps x split_warps. */
  int32_t row_warps;    /* each with 16 rows of signs */
  int32_t split_warps;  /* warps that share rows and split their columns */
  int32_t chunk_slices; /* slices of 512 columns whose activations are in shared memory at once */
  int32_t shared_bytes;
  int32_t chained; /* 1 if it may start before the kernel before it has ended (sm_90 and newer); it waits */
  int32_t estimated_cycles; /* decode of one token, others of token_block: what the shape was chosen by, no
                               measurement */
  int32_t row_tile;         /* of GEMM launches; 0 for others: rows of a block */
} lb2_cuda_launch;

/* What a call will do. Set struct_size = sizeof(lb2_cuda_plan) before. */
typedef struct lb2_cuda_plan {
  uint64_t struct_size;
  lb2_cuda_device device; /* that it was made for */
  int64_t workspace_bytes;
  int64_t token_block;       /* tokens that one round of launches serves */
  int64_t macs;              /* sign-accumulate operations, all stages, paths and tokens */
  lb2_activation activation; /* AUTO resolved */
  int32_t one_bit_mma;       /* 1: bit planes in 1-bit tensor cores; 0: signs expanded to float16 */
  int32_t first_stages;      /* computed (paths that share one count once) */
  int32_t num_launches;
  lb2_cuda_launch launches[4];
  /* Of a call of more than 16 tokens in EXACT, FLOAT16 or INT8, else 0, and no measurement: clock cycles that
   * it should take; and, but for float32, those of lb2_linear_unpack_cuda and a library's products with what
   * that gives. */
  int64_t estimated_cycles, unpack_cycles;
} lb2_cuda_plan;

/* What to plan with in place of the planner's choice, to measure other choices; each 0 leaves it the choice.
 * Sums are taken in another order with other numbers. */
typedef struct lb2_cuda_tuning {
  uint64_t struct_size;
  int32_t row_warps[2]; /* of each stage: 1, 2, 4 or 8 */
  int32_t splits;       /* grid_y of the first of two stages: at most 65535, and its slices of 512 columns */
  int32_t max_chunk;    /* upper bound of chunk_slices */
  int32_t unchained;    /* 1: every launch starts at the end of the kernel before it, as before sm_90 */
  /* Rows and tokens of a block of the GEMM, of each stage: 64 x 32, 128 x 32, 128 x 64 or, but in EXACT,
   * 128 x 128. row_warps and max_chunk mean nothing there. */
  int32_t gemm_rows[2];
  int32_t gemm_tokens[2];
  /* 1, 2, 4 or 8: one launch for both stages where there would be a GEMM, in clusters of so many blocks (more
   * than one from sm_90 on), which has no splits and tiles to choose; -1: never. With 0, asking for splits or
   * tiles rules it out. */
  int32_t fused;
} lb2_cuda_tuning;

/* Fill *plan for calls with m tokens of `dtype` on a layer of this shape, on `device`: a pure function of its
 * arguments. tuning may be NULL. A token's result has the same bits whatever other tokens are in the batch.
 * Their number M changes nothing up to 16. Above 16 tokens, EXACT, FLOAT16 and INT8 take a GEMM, which adds
 * in another order, and AUTO may choose another mode; INT16 and SIGN are the same at any M. */
LB2_API lb2_status lb2_linear_plan_cuda(const lb2_layer_shape* shape, int64_t m, lb2_dtype dtype,
                                        lb2_activation activation, const lb2_cuda_device* device,
                                        const lb2_cuda_tuning* tuning, lb2_cuda_plan* plan);

/* Plan several layers with the same input, such as the projections of an attention or of a gated MLP, in the
 * launches of one layer. shapes [num_layers] must have equal k, all one stage or all two, and at most
 * LB2_MAX_PATHS paths together. Layers share no first stage with each other. The plan is that of the group: a
 * layer's sums may be taken in another order than in a call of its own. */
LB2_API lb2_status lb2_grouped_plan_cuda(const lb2_layer_shape* shapes, int64_t num_layers, int64_t m,
                                         lb2_dtype dtype, lb2_activation activation,
                                         const lb2_cuda_device* device, const lb2_cuda_tuning* tuning,
                                         lb2_cuda_plan* plan);

/* ---- liblittlebit2_cuda ---- */

/* Describe a GPU by its ordinal; fails with LB2_ERROR_UNSUPPORTED, and the reason, if it cannot run the
 * kernels. */
LB2_API lb2_status lb2_cuda_get_device(int32_t ordinal, lb2_cuda_device* device);

/* y = layer(x) on the current device, queued on `stream` (a cudaStream_t; NULL is the default stream), as
 * planned for the sizes of args; the plan of a layer serves every call of as many tokens. All
 * pointers of args but `paths` and `args` are device pointers; words and floats must be aligned to 4 bytes,
 * input and output to their elements. Allocates nothing, synchronises nothing, and can be captured into a
 * CUDA graph. The same bits from run to run and whatever the other tokens are (see lb2_linear_plan_cuda). */
LB2_API lb2_status lb2_linear_forward_cuda(const lb2_linear_args* args, const lb2_cuda_plan* plan,
                                           void* stream);

/* The same for the layers of a plan of lb2_grouped_plan_cuda. The workspace is that of layers[0]. */
LB2_API lb2_status lb2_grouped_forward_cuda(const lb2_linear_args* layers, int64_t num_layers,
                                            const lb2_cuda_plan* plan, void* stream);

/* The layer as dense matrices, queued on `stream`, for matrix products of the caller's own where there are
 * many tokens (plan.unpack_cycles). Two stages: y = (x first^T) last^T + bias, with first = sign(V) in_scale,
 * of all paths [R, K], and last = out_scale sign(U) latent_scale, of all paths [N, R]. A single stage: y = x
 * last^T
 * + bias, with last [N, K], the sum of the paths, and `first` NULL. Both without room between rows, in
 * args->dtype: products of scales must fit into float32, and float16 does not hold all that these can be.
 * Input, output, bias and workspace of args are not looked at. */
LB2_API lb2_status lb2_linear_unpack_cuda(const lb2_linear_args* args, void* first, void* last, void* stream);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* LITTLEBIT2_CUDA_H_ */
