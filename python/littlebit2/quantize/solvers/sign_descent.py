"""Exact coordinate descent on the signs of one factor, everything else held fixed."""

from __future__ import annotations

import torch

__all__ = ["descend"]

#: Latents whose couplings are kept up to date one by one; between blocks a matrix product does it.
_BLOCK = 32


def descend(signs: torch.Tensor, wanted: torch.Tensor, gram: torch.Tensor) -> None:
    """Set every sign to its best value given all others, latent after latent, in place.

    For each column ``s`` of ``signs`` this lowers ``s^T gram s - 2 s^T wanted``: the best value of ``s_r``
    is the sign of ``wanted_r - sum_{q != r} gram_rq s_q``. The columns, and the layers of the batch, do not
    see each other and are done at once.

    Args:
        signs: ``[B, R, c]``, entries 1 and -1.
        wanted: ``[B, R, c]``.
        gram: ``[B, R, R]``, symmetric.
    """
    diagonals = gram.diagonal(dim1=1, dim2=2).unsqueeze(2).unbind(1)  # [B, 1] each
    one, zero = signs.new_ones(()), signs.new_zeros(())  # made once: a number would be converted every time
    for start in range(0, signs.shape[1], _BLOCK):
        block = slice(start, start + _BLOCK)
        coupling = gram[:, block, block]
        pull = torch.baddbmm(wanted[:, block], gram[:, block], signs, alpha=-1)
        for i, (mine, mine_pull) in enumerate(zip(signs[:, block].unbind(1), pull.unbind(1), strict=True)):
            # Its own part comes out of the pull again; what is exactly balanced becomes +1.
            best = torch.addcmul(mine_pull, mine, diagonals[start + i]).add_(zero)
            best = torch.copysign(one, best)
            change = (mine - best).unsqueeze(1)
            mine.copy_(best)
            pull[:, i + 1 :].addcmul_(coupling[:, i + 1 :, i : i + 1], change)
