"""Names of a package that are imported on first use (PEP 562)."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

from ._messages import missing_package

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
            message = missing_package(error)
            if message is None:
                raise
            raise ModuleNotFoundError(f"{package}.{name}: {message}", name=error.name) from error
        namespace[name] = value
        return value

    return get, lambda: sorted({*namespace, *namespace["__all__"]})
