"""What lies beside the weights of a model: tokenizers, processors, templates, modules of a pipeline.

Everything is copied but weights and code, by no list of names: a file that a tokenizer or a pipeline looks
for and does not find is often not missed until results are wrong.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from littlebit2.disk import explain_errors

from .files import contained, is_weight_file

__all__ = ["SideFiles", "check_tokenizer", "copy_side_files", "find_side_files"]

#: Written anew for the layout of the copy.
_REWRITTEN = ("config.json", "littlebit_config.json", "nanoquant_config.json")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
#: Named like weights, but read by a model's own class: the voices of Qwen2.5-Omni.
_READ_BY_MODELS = ("spk_dict.pt",)
_CODE = (".py", ".pyc", ".pyd", ".so", ".sh")


@dataclass(frozen=True)
class SideFiles:
    """Files beside the weights of a model, by path relative to its directory, with ``/`` between folders.

    Attributes:
        copied: files that are copied.
        left: what is not, and why. The weights that are converted, and the files that are written anew, are
            in neither.
    """

    copied: tuple[str, ...]
    left: Mapping[str, str]


def find_side_files(source: Path) -> SideFiles:
    """Decide for everything in a model's directory whether it is copied.

    Not copied: weights (in the formats that are read, and others: ``.onnx``, ``.gguf``, ``.h5``, ...), except
    in the folders that ``modules.json`` names as modules of a sentence-transformers pipeline, and files that
    a model's class reads itself; code, which a copy could not vouch for; hidden files; and links to folders.

    Raises:
        CheckpointError: ``modules.json`` leads out of ``source``.
    """
    modules = _pipeline_folders(source)
    safetensors = any(path.name.endswith(".safetensors") for path in source.iterdir())
    copied: list[str] = []
    left: dict[str, str] = {}
    for path, name in _walk(source, left):
        inside = any(name.startswith(f"{folder}/") for folder in modules)
        if name in _REWRITTEN:
            continue
        if path.name.endswith(_CODE):
            left[name] = "code"
        elif is_weight_file(path.name) and not inside and name not in _READ_BY_MODELS:
            formats = (".safetensors", ".index.json") if safetensors else (".bin", ".pt", ".pth", ".json")
            if "/" in name or not path.name.endswith(formats):
                left[name] = "weights in another file than the model's"
        else:
            copied.append(name)
    return SideFiles(tuple(copied), left)


def copy_side_files(source: Path, target: Path) -> SideFiles:
    """Copy the files that :func:`find_side_files` finds.

    Raises:
        CheckpointError: a file leads out of ``source``.
        OSError: a file cannot be written; the message names it and the sizes.
    """
    found = find_side_files(source)
    for name in found.copied:
        folder, _, leaf = name.rpartition("/")
        path, out = contained(source / folder, leaf), target / name
        with explain_errors(out, path.stat().st_size):
            out.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, out)
    return found


def _walk(source: Path, left: dict[str, str]) -> Iterator[tuple[Path, str]]:
    """Every file, in the order of the names; what is not entered is noted in ``left``."""
    for folder, folders, files in os.walk(source):
        here = Path(folder)
        folders.sort()
        for name in list(folders):
            path = here / name
            if name.startswith(".") or path.is_symlink():
                folders.remove(name)
                left[path.relative_to(source).as_posix() + "/"] = "hidden" if name[0] == "." else "a link"
        for name in sorted(files):
            path = here / name
            relative = path.relative_to(source).as_posix()
            if name.startswith("."):
                left[relative] = "hidden"
            else:
                yield path, relative


def _pipeline_folders(source: Path) -> set[str]:
    """Folders of sentence-transformers' modules: their weights belong to no other model."""
    if not (source / "modules.json").is_file():
        return set()
    try:
        modules = json.loads(contained(source, "modules.json").read_text("utf-8"))
    except ValueError:
        return set()  # somebody else's file of this name
    listed = modules if isinstance(modules, list) else []
    paths = (module.get("path") for module in listed if isinstance(module, dict))
    return {folder for folder in paths if isinstance(folder, str) and folder}


def check_tokenizer(model_dir: Path) -> None:
    """Raise ``ValueError`` unless the files of a tokenizer lie in a model's directory.

    Without one of these, transformers may make a tokenizer that knows no word.
    """
    if not any((model_dir / name).is_file() for name in _TOKENIZERS):
        raise ValueError(f"{model_dir}: must hold a tokenizer, one of {', '.join(_TOKENIZERS)}")
