"""NanoQuant's layout: sign words packed like the authors', scales under other names.

``scale_pre`` is ``in_scale``, ``scale_post`` is ``out_scale``, and ``scale_mid``, where it is present, is
``latent_scale``. Sign matrices that NanoQuant has prepared for one of its kernels (``U_int8``, ...) are no
file format and are refused. Columns that stay dense (``salient_weight``) are those of :mod:`.columns`.
"""

from __future__ import annotations

import re
from collections.abc import Collection

from .layout import Layout

__all__ = ["NanoQuant"]

_NAMES = {"scale_pre": "v2", "scale_post": "u1", "scale_mid": "latent_scale"}
_PREPARED = re.compile(r"[UV]_(?!packed|shape|shared|R)\w+")


class NanoQuant(Layout):
    """NanoQuant, as it saves a model before it prepares it to run; ranks need not be multiples of 8."""

    name = "nanoquant"
    implied_scale = True
    settings_file = "nanoquant_config.json"

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`."""
        return not _NAMES.keys().isdisjoint(leaves) or any(_PREPARED.fullmatch(leaf) for leaf in leaves)

    def rename(self, leaf: str) -> str:
        """See :meth:`.Layout.rename`."""
        return _NAMES.get(leaf, leaf)

    def refusal(self, leaf: str) -> str:
        """See :meth:`.Layout.refusal`."""
        if _PREPARED.fullmatch(leaf) is None:
            return super().refusal(leaf)
        return (
            "is in the order of one of NanoQuant's kernels, which cannot be read: expected U_packed and "
            "V_packed, as NanoQuant saves a model before it prepares it to run"
        )

    def latent(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.latent`."""
        return "U" in leaves or "V" in leaves
