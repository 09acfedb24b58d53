"""What a call does, decided by pure functions of layer, number of tokens and GPU; nothing here needs Triton.

Block sizes of the GEMV, and the columns that its splits take, decide in which order a token's products are
added: they depend on the layer and the GPU alone. Those of the other kernels change no bit of the result, for
the sums of a chunk are added up in one order everywhere (gemm.py), and may depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..format import words_per_row
from ..gpu import GpuProperties

__all__ = [
    "ACTIVATIONS",
    "CHUNK_WORDS",
    "DEFAULT_GPU",
    "FUSED_SIGNS",
    "GEMV_TOKENS",
    "SLOTS",
    "XNOR_TOKENS",
    "Config",
    "DecodeConfig",
    "FusedConfig",
    "GemmConfig",
    "GemvConfig",
    "Method",
    "StageShape",
    "XnorConfig",
    "choose_method",
    "decode_config",
    "decode_shape",
    "distinct_first_stages",
    "fits_shared",
    "fused_config",
    "gemm_config",
    "gemv_config",
    "layer_launches",
    "stage_config",
    "xnor_config",
]

#: Names of ``activation`` that the backend serves. ``int16`` is CUDA's: its bit planes want 1-bit MMAs.
ACTIVATIONS = ("auto", "exact", "float16", "int8", "sign")

#: Paths of one launch; a kernel has as many arguments of each kind (slots.py).
SLOTS = 4

#: Most tokens that go through the GEMV: 3 instructions for each sign-accumulate and token in two launches,
#: where the GEMM takes 1.5 for each sign whatever the tokens are (up to a block of them), in four. Not yet
#: measured.
GEMV_TOKENS = 4

#: Most sign-accumulates of first stages that the fused kernel may do anew on each multiprocessor, where a
#: launch of its own spreads them over all. At 3 instructions each on 128 lanes they take 1536 cycles, 0.8 us
#: at 1.98 GHz; reading their 8 KiB of signs from the L2 cache, as all multiprocessors do at once, 0.2 us at
#: 5.5 TB/s. The launch that they save costs 1 us in a graph, and its own start and end. Not yet measured.
FUSED_SIGNS = 65536

#: Most tokens whose signs are compared by xor and population count: 512 sign-accumulates an SM and cycle,
#: where the int8 tensor cores, of the same bits, do 4096 but for 16 tokens at least. Not yet measured.
XNOR_TOKENS = 8

#: Most tokens for which a GEMM's first stage is split: the sums of each chunk are stored then.
SPLIT_TOKENS = 512

#: Words of a row that are summed before a scale is applied: columns with a common scale of activations. int8
#: and sign have the 512 columns of the CUDA kernels; float16, whose scales are powers of two, half of that.
CHUNK_WORDS = {"exact": 8, "float16": 8, "int8": 16, "sign": 16, "xnor": 16}

#: What is planned for where there is no GPU to ask, as in the interpreter: small, for its programs run in
#: turn.
DEFAULT_GPU = GpuProperties(80, 8, 101376)


@dataclass(frozen=True)
class Method:
    """How a call is computed.

    Attributes:
        kernel: ``"gemv"``, ``"gemm"`` or ``"xnor"``.
        activation: how activations enter the sums: ``"exact"``, ``"float16"``, ``"int8"`` or ``"sign"``.
    """

    kernel: str
    activation: str

    @property
    def kind(self) -> str:
        """Key of :data:`CHUNK_WORDS`: what the activations are staged as."""
        return "xnor" if self.kernel == "xnor" else self.activation


@dataclass(frozen=True)
class StageShape:
    """A stage of a layer, as the choice of a configuration sees it.

    Attributes:
        rows: of each sign matrix.
        cols: of each.
        last: whether the matrices are the paths of one sum, and not first stages side by side.
    """

    rows: tuple[int, ...]
    cols: tuple[int, ...]
    last: bool

    @property
    def most_rows(self) -> int:
        """Rows that the grid spans."""
        return max(self.rows)

    @property
    def words(self) -> int:
        """Words of the longest row."""
        return words_per_row(max(self.cols))

    def programs(self, block_rows: int) -> int:
        """Blocks of rows, of all matrices or of the one sum."""
        blocks = [-(-rows // block_rows) for rows in self.rows]
        return blocks[0] if self.last else sum(blocks)


@dataclass(frozen=True)
class GemvConfig:
    """Blocks of the GEMV: rows and words of a program's step, parts of the columns, warps."""

    block_rows: int
    block_words: int
    splits: int
    num_warps: int


