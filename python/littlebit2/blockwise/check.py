"""Whether a model can be worked on block by block, found out before any work."""

from __future__ import annotations

from typing import Any

import torch

from .pieces import BlockCall, ModelInPieces

__all__ = ["check_blocks"]

#: Tokens of the sequences that are tried.
_TOKENS = 8


def check_blocks(pieces: ModelInPieces, vocabulary: int) -> bool:
    """Try the blocks on a few tokens, and learn what they return.

    Args:
        pieces: the model; :attr:`.ModelInPieces.returns` is filled in.
        vocabulary: number of token ids.

    Returns:
        Whether the other arguments of blocks are the same whatever the tokens are.

    Raises:
        ValueError: a block returns more than a hidden state, or one of another shape, its other arguments
            depend on hidden states or are no tensors or plain values, or the model does not call its blocks
            one after the other.
    """
    generator = torch.Generator().manual_seed(0)
    ids, others = (torch.randint(vocabulary, (2, _TOKENS), generator=generator) for _ in range(2))
    try:
        calls = _first_calls(pieces, ids)
    except (ValueError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model's own code objects to
        text = " ".join(str(error).split())
        raise ValueError(f"{_refusal(pieces)} its blocks cannot be run: {text:.300}") from error
    _drop_returns(pieces, ids)
    changed = _calls(pieces, ids, factor=1.5)
    for index, (one, other) in enumerate(zip(calls, changed, strict=True)):
        if not _equal(_values(one), _values(other)):
            raise ValueError(f"{_refusal(pieces)} arguments of {pieces.name(index)} depend on hidden states")
    return all(
        _equal(_values(one), _values(other))
        for one, other in zip(calls, _calls(pieces, others, factor=1.0), strict=True)
    )


def _refusal(pieces: ModelInPieces) -> str:
    return f"method blockwise cannot work on {type(pieces.model).__name__} (use --method admm):"


def _first_calls(pieces: ModelInPieces, ids: torch.Tensor) -> list[BlockCall]:
    calls: list[BlockCall] = []

    def visit(index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        if index != len(calls):
            raise ValueError(
                f"{_refusal(pieces)} {pieces.name(index)} is called after {len(calls)} other blocks"
            )
        for value in _values(call):
            if not _plain(value):
                raise ValueError(
                    f"{_refusal(pieces)} {pieces.name(index)} takes a {type(value).__name__}, expected "
                    "tensors and plain values"
                )
        kind = pieces.class_of(index)
        if kind not in pieces.returns:
            pieces.returns[kind] = _returned(pieces, index, hidden, call)
        calls.append(call)
        return hidden

    with pieces.visited(visit):
        pieces.run(ids)
    if len(calls) != len(pieces):
        raise ValueError(f"{_refusal(pieces)} it calls {len(calls)} of its {len(pieces)} blocks")
    return calls


def _returned(
    pieces: ModelInPieces, index: int, hidden: torch.Tensor, call: BlockCall
) -> tuple[Any, ...] | None:
    """Run a block, and return what it returns after the hidden state."""
    block = pieces.load_block(index)
    arguments = {**call.named, **({call.keyword: hidden} if call.keyword else {})}
    positional = call.positional if call.keyword else (hidden, *call.positional)
    with torch.no_grad():
        output = block(*positional, **arguments)
    state, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
    if not isinstance(state, torch.Tensor) or state.shape != hidden.shape or state.dtype != hidden.dtype:
        got = list(state.shape) if isinstance(state, torch.Tensor) else type(state).__name__
        raise ValueError(
            f"{_refusal(pieces)} {pieces.name(index)} must return a hidden state {list(hidden.shape)} first, "
            f"got {got}"
        )
    return rest


def _drop_returns(pieces: ModelInPieces, ids: torch.Tensor) -> None:
    """Let blocks return nothing after the hidden state, such as attention weights that nobody reads.

    Raises:
        ValueError: it changes what other blocks or the head get.
    """
    full = dict(pieces.returns)
    empty = {kind: None if rest is None else (None,) * len(rest) for kind, rest in full.items()}
    if full == empty:
        return
    found = []
    for returns in (full, empty):
        pieces.returns = dict(returns)
        calls: list[Any] = []

        def visit(
            index: int, hidden: torch.Tensor, call: BlockCall, calls: list[Any] = calls
        ) -> torch.Tensor:
            calls.append(_values(call))
            return hidden

        with pieces.visited(visit):
            found.append([*calls, pieces.run(ids)])
    if not _equal(*found):
        raise ValueError(f"{_refusal(pieces)} its blocks return more than a hidden state")


def _calls(pieces: ModelInPieces, ids: torch.Tensor, *, factor: float) -> list[BlockCall]:
    calls: list[BlockCall] = []

    def visit(index: int, hidden: torch.Tensor, call: BlockCall) -> torch.Tensor:
        calls.append(call)
        return hidden * factor

    with pieces.visited(visit):
        pieces.run(ids)
    return calls


def _values(call: BlockCall) -> list[Any]:
    return [*call.positional, *(call.named[name] for name in sorted(call.named))]


def _plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_plain, value))
    return value is None or isinstance(value, (torch.Tensor, bool, int, float, str))


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)
