"""``littlebit2.synthesize``: a checkpoint of random signs in the shapes of any model, for speed tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from littlebit2.architecture.expansion import expand
from littlebit2.architecture.int8 import find_rows
from littlebit2.architecture.linears import choose_linears
from littlebit2.architecture.select import DEFAULT_EXCLUDE, INT8, KEEP, check_patterns, check_rows
from littlebit2.architecture.transposed import collapse_transposed
from littlebit2.checkpoint import CheckpointWriter
from littlebit2.plan import load_config
from littlebit2.quantize import QuantConfig
from littlebit2.quantize.ranks import check_budget, layer_config, too_small
from littlebit2_kernels.format import WORD_BITS, PackedLinear, PackedPath, words_per_row

from .names import published_names
from .skeleton import model_class

__all__ = ["random_layer", "synthesize"]


def synthesize(
    config: PreTrainedConfig | Mapping[str, Any] | str | Path,
    out_dir: str | Path,
    bpw: float,
    *,
    paths: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    kv_factor: float = 1.0,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    head: str = KEEP,
    embedding: str = KEEP,
    overwrite: bool = False,
    progress: Callable[[str], object] | None = None,
) -> list[str]:
    """Write a random checkpoint that runs as fast, and takes as much memory, as a real one would.

    Every linear layer that ``quantize`` would pack has random signs at the ranks that ``bpw`` buys, and
    scales that keep activations at the size of the layer's input; experts are layers of their own.
    Embeddings, norms, routers and head are what transformers initializes a new model with. One layer or
    tensor is held at a time.

    Args:
        config: the model's configuration: an object, a dictionary, a ``config.json`` or a directory with
            one, or a name of :func:`littlebit2.plan.shipped_configs`.
        out_dir: directory to make.
        bpw: counted bits per weight.
        paths: P.
        seed: seed for all random values; the same arguments write the same bytes.
        dtype: dtype of the dense tensors.
        kv_factor: factor on the rank of key and value projections.
        exclude: patterns of layers that stay dense. Without the default ones, heads are packed too.
        head: ``"keep"``, or ``"int8"`` for int8 rows with a float32 scale each.
        embedding: likewise, the embedding of tokens. Either rounds both if the head is tied to it.
        overwrite: replace an existing checkpoint directory, at the end.
        progress: called with the name of each packed layer that was written.

    Returns:
        Names of the packed layers.

    Raises:
        FileExistsError: ``out_dir`` exists and is not empty, and ``overwrite`` is off or it is no checkpoint.
        FileNotFoundError: there is no such configuration.
        ValueError: transformers does not know the model type, a head would be both packed and rounded, or
            the budget fits no layer (the message names the first). Layers that are too small for it stay
            dense.
    """
    quant = QuantConfig(bpw=bpw, paths=paths, kv_factor=kv_factor, seed=seed)
    check_rows(head, embedding)
    model = _meta_model(config, dtype)
    rows = find_rows(model, head=head == INT8, embedding=embedding == INT8)
    # Before anything is expanded: the names go by the parameters of the dense model.
    published = published_names(model)
    expand(model)
    # All ranks before anything is written: a budget that does not fit leaves no directory.
    plans = dict(_plans(model, quant, check_patterns("exclude", exclude)))
    collapse_transposed(model, keep=plans)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    generator = torch.Generator().manual_seed(seed)
    both = sorted({*rows.stored} & {*plans})
    if both:
        raise ValueError(
            f"head must be {KEEP!r} where exclude lets heads be packed ({both[0]}), got {head!r}"
        )
    int8 = {published.get(f"{name}.weight", f"{name}.weight") for name in rows.stored}
    writing = CheckpointWriter(out_dir, model.config.to_diff_dict(), int8=int8, overwrite=overwrite)
    names: list[str] = []
    with torch.random.fork_rng(devices=[]), writing as writer:
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if name in plans:
                assert isinstance(module, nn.Linear)
                written = published.get(f"{name}.weight", f"{name}.weight").removesuffix(".weight")
                writer.add_layer(written, random_layer(module, plans[name], generator))
                names.append(written)
                if progress is not None:
                    progress(written)
                continue
            for tensor_name, tensor in _dense_tensors(model, name, module):
                if tensor_name not in tied:
                    writer.add_tensor(published.get(tensor_name, tensor_name), tensor)
            module.to("meta")
        writer.finish()
    return names


def random_layer(linear: nn.Linear, ranks: tuple[int, ...], generator: torch.Generator) -> PackedLinear:
    """Return a packed layer of random signs in the shape of ``linear``, with zero bias if that has one.

    Entries of the weight it stands for have a variance of about ``1 / K``.
    """
    k, n = linear.in_features, linear.out_features

    def words(rows: int, cols: int) -> torch.Tensor:
        shape = (rows, words_per_row(cols))
        # int64 holds the upper bound that int32 does not.
        drawn = torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)
        if cols % WORD_BITS:
            drawn[:, -1] &= (1 << cols % WORD_BITS) - 1
        return drawn

    def scale(size: int, mean: float) -> torch.Tensor:
        return mean * (0.5 + torch.rand(size, generator=generator))

    packed = [
        PackedPath(
            v=words(rank, k),
            in_scale=scale(k, 1.0),
            out_scale=scale(n, 1.0),
            u=words(n, rank),
            latent_scale=scale(rank, 1 / math.sqrt(rank * k * len(ranks))),
        )
        for rank in ranks
    ]
    return PackedLinear(packed, None if linear.bias is None else torch.zeros(n))


def _meta_model(source: PreTrainedConfig | Mapping[str, Any] | str | Path, dtype: torch.dtype) -> Any:
    """Build the model that ``source`` describes, without values."""
    if isinstance(source, PreTrainedConfig):
        config = source
    else:
        fields = dict(source) if isinstance(source, Mapping) else load_config(source)
        fields.pop("quantization_config", None)
        if "model_type" not in fields:
            raise ValueError("config must have a model_type, got none")
        config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        kind = model_class(config)
        make = kind._from_config if hasattr(kind, "_from_config") else kind.from_config
        return make(config, dtype=dtype)


def _plans(
    model: PreTrainedModel, quant: QuantConfig, exclude: Sequence[str]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    chosen, _ = choose_linears(model, ("*",), exclude)
    layers = [(names[0], linear.in_features, linear.out_features) for linear, names in chosen.items()]
    small = {name: too_small(name, k, n, quant) for name, k, n in layers}
    fitting = [layer for layer in layers if small[layer[0]] is None]
    if layers and not fitting:
        raise ValueError(small[layers[0][0]])
    check_budget(quant, fitting)
    for name, k, n in fitting:
        ranks = layer_config(name, k, n, quant).ranks
        assert ranks is not None  # settled by layer_config
        yield name, ranks


def _dense_tensors(
    model: PreTrainedModel, name: str, module: nn.Module
) -> Iterator[tuple[str, torch.Tensor]]:
    """Give the tensors that ``module`` itself holds the values that a new model has."""
    stored = {
        key: tensor
        for key, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        if key not in module._non_persistent_buffers_set
    }
    if not stored:
        return
    module.to_empty(device="cpu", recurse=False)
    model._init_weights(module)
    for key in stored:
        yield f"{name}.{key}" if name else key, getattr(module, key).detach()
