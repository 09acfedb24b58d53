"""Heads and embeddings in int8 rows: which modules of a model can be, and putting them there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2_kernels import Int8Embedding, Int8Linear
from littlebit2_kernels.int8 import int8_rows_linear
from littlebit2_kernels.int8.rounding import dequantize_rows, quantize_rows

from .linears import is_plain_linear
from .places import Places, copy_hooks
from .reads import modules_read_as_tensors

__all__ = ["Int8Rows", "TiedInt8Linear", "drop_ties", "find_rows", "int8_", "int8_embedding", "put_rows"]


@dataclass(frozen=True)
class Int8Rows:
    """The modules of a model that are held in int8.

    Attributes:
        head: name of the head, or ``None``.
        embedding: name of the embedding of tokens, or ``None``.
        tied: whether the head is tied to the embedding: both are the embedding's rows, held once.
    """

    head: str | None = None
    embedding: str | None = None
    tied: bool = False

    @property
    def stored(self) -> tuple[str, ...]:
        """Names of the modules that have rows of their own."""
        return tuple(name for name in (self.embedding, None if self.tied else self.head) if name is not None)


class TiedInt8Linear(nn.Module):
    """A head without rows of its own: ``y = x @ E.T + bias`` with those of an int8 embedding.

    Args:
        embedding: holds the rows; not registered here, so that they are in the state dict once.
        bias: of the head, or ``None``.
    """

    bias: torch.Tensor | None

    def __init__(self, embedding: Int8Embedding, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self._embedding = (embedding,)
        self.register_parameter("bias", bias)

    @property
    def in_features(self) -> int:
        """K."""
        return self._embedding[0].embedding_dim

    @property
    def out_features(self) -> int:
        """N."""
        return self._embedding[0].num_embeddings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` to ``[..., N]`` in its dtype, or autocast's where that is on."""
        (embedding,) = self._embedding
        return int8_rows_linear(x, embedding.weight_int8, embedding.weight_scale, self.bias)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense matrix in ``dtype``."""
        return self._embedding[0].dequantize(dtype)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, tied"


def find_rows(model: Any, *, head: bool, embedding: bool) -> Int8Rows:
    """Find the head and the embedding of a model, and check that they can be held in int8.

    Args:
        model: says which modules they are (``get_output_embeddings()`` and ``get_input_embeddings()``); with
            or without values.
        head: whether the head is wanted.
        embedding: whether the embedding is. Of a head that is tied to it, either asks for both.

    Raises:
        ValueError: the model has none, its class computes something else, or its weight belongs to other
            modules too.
    """
    names = {module: name for name, module in model.named_modules()}
    top = _asked(model, "get_output_embeddings")
    table = _asked(model, "get_input_embeddings")
    tied = _are_tied(model, names, top, table)
    head, embedding = head or (tied and embedding), embedding or (tied and head)
    if not head and not embedding:
        return Int8Rows()
    kind = type(model).__name__
    if head:
        if top is None or top not in names:
            raise ValueError(f"the head cannot be int8: {kind} has no output head")
        if not is_plain_linear(top):
            raise ValueError(
                f"the head cannot be int8: {names[top]} is a {type(top).__name__}, which computes something "
                "else than a linear layer"
            )
    if embedding:
        if table is None or table not in names:
            raise ValueError(f"the embedding cannot be int8: {kind} has no embedding of tokens")
        if not _is_plain_embedding(table):
            raise ValueError(
                f"the embedding cannot be int8: {names[table]} is a {type(table).__name__}, which is read "
                "otherwise than by rows"
            )
    wanted = [module for module, want in ((top, head), (table, embedding)) if want]
    read = modules_read_as_tensors(model)
    for module in wanted:
        if names[module] in read:
            raise ValueError(
                f"{names[module]} cannot be int8: the model's code reads its weight ({read[names[module]]})"
            )
    weights = {id(module.weight) for module in wanted}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) in weights and module not in wanted:
                what = " and ".join(names[one] for one in wanted)
                raise ValueError(f"{what} cannot be int8: its weight is that of {name}.{leaf} too")
    return Int8Rows(
        names[top] if head and top is not None else None,
        names[table] if embedding and table is not None else None,
        tied and head,
    )


def put_rows(model: Any, rows: Int8Rows, places: Places | None = None) -> None:
    """Put int8 modules in the place of the dense ones, with zeros for values, on the same devices.

    Args:
        model: changed in place.
        rows: from :func:`find_rows` for such a model.
        places: of the model, where some are at hand.
    """
    places = Places(model) if places is None else places
    if rows.embedding is not None:
        old = model.get_submodule(rows.embedding)
        table = int8_embedding(old)
        copy_hooks(old, table)
        places.put(rows.embedding, table)
    if rows.head is not None:
        linear = model.get_submodule(rows.head)
        head = TiedInt8Linear(table, linear.bias) if rows.tied else _int8_head(linear)
        head.train(linear.training)
        copy_hooks(linear, head)
        places.put(rows.head, head)
    drop_ties(model)


def _int8_head(linear: nn.Linear) -> Int8Linear:
    head = Int8Linear(linear.in_features, linear.out_features, device=linear.weight.device)
    # The same parameter, which may be tied to another (BERT's heads).
    del head._buffers["bias"]
    head.register_parameter("bias", linear.bias)
    return head


def drop_ties(model: Any) -> None:
    """Let transformers tie no weight of a module that has int8 rows: it would look for a ``weight``."""
    gone = {
        f"{name}.weight"
        for name, module in model.named_modules()
        if isinstance(module, (Int8Embedding, Int8Linear, TiedInt8Linear))
    }
    if not gone:
        return
    for attribute in ("_tied_weights_keys", "all_tied_weights_keys"):
        ties = getattr(model, attribute, None)
        if isinstance(ties, dict):
            kept = {target: source for target, source in ties.items() if not {target, source} & gone}
            setattr(model, attribute, kept)
    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = _refuse_resize


def _refuse_resize(*args: Any, **kwargs: Any) -> None:
    raise ValueError("int8 rows cannot be resized: resize the dense model, and quantize it again")


def int8_(model: Any, *, head: bool = True, embedding: bool = True) -> Int8Rows:
    """Hold the head and the embedding of a model in int8 rows with a float32 scale each, in place.

    They are most of the bytes of a packed model. A head that is tied to the embedding stays tied: both are
    the same rows.

    Args:
        model: a transformers model with values, or any module with ``get_output_embeddings()`` and
            ``get_input_embeddings()``.
        head: whether the head is rounded.
        embedding: whether the embedding is. Of a head that is tied to it, either asks for both.

    Returns:
        Names of the modules.

    Raises:
        ValueError: one of them cannot be (:func:`find_rows`), or holds values that are not finite. The model
            is as it was then.
    """
    rows = find_rows(model, head=head, embedding=embedding)
    values = {name: quantize_rows(model.get_submodule(name).weight) for name in rows.stored}
    put_rows(model, rows)
    for name, (weight, scale) in values.items():
        module = model.get_submodule(name)
        module.weight_int8, module.weight_scale = weight, scale
    return rows


def int8_embedding(embedding: nn.Embedding) -> Int8Embedding:
    """Return an int8 embedding that does what ``embedding`` does besides, with zeros for values.

    A subclass that multiplies what ``nn.Embedding`` returns keeps its code and attributes.
    """
    kind = type(embedding)
    made: Any = Int8Embedding.__new__(Int8Embedding if kind is nn.Embedding else _int8_class(kind))
    nn.Module.__init__(made)
    state = {key: value for key, value in vars(embedding).items() if key not in vars(made)}
    vars(made).update(state)
    for name, buffer in embedding._buffers.items():
        made.register_buffer(name, buffer, persistent=name not in embedding._non_persistent_buffers_set)
    weight = embedding.weight
    made._make_rows(*weight.shape, weight.device)
    made.dtype = weight.dtype
    return made.train(embedding.training)


_classes: dict[type[nn.Embedding], type[Int8Embedding]] = {}


def _int8_class(kind: type[nn.Embedding]) -> type[Int8Embedding]:
    """A subclass of ``kind`` whose ``nn.Embedding`` is the int8 one."""
    if kind not in _classes:
        _classes[kind] = type(
            f"Int8{kind.__name__}", (kind, Int8Embedding), {"__reduce_ex__": _reduce, "_dense_class": kind}
        )
    return _classes[kind]


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    # A class that was made here has no name to be found under.
    return _remake, (self._dense_class,), vars(self)


def _remake(kind: type[nn.Embedding]) -> Int8Embedding:
    return _int8_class(kind).__new__(_int8_class(kind))


def _is_plain_embedding(module: nn.Module) -> bool:
    """Whether ``module`` returns rows of its weight, perhaps times something; subclasses are tried."""
    if not isinstance(module, nn.Embedding) or "forward" in vars(module) or module.max_norm is not None:
        return False
    if type(module).forward is nn.Embedding.forward:
        return True
    rows, columns = 5, 3
    trial: Any = type(module).__new__(type(module))
    nn.Module.__init__(trial)
    vars(trial).update({key: value for key, value in vars(module).items() if key not in vars(trial)})
    for name, buffer in module._buffers.items():
        # A model without values has no multiplier either: any does for a trial.
        like = None if buffer is None else torch.full(buffer.shape, 1.5, dtype=buffer.dtype, device="cpu")
        trial.register_buffer(name, like)
    generator = torch.Generator(device="cpu").manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float32, device="cpu")
    rounded, scale = quantize_rows(weight)
    trial.weight = nn.Parameter(dequantize_rows(rounded, scale), requires_grad=False)
    ids = torch.tensor([[0, 4, 2]], device="cpu")
    try:
        with torch.no_grad():
            expected = trial(ids)
            tried = int8_embedding(trial)
            tried.weight_int8, tried.weight_scale = rounded, scale
            got = tried(ids)
    except Exception:  # whatever foreign code raises, it is no plain embedding
        return False
    return (
        isinstance(expected, torch.Tensor)
        and not got.is_meta  # it computed with the weight itself
        and expected.shape == got.shape
        and torch.allclose(expected, got)
    )


def _are_tied(model: Any, names: dict[nn.Module, str], top: Any, table: Any) -> bool:
    """Whether head and embedding have one weight, or will have once the model is loaded."""
    if top is None or table is None:
        return False
    if getattr(top, "weight", None) is table.weight:
        return True
    pair = {f"{names.get(module)}.weight" for module in (top, table)}
    ties = getattr(model, "all_tied_weights_keys", None) or {}
    return any({target, source} == pair for target, source in ties.items())


def _asked(model: Any, method: str) -> Any:
    try:
        return getattr(model, method, lambda: None)()
    except NotImplementedError:
        return None
