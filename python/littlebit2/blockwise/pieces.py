"""A model in pieces: everything but its blocks in memory, and one block at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from littlebit2.architecture.expansion import expand
from littlebit2.architecture.parts import Load, Part

__all__ = ["BlockCall", "ModelInPieces"]


@dataclass(frozen=True)
class BlockCall:
    """The arguments of a block besides the hidden state.

    Attributes:
        positional: those after the hidden state.
        named: by name.
        keyword: name under which the hidden state is passed; empty if it is the first positional argument.
    """

    positional: tuple[Any, ...]
    named: Mapping[str, Any]
    keyword: str = ""

    def __call__(self, block: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Return the hidden state that ``block`` makes of ``hidden`` ``[B, T, D]``."""
        if self.keyword:
            output = block(*self.positional, **self.named, **{self.keyword: hidden})
        else:
            output = block(hidden, *self.positional, **self.named)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return result


class _Reached(Exception):
    """Ends a forward pass at the block that was asked for."""


class ModelInPieces:
    """A causal language model whose blocks hold no values; everything else is in memory, in float32.

    The model's own forward runs what surrounds the blocks. Only their calls are replaced.

    Args:
        model: without values, as transformers builds it from its configuration.
        parts: where the values of its parameters come from, by name.
        load: reads tensors of the checkpoint.
        blocks: name of the list of blocks.
        device: where to compute.

    Raises:
        ValueError: a parameter has no values in the checkpoint.
    """

    def __init__(
        self, model: Any, parts: Mapping[str, Part], load: Load, blocks: str, device: torch.device
    ) -> None:
        self.model = model
        self.device = device
        self.blocks = blocks
        self._parts = parts
        self._load = load
        self._list: Any = model.get_submodule(blocks)
        #: For each class of blocks, what it returns after the hidden state; ``None``: the state alone.
        self.returns: dict[type, tuple[Any, ...] | None] = {}
        self._fill_rest()

    def __len__(self) -> int:
        return len(self._list)

    def name(self, index: int) -> str:
        """Name of a block in the model."""
        return f"{self.blocks}.{index}"

    def part(self, parameter: str) -> Part | None:
        """Where the values of a parameter come from."""
        return self._parts.get(parameter)

    def _fill_rest(self) -> None:
        model = self.model
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        for module in model.modules():
            module.__dict__.pop("_is_hf_initialized", None)
            for name in module._non_persistent_buffers_set:
                if module._buffers.get(name) is not None:
                    module._buffers[name] = torch.empty_like(module._buffers[name], device="cpu")
        # Buffers that no file holds, such as the frequencies of rotary embeddings.
        model.initialize_weights()
        inside = f"{self.blocks}."
        self._fill(model, "", lambda name: not name.startswith(inside))
        model.tie_weights()
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(self.device)

    def _fill(self, module: nn.Module, prefix: str, wanted: Callable[[str], bool]) -> None:
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        for owner_name, owner in module.named_modules():
            for kind in (owner._parameters, owner._buffers):
                for leaf, tensor in list(kind.items()):
                    name = ".".join(part for part in (prefix, owner_name, leaf) if part)
                    if tensor is None or tensor.device.type != "meta" or not wanted(name):
                        continue
                    part = self._parts.get(name)
                    if part is None:
                        if name in tied:
                            continue
                        raise ValueError(
                            f"method blockwise needs values for every parameter, got none for {name}: "
                            "use --method admm"
                        )
                    value = part.read(self._load)
                    dtype = torch.float32 if value.is_floating_point() else value.dtype
                    value = value.to(self.device, dtype, copy=True).contiguous()
                    kind[leaf] = (
                        nn.Parameter(value, requires_grad=False) if kind is owner._parameters else value
                    )

    def load_block(self, index: int) -> nn.Module:
        """Return a block with its dense values, experts expanded, without gradients."""
        block: nn.Module = copy.deepcopy(self._list[index])
        block.__dict__.pop("forward", None)  # of visited()
        self._fill(block, self.name(index), lambda name: True)
        expand(block)
        return block.eval().requires_grad_(False)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the hidden state ``[B, T, D]`` that the first block gets for ``ids`` ``[B, T]``."""
        hidden, _ = self._reach(ids, 0)
        return hidden

    def call(self, ids: torch.Tensor, index: int) -> BlockCall:
        """Return the other arguments of a block for ``ids`` ``[B, T]``."""
        return self._reach(ids, index)[1]

    def _reach(self, ids: torch.Tensor, index: int) -> tuple[torch.Tensor, BlockCall]:
        reached: list[tuple[torch.Tensor, BlockCall]] = []

        def visit(at: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
            if at == index:
                reached.append((hidden, call))
                raise _Reached
            return hidden

        with self.visited(visit), suppress(_Reached):
            self.run(ids)
        if not reached:
            raise ValueError(
                f"method blockwise needs a model that calls its blocks in turn, got none of "
                f"{self.name(index)}"
            )
        return reached[0]

    def run(self, ids: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Return the logits ``[B, T, vocabulary]``; the blocks do what :meth:`visited` says."""
        with torch.set_grad_enabled(gradients):
            logits: torch.Tensor = self.model(input_ids=ids.to(self.device), use_cache=False).logits
            return logits

    def states(
        self,
        ids: torch.Tensor,
        apply: Callable[[int, torch.Tensor, BlockCall], torch.Tensor],
        *,
        gradients: bool = False,
    ) -> torch.Tensor:
        """Return the hidden state ``[B, T, D]`` after the last block, where ``apply`` does what blocks do."""
        last: list[torch.Tensor] = []

        def visit(index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
            hidden = apply(index, hidden, call)
            if index == len(self) - 1:
                last.append(hidden)
                raise _Reached
            return hidden

        with self.visited(visit), suppress(_Reached):
            self.run(ids, gradients=gradients)
        return last[0]

    def finish(self, ids: torch.Tensor, hidden: torch.Tensor, *, gradients: bool = False) -> torch.Tensor:
        """Return the logits of the hidden state ``[B, T, D]`` after the last block."""
        last = len(self) - 1
        with self.visited(lambda at, state, _: hidden if at == last else state):
            return self.run(ids, gradients=gradients)

    @contextmanager
    def visited(self, visit: Callable[[int, torch.Tensor, BlockCall], torch.Tensor]) -> Iterator[None]:
        """Replace the call of every block by ``visit(index, hidden, call)``, which returns a hidden state."""
        for index, block in enumerate(self._list):
            block.__dict__["forward"] = self._visitor(index, type(block), visit)
        try:
            yield
        finally:
            for block in self._list:
                del block.__dict__["forward"]

    def _visitor(
        self, index: int, kind: type, visit: Callable[[int, torch.Tensor, BlockCall], torch.Tensor]
    ) -> Callable[..., Any]:
        def forward(*args: Any, **named: Any) -> Any:
            if args:
                hidden, call = args[0], BlockCall(tuple(args[1:]), named)
            else:
                hidden = named.pop("hidden_states")
                call = BlockCall((), named, "hidden_states")
            state = visit(index, hidden, call)
            rest = self.returns.get(kind)
            return state if rest is None else (state, *rest)

        return forward

    def class_of(self, index: int) -> type:
        """Class of a block."""
        return type(self._list[index])
