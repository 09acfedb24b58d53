"""Exact coordinate descent on the signs of one factor, everything else held fixed."""

from __future__ import annotations

import torch

__all__ = ["descend"]

#: Latents whose couplings are kept up to date one by one; between blocks a matrix product does it.
_BLOCK = 32


def descend(signs: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> None:
    """Set every sign to its best value given all others, latent after latent, in place.

    For each column ``s`` of ``signs`` this lowers ``s^T gram s - 2 s^T wanted``: the best value of ``s_r``
    is the sign of ``wanted_r - sum_{q != r} gram_rq s_q``. The columns do not see each other and are done at
    once.

    Args:
        signs: ``[R, c]``, entries 1 and -1.
        wanted: ``[R, c]``.
        gram: ``[R, R]``, symmetric.
    """
    diagonal = gram.diagonal().tolist()
    one = signs.new_ones(())
    for start in range(0, signs.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        coupling = gram[block, block]
        mine = signs[block]
        pull = torch.addmm(wanted[block], gram[block], signs, alpha=-1)
        for i in range(mine.shape[0]):
            before = mine[i].clone()
            # Its own part comes out of the pull again; what is exactly balanced becomes +1.
            best = torch.add(pull[i], before, alpha=diagonal[start + i]).add_(0.0)
            torch.copysign(one, best, out=mine[i])
            pull[i + 1 :].addr_(coupling[i + 1 :, i], before.sub_(mine[i]))
