"""This project's layout (docs/format.md): ``U_packed``, ``V_packed`` beside ``latent_scale``."""

from __future__ import annotations

import re
from collections.abc import Collection

from .layout import Layout

__all__ = ["LittleBit2", "has_signs"]

_SIGNS = re.compile(r"[UV]_packed(_R\d*)?|V_shared(_R\d*)?")


def has_signs(leaves: Collection[str]) -> bool:
    """Whether there is a packed sign matrix, or a path that shares one, under the names of docs/format.md."""
    return any(_SIGNS.fullmatch(leaf) for leaf in leaves)


class LittleBit2(Layout):
    """Ours, two stages. Takes every layer with our sign matrices that no other layout has claimed."""

    name = "littlebit2"
    ours = True

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`."""
        return has_signs(leaves)
