"""Single-stage layers in the names of docs/format.md: ``V_packed``, ``u1``, ``v2`` and no second stage.

No checkpoint of OneBit's authors was at hand: tensors under other names are not recognized.
"""

from __future__ import annotations

from collections.abc import Collection

from .layout import Layout
from .littlebit2 import has_signs

__all__ = ["OneBit"]

#: What only a second stage has.
_SECOND_STAGE = ("U_", "latent_scale", "v1", "u2")


class OneBit(Layout):
    """A sign matrix ``[N, K]`` and two scale vectors."""

    name = "onebit"
    two_stage = False
    ours = True

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`."""
        return has_signs(leaves) and not any(leaf.startswith(_SECOND_STAGE) for leaf in leaves)
