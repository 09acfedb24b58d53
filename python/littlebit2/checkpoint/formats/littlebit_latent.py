"""The LittleBit authors' unpacked layout: float latents ``U``, ``V`` beside their scales."""

from __future__ import annotations

from collections.abc import Collection

from .layout import Layout

__all__ = ["LittleBitLatent"]


class LittleBitLatent(Layout):
    """Latents as training leaves them; only their signs count, with ``sign(0) = +1``."""

    name = "littlebit-latent"
    implied_share = True
    settings_file = "littlebit_config.json"

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`."""
        return "U" in leaves and "V" in leaves and ("u1" in leaves or "v2" in leaves)

    def latent(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.latent`."""
        return True
