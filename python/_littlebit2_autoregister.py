"""Makes transformers know packed checkpoints wherever this package is installed.

transformers skips a ``quant_method`` that nobody has registered: it warns, and leaves the packed layers
random. So ``littlebit2_autoregister.pth``, which lies beside this file in site-packages, puts a finder before
the others when an interpreter starts, and imports nothing. When transformers is looked for, that finder calls
:func:`install`, which puts another one in its place. This one steps in for two modules:

- ``transformers.quantizers.auto``: once it has run, stand-ins for our classes are registered.
- ``transformers.configuration_utils``: once it has run, ``PreTrainedConfig.get_config_dict`` looks whether a
  local directory holds packed layers that its config.json does not name.

The first packed checkpoint imports littlebit2, which registers its own classes. If that fails, loading the
checkpoint fails with the reason; other checkpoints load as always. ``LB2_NO_AUTOREGISTER=1`` switches that
off.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__all__ = ["AfterImport", "install"]

#: The entry of config.json by which transformers chooses a quantizer; HOME has the same.
METHOD = "littlebit2"
#: The module that registers the real classes when it is imported.
HOME = "littlebit2.integrations.transformers"

#: What says that a directory is packed in a layout of other people; HOME has the same names.
_SETTINGS_FILES = ("littlebit_config.json", "nanoquant_config.json")
_FOREIGN_METHODS = ("littlebit", "nanoquant")
#: Dtypes of safetensors that can hold packed words.
_INTEGERS = ("BOOL", "I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64")
#: How files of torch.save begin that a training leaves beside the weights.
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
#: Longest header of a safetensors file that the format allows.
_MAX_HEADER = 100_000_000


class AfterImport:
    """A finder that finds nothing itself: it has a function called with certain modules once they have run.

    Args:
        functions: the function for each full module name. What it raises becomes a warning.
    """

    def __init__(self, functions: Mapping[str, Callable[[Any], None]]) -> None:
        self.functions = functions
        self._busy: set[tuple[int, str]] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the finders behind find, with a loader that also calls the function."""
        if name not in self.functions:
            return None
        # A finder behind this one may start the whole search again, as hooks of other packages do.
        search = (threading.get_ident(), name)
        if search in self._busy:
            return None
        self._busy.add(search)
        try:
            spec = self._find(name, path, target)
        finally:
            self._busy.discard(search)
        loader = None if spec is None else spec.loader
        if spec is not None and loader is not None and hasattr(loader, "exec_module"):
            spec.loader = _Loader(loader, self.functions[name])  # type: ignore[assignment]
        return spec

    def _find(self, name: str, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        finders = list(sys.meta_path)
        behind = finders[finders.index(self) + 1 :] if self in finders else finders
        for finder in behind:
            find_spec = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = None if find_spec is None else find_spec(name, path, target)
            if spec is not None:
                return spec
        return None


class _Loader:
    """Loads a module by the loader that was found for it, and calls a function with it."""

    def __init__(self, loader: Any, function: Callable[[Any], None]) -> None:
        self.loader = loader
        self.function = function

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        create = getattr(self.loader, "create_module", None)
        module: ModuleType | None = None if create is None else create(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        # The module shows its own loader, to itself already.
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.loader.exec_module(module)
        _call(self.function, module)

    def __getattr__(self, name: str) -> Any:
        # get_source, is_package and so on, for a spec that is only looked at.
        if name == "loader":  # a copy that is being made has none yet
            raise AttributeError(name)
        return getattr(self.loader, name)


def _call(function: Callable[[Any], None], module: ModuleType) -> None:
    """Call the function; the import of a module of other people does not fail by it."""
    try:
        function(module)
    except Exception as error:
        _warn(
            f"littlebit2 could not step in after the import of {module.__name__} ({error!r}): call "
            "littlebit2.register() before packed checkpoints are loaded, or transformers may leave their "
            "layers random. LB2_NO_AUTOREGISTER=1 silences this"
        )


def _warn(message: str) -> None:
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:  # where warnings are errors, the import of other people's module still succeeds
        sys.stderr.write(f"RuntimeWarning: {message}\n")


def _register() -> None:
    """Import littlebit2 and register its classes.

    Raises:
        ImportError: that did not work.
    """
    try:
        importlib.import_module(HOME).register()
    except Exception as error:
        raise ImportError(
            "the checkpoint holds layers packed by littlebit2-kernels, which cannot be imported to load "
            f"them: {type(error).__name__}: {error}"
        ) from error


def _announce(auto: Any) -> None:
    """Register stand-ins in ``transformers.quantizers.auto``, until the first packed checkpoint."""
    configs, quantizers = auto.AUTO_QUANTIZATION_CONFIG_MAPPING, auto.AUTO_QUANTIZER_MAPPING

    def real(mapping: dict[str, Any], stand_in: type) -> Any:
        _register()
        found = mapping.get(METHOD)
        if found is None or found is stand_in:
            raise ImportError(f"importing {HOME} did not register {METHOD!r} in transformers")
        return found

    class LittleBit2Config:
        """Stands in for our class of this name until that is imported."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real(configs, cls)(*args, **kwargs)

        @classmethod
        def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
            return real(configs, cls).from_dict(*args, **kwargs)

    class LittleBit2Quantizer:
        """Stands in for our class of this name until that is imported."""

        def __new__(cls, *args: Any, **kwargs: Any) -> Any:
            return real(quantizers, cls)(*args, **kwargs)

    for mapping, stand_in in ((configs, LittleBit2Config), (quantizers, LittleBit2Quantizer)):
        # The sign by which littlebit2.register() replaces it.
        stand_in.is_stand_in = True  # type: ignore[attr-defined]
        mapping.setdefault(METHOD, stand_in)


def _watch(configuration_utils: Any) -> None:
    """Let ``get_config_dict`` import littlebit2 for a directory that may be packed as other people do it."""
    home = configuration_utils.PreTrainedConfig
    original = vars(home)["get_config_dict"].__func__

    @functools.wraps(original)
    def get_config_dict(cls: type, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        found = original(cls, pretrained_model_name_or_path, **kwargs)
        if not isinstance(pretrained_model_name_or_path, (str, os.PathLike)) or _wraps(home, get_config_dict):
            return found
        directory = os.fspath(pretrained_model_name_or_path)
        if kwargs.get("subfolder"):
            directory = os.path.join(directory, kwargs["subfolder"])
        config = found[0]
        if not config or not os.path.isdir(directory):
            return found
        entry = config.get("quantization_config")
        method = entry.get("quant_method") if isinstance(entry, dict) else None
        if entry is not None and method not in _FOREIGN_METHODS:
            return found
        integers = _integer_tensors(directory)
        said = entry is not None or _says_packed(directory, config, integers)
        if not said and not integers:
            return found
        try:
            _register()
        except ImportError as error:
            if said:
                raise
            _warn(f"whether {directory} holds packed layers was not checked ({error.__cause__!r})")
            return found
        return vars(home)["get_config_dict"].__func__(cls, pretrained_model_name_or_path, **kwargs)

    home.get_config_dict = classmethod(get_config_dict)  # type: ignore[arg-type]


def _wraps(home: Any, ours: Callable[..., Any]) -> bool:
    """Whether littlebit2 is registered, and so does the work of ``ours`` itself, in a wrapper above it."""
    current = vars(home)["get_config_dict"].__func__
    while current is not None and current is not ours:
        if hasattr(current, "_littlebit2_original"):
            return True
        current = getattr(current, "__wrapped__", None)
    return False


def _says_packed(directory: str, config: Mapping[str, Any], integers: set[str]) -> bool:
    """Whether a file, an entry or the name of a tensor says that the directory is packed."""
    files = any(os.path.isfile(os.path.join(directory, name)) for name in _SETTINGS_FILES)
    return (
        files
        or "quant_func" in config
        or any(name[:2] in ("U_", "V_") and "packed" in name for name in integers)
    )


def _integer_tensors(directory: str) -> set[str]:
    """Last parts of the names of integers, of which packed layers are made; littlebit2 says what they are."""
    found: set[str] = set()
    try:
        names = os.listdir(directory)
    except OSError:  # files may be readable where their folder is not
        return found
    shards = [name for name in names if name.endswith(".safetensors")]
    for name in shards:
        path = os.path.join(directory, name)
        try:
            status = os.stat(path)
        except OSError:  # gone, or a link to nothing
            continue
        found.update(_integers_of(path, status.st_mtime_ns, status.st_size))
    if not shards:  # files of torch.save cannot be looked into from here
        pickles = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        found.update(name for name in pickles if not name.startswith(_OF_TRAINING))
    return found


@functools.lru_cache(maxsize=256)
def _integers_of(path: str, modified: int, size: int) -> frozenset[str]:
    """The same of one file, whose header is read once while the file stays as it is."""
    return frozenset(
        tensor.rpartition(".")[2]
        for tensor, entry in _header(path).items()
        if isinstance(entry, dict) and entry.get("dtype") in _INTEGERS
    )


def _header(path: str) -> dict[str, Any]:
    """The header of a safetensors file; nothing of a damaged one, which is not for us to refuse."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size)) if size <= _MAX_HEADER else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


def install() -> None:
    """Put the finder in place; a further call does nothing. Modules that are loaded are served at once.

    Where transformers is being looked for, the search goes on with the finders behind.
    """
    if any(getattr(finder, "functions", None) is _FUNCTIONS for finder in sys.meta_path):
        return
    waiting = [i for i, finder in enumerate(sys.meta_path) if getattr(finder, "__name__", "") == _WAITING]
    # Replaced where it is, because importlib is walking through the list.
    place = slice(waiting[0], waiting[0] + 1) if waiting else slice(0, 0)
    sys.meta_path[place] = [AfterImport(_FUNCTIONS)]
    for name, function in _FUNCTIONS.items():
        module = sys.modules.get(name)
        if module is not None:
            _call(function, module)


#: The finder of the .pth file.
_WAITING = "LittleBit2Autoregister"
_FUNCTIONS: dict[str, Callable[[Any], None]] = {
    "transformers.configuration_utils": _watch,
    "transformers.quantizers.auto": _announce,
}