@dataclass(frozen=True)
class DecodeConfig:
    """How the GEMV does a layer of two stages: in 2 launches, or in 1, the fused kernel."""

    launches: int


@dataclass(frozen=True)
class FusedConfig:
    """Blocks of the fused kernel, which follow from those of the two launches that it stands for.

    Attributes:
        block_rows: rows of the output of a program.
        col_words: words of a step along K.
        rank_words: words of a step along R, formed 32 latents at a time.
        splits: parts of the columns of the first stage, which a program adds up one after another.
        num_warps: warps of a program.
    """

    block_rows: int
    col_words: int
    rank_words: int
    splits: int
    num_warps: int


@dataclass(frozen=True)
class GemmConfig:
    """Blocks of the GEMM.

    Attributes:
        block_rows: rows of a program.
        block_tokens: its tokens.
        splits: parts of the columns.
        num_warps: warps of a program.
        num_stages: loads in flight: of chunks, or of steps where those are not unrolled.
        unroll: steps of a chunk in one straight line, so that only chunks are a loop; 1 keeps a loop of
            steps.
    """

    block_rows: int
    block_tokens: int
    splits: int
    num_warps: int
    num_stages: int
    unroll: int


@dataclass(frozen=True)
class XnorConfig:
    """Blocks of the xnor kernel: rows of a program, parts of the columns, warps."""

    block_rows: int
    splits: int
    num_warps: int


Config = FusedConfig | GemvConfig | GemmConfig | XnorConfig

#: Looks up a tuned configuration: (kernel, stage, tokens) -> field values, or ``None``.
Lookup = Callable[[str, StageShape, int], "dict[str, Any] | None"]


