"""The LittleBit authors' packed layout, and the settings that their code writes beside it.

``U_packed``, ``V_packed`` beside ``u1``, ``u2``, ``v1``, ``v2``, each ``[1, size]``. Matrices of a residual
path carry its suffix before the kind (``U_R_packed``), scales at the end (``u1_R``); see docs/checkpoints.md.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from littlebit2_kernels.state import path_suffix, portable_name

from .layout import Layout
from .littlebit2 import has_signs

__all__ = ["KEPT_SETTINGS", "SETTINGS", "LittleBit", "authors_leaf", "authors_settings"]

#: Fields of the authors' littlebit_config.json; older checkpoints hold the first four in config.json.
SETTINGS = (
    "quant_func",
    "eff_bit",
    "split_dim",
    "residual",
    "kv_factor",
    "min_split_dim",
    "use_itq",
    "itq_n_iter",
)
#: Key of our config.json under which the authors' settings survive a conversion.
KEPT_SETTINGS = "littlebit_settings"


class LittleBit(Layout):
    """The authors' packed tensors."""

    name = "littlebit"
    ours = True  # a checkpoint of ours may keep v1 and u2 apart
    implied_share = True
    settings_file = "littlebit_config.json"

    def claims(self, leaves: Collection[str]) -> bool:
        """See :meth:`.Layout.claims`."""
        if any(portable_name(leaf) != leaf for leaf in leaves):
            return True
        return has_signs(leaves) and ("v1" in leaves or "u2" in leaves)

    def rename(self, leaf: str) -> str:
        """See :meth:`.Layout.rename`."""
        return portable_name(leaf)


def authors_leaf(matrix: str, path: int, kind: str) -> str:
    """Return the authors' name of a sign matrix, for example ``U_R_packed``.

    Args:
        matrix: ``"U"`` or ``"V"``.
        path: index of the path.
        kind: ``"packed"`` or ``"shape"``.
    """
    return f"{matrix}{path_suffix(path)}_{kind}"


def authors_settings(config: Mapping[str, Any], littlebit_config: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the authors' settings, with their file under ``source``; empty where there are none."""
    kept = config.get(KEPT_SETTINGS)
    places: list[tuple[str, Mapping[str, Any]]] = []
    if littlebit_config is not None:
        places.append(("littlebit_config.json", littlebit_config))
    if isinstance(kept, dict):
        places.append(("config.json", kept))
    places.append(("config.json", {key: config[key] for key in SETTINGS if key in config}))
    for source, settings in places:
        if settings:
            return {**settings, "source": source}
    return {}
