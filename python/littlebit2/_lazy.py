"""Names of a package that are imported on first use (PEP 562)."""

from __future__ import annotations

from importlib import import_module

# What typing has under this name; importing typing takes longer than all of this package.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

__all__ = ["import_on_use"]


def import_on_use(
    namespace: dict[str, Any], homes: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return ``__getattr__`` and ``__dir__`` of a package.

    Args:
        namespace: the package's ``globals()``, where names are kept once they have been imported.
        homes: for each public name the module that defines it, absolute or relative to the package.
    """
    package = namespace["__name__"]

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        try:
            value = getattr(import_module(homes[name], package), name)
        except ModuleNotFoundError as error:
            from ._messages import missing_package  # noqa: PLC0415  # only to explain an error

            message = missing_package(error)
            if message is None:
                raise
            raise ModuleNotFoundError(f"{package}.{name}: {message}", name=error.name) from error
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *namespace["__all__"]})