def choose_method(tokens: int, activation: str, float32: bool) -> Method:
    """Resolve ``activation``, and pick the kernel for the number of tokens.

    ``exact`` and ``auto`` switch from the GEMV to the GEMM above :data:`GEMV_TOKENS`, and a token's bits with
    them (of ``auto`` in 16 bits the mode too, from float32 products to float16 ones). ``float16`` and
    ``int8`` are one kernel for every number of tokens. ``sign`` has two, of the same bits.

    Raises:
        ValueError: ``activation`` is not in :data:`ACTIVATIONS`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if activation in ("auto", "exact"):
        if tokens <= GEMV_TOKENS:
            return Method("gemv", "exact")
        return Method("gemm", "exact" if float32 or activation == "exact" else "float16")
    if activation == "sign" and tokens <= XNOR_TOKENS:
        return Method("xnor", "sign")
    return Method("gemm", activation)


def _splits(programs: int, blocks: int, gpu: GpuProperties, most: int) -> int:
    """A power of two that brings ``programs`` to two for each SM, as far as there are blocks of columns."""
    splits = 1
    while splits * 2 <= min(blocks, most) and programs * splits < 2 * gpu.multiprocessors:
        splits *= 2
    return splits


def gemv_config(shape: StageShape, gpu: GpuProperties, lookup: Lookup | None = None) -> GemvConfig:
    """Blocks of the GEMV, by layer and GPU alone.

    A thread gets 8 words (the activations of 4 in registers), fewer of them where rows are few, but one at
    least: bits would lie across lanes else. The words of a step are those that waste least of the last one,
    the more the better.
    """
    tuned = lookup("gemv", shape, 1) if lookup is not None else None
    if tuned is not None:
        return GemvConfig(**tuned)

    def padded(step: int) -> int:
        return -(-shape.words // step) * step

    block_words = min((32, 16, 8, 4), key=lambda step: (padded(step) > 1.1 * padded(4), -step))
    block_rows, threads = 1024 // block_words, 128
    while block_rows > max(16, threads // block_words) and shape.programs(block_rows) < gpu.multiprocessors:
        block_rows //= 2
    blocks = -(-shape.words // block_words)
    splits = 1 if shape.last else _splits(shape.programs(block_rows), blocks, gpu, 8)
    return GemvConfig(block_rows, block_words, splits, threads // gpu.warp_lanes)


def decode_shape(first: StageShape, last: StageShape) -> StageShape:
    """A layer of two stages, as the choice of its launches sees it.

    Its rows are the layer's N, its columns the sign-accumulates of forming all latents once: what each
    program of the fused kernel does, K times the ranks of all paths, in steps of 32 latents.
    """
    latents = sum(32 * words_per_row(rank) for rank in last.cols)
    return StageShape((last.most_rows,), (first.cols[0] * latents,), last=True)


def decode_config(
    first: StageShape, last: StageShape, gpu: GpuProperties, lookup: Lookup | None = None
) -> DecodeConfig:
    """Whether one launch does both stages of the GEMV, by layer and GPU alone.

    It does where the work that its programs do anew costs less than a launch: :data:`FUSED_SIGNS` at most on
    each multiprocessor.
    """
    shape = decode_shape(first, last)
    tuned = lookup("decode", shape, 1) if lookup is not None else None
    if tuned is not None:
        return DecodeConfig(**tuned)
    programs = shape.programs(_fused_blocks(first, last, gpu, lookup).block_rows)
    signs = -(-programs // gpu.multiprocessors) * shape.cols[0]
    return DecodeConfig(1 if signs <= FUSED_SIGNS else 2)


def fused_config(
    first: StageShape, last: StageShape, gpu: GpuProperties, lookup: Lookup | None = None
) -> FusedConfig | None:
    """Blocks of the fused kernel, or ``None`` where a layer takes two launches, as one of 5 paths does."""
    if len(last.rows) > SLOTS or decode_config(first, last, gpu, lookup).launches == 2:
        return None
    return _fused_blocks(first, last, gpu, lookup)


def _fused_blocks(
    first: StageShape, last: StageShape, gpu: GpuProperties, lookup: Lookup | None
) -> FusedConfig:
    """A thread has as many words of each stage as in the launch for that stage.

    So the compiler distributes them alike, and lanes meet in the same order.
    """
    own, other = gemv_config(first, gpu, lookup), gemv_config(last, gpu, lookup)
    warps = min(max(own.num_warps * 32 // own.block_rows, 1), 16)
    rows = max(other.block_rows * warps // other.num_warps, 1)
    return FusedConfig(rows, own.block_words, other.block_words, own.splits, warps)


def fits_shared(kind: str, config: GemmConfig, gpu: GpuProperties) -> bool:
    """Whether the loads in flight fit: per stage a chunk of signs, and its activations or those of a step."""
    chunk, element_bytes, terms = CHUNK_WORDS[kind], _element_bytes(kind), 2 if kind == "exact" else 1
    columns = 32 * chunk * config.unroll // (8 * element_bytes)
    stage = columns * config.block_tokens * element_bytes * terms + 4 * chunk * config.block_rows
    return config.num_stages * stage <= gpu.shared_bytes - 4096


def _element_bytes(kind: str) -> int:
    return 1 if kind in ("int8", "sign") else 2


def gemm_config(
    kind: str, shape: StageShape, tokens: int, gpu: GpuProperties, lookup: Lookup | None = None
) -> GemmConfig:
    """Blocks of the GEMM: as many tokens as there are, up to what registers and shared memory hold.

    - A thread's sums take ``block_tokens`` registers twice, three times for two terms of each activation.
      Hopper and AMD's data-center GPUs, whose warps have 64 lanes and twice the registers, do well with 128.
      Ampere and Ada, which hold the activations of a step in registers too, spill then.
    - Blackwell's float16 products have their sums in tensor memory, where unrolled steps would each get a
      place of their own, and run out of it; and Triton gives its int8 products to Ampere's instructions.
    """
    tuned = lookup(f"gemm {kind}", shape, tokens) if lookup is not None else None
    if tuned is not None:
        config = GemmConfig(**tuned)
        if tokens > SPLIT_TOKENS:  # of another number of tokens, for this many would take too much memory
            config = replace(config, splits=1)
        if fits_shared(kind, config, gpu):
            return config
    unroll = 1 if gpu.generation == 10 and _element_bytes(kind) == 2 else 8 * _element_bytes(kind)
    wide = gpu.generation == 9 or gpu.warp_lanes == 64 or unroll == 1
    most = (128 if wide else 64) // (2 if kind == "exact" else 1)
    config = GemmConfig(64, 16, 1, 4, 2, unroll)
    while config.block_tokens < min(tokens, most):
        wider = replace(config, block_tokens=2 * config.block_tokens)
        if not fits_shared(kind, wider, gpu):
            break
        config = wider
    deeper = replace(config, num_stages=3)
    config = deeper if fits_shared(kind, deeper, gpu) else config
    if shape.last or tokens > SPLIT_TOKENS:
        return config
    # By classes of M, of which each is a graph to torch.compile.
    blocks = 1 if tokens <= config.block_tokens else SPLIT_TOKENS // config.block_tokens
    programs = shape.programs(config.block_rows) * blocks
    return replace(config, splits=_splits(programs, -(-shape.words // CHUNK_WORDS[kind]), gpu, 64))


def xnor_config(shape: StageShape, gpu: GpuProperties, lookup: Lookup | None = None) -> XnorConfig:
    """Blocks of the xnor kernel, by layer and GPU alone: 16 words of 64 rows a step."""
    tuned = lookup("xnor", shape, 1) if lookup is not None else None
    if tuned is not None:
        return XnorConfig(**tuned)
    if shape.last:
        return XnorConfig(64, 1, 4)
    blocks = -(-shape.words // CHUNK_WORDS["xnor"])
    return XnorConfig(64, _splits(shape.programs(64), blocks, gpu, 64), 4)


def stage_config(
    method: Method, shape: StageShape, tokens: int, gpu: GpuProperties, lookup: Lookup | None = None
) -> GemvConfig | GemmConfig | XnorConfig:
    """The configuration of a stage under ``method``."""
    if method.kernel == "gemv":
        return gemv_config(shape, gpu, lookup)
    if method.kernel == "xnor":
        return xnor_config(shape, gpu, lookup)
    return gemm_config(method.kind, shape, tokens, gpu, lookup)


def layer_launches(
    method: Method,
    first: StageShape | None,
    last: StageShape,
    tokens: int,
    gpu: GpuProperties,
    lookup: Lookup | None = None,
) -> list[tuple[str, Config | None]]:
    """Kernel and configuration of a layer's launches, in order; a single-stage one has no ``first``."""
    if first is not None and method.kernel == "gemv":
        both = fused_config(first, last, gpu, lookup)
        if both is not None:
            return [("fused", both)]
    launches: list[tuple[str, Config | None]] = []
    for shape in (first, last):
        if shape is None:
            continue
        count = -(-len(shape.rows) // SLOTS)
        staging = [] if method.kernel == "gemv" else [("operand", None)]
        launches += [*staging, (method.kernel, stage_config(method, shape, tokens, gpu, lookup))] * count
    return launches


def distinct_first_stages(v: Sequence[Any], in_scale: Sequence[Any]) -> list[int]:
    """For each path, the first one that passes the same tensors ``v`` and ``in_scale``."""
    return [
        next(q for q in range(p + 1) if v[q] is v[p] and in_scale[q] is in_scale[p]) for p in range(len(v))
    ]
