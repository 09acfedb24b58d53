"""What several modules say in the same words; needs no other package."""

import re
from importlib.util import find_spec
from pathlib import Path

__all__ = ["EXTRAS", "SettingError", "hub_hint", "missing_package", "require"]

#: Packages that are not always installed, and the extra of this package that installs them.
EXTRAS = {
    "accelerate": "train",
    "matplotlib": "plot",
    "peft": "train",
    "pyarrow": "train",
    "shtab": "completion",
    "tensorboard": "train",
    "transformers": "models",
    "triton": "triton",
}


class SettingError(ValueError):
    """An argument is wrong whatever else is given: on a command line, wrong usage."""


#: ``organization/model``, as hubs name models.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def hub_hint(path: str | Path) -> str:
    """Return what to add where a path that is not there may be meant as the name of a model on a hub."""
    if not _HUB_ID.fullmatch(str(path)):
        return ""
    return f". Nothing is downloaded: if {path} is a model of a hub, download it first (hf download {path})"


def missing_package(error: BaseException) -> str | None:
    """Return what to say of a package that is not installed, ``None`` for any other error."""
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    if package not in EXTRAS:
        return None
    return f"{package} is not installed; pip install 'littlebit2-kernels[{EXTRAS[package]}]'"


def require(package: str) -> None:
    """Raise ``ModuleNotFoundError`` that names the extra, unless an optional package is installed."""
    if find_spec(package) is None:
        error = ModuleNotFoundError(name=package)
        raise ModuleNotFoundError(missing_package(error), name=package)
