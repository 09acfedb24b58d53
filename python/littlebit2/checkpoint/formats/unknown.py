"""Tensors that hold packed weights of some kind that is not read: they must never pass for dense ones."""

from __future__ import annotations

import re

import torch

from littlebit2.checkpoint.headers import TensorEntry

__all__ = ["looks_packed"]

#: Last parts of names that hold signs or packed bits in other people's code.
_PACKED = re.compile(
    r"(.*_)?(packed|qweight|qzeros|binary|signs?|bits?|bp|words?)(_.*)?|.*_(rt|1bit|int8|uint8|int4)",
    re.IGNORECASE,
)
#: Last parts of names of integers that are no weights: buffers of positions, lookups, masks and counts.
_INDICES = re.compile(
    r"(.*_)?(ids?|index|indexes|indices|idx|inds?|tid2eid|positions?|offsets?|lookup|table|map|mapping"
    r"|mask|bias|lengths?|sizes?|shapes?|counts?|counter|steps?|tracked|tokens?|labels?|order|perm|permutation)"
    r"(_.*)?",
    re.IGNORECASE,
)
#: Words of packed weights come in these; tables of indices are usually int64.
_WORDS = (torch.int8, torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64)
_INTEGERS = (*_WORDS, torch.int64, torch.bool)
#: A few integers are settings.
_FEWEST = 8


def looks_packed(leaf: str, entry: TensorEntry) -> bool:
    """Whether a tensor looks like packed weights.

    Args:
        leaf: the last part of its name.
        entry: what its file says of it.
    """
    if _PACKED.fullmatch(leaf) and entry.dtype in _INTEGERS and entry.numel > 1:
        return True
    return entry.dtype in _WORDS and entry.numel >= _FEWEST and not _INDICES.fullmatch(leaf)
