"""What the documentation names exists: commands, options, files, links. Pages are short and up to date."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.commands import COMMANDS
from tests.harness.scripts import load_script

ROOT = Path(__file__).resolve().parents[2]
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text("utf-8")
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    )
}
GENERATED = {"docs/models.md"}
#: Pages of kernels and figures, which have a share of their own of the lines that all pages may have.
KERNELS = {"docs/cuda.md", "docs/dispatch.md", "docs/kernels.md", "docs/performance.md"}
MAX_LINES = 1260
MAX_KERNEL_LINES = 445
MAX_WIDTH = 140

#: Wording that is not English an engineer of the field would write, and what is.
WORDING = {
    r"who may know whom": "module boundaries",
    r"nobody vouches for": "untrusted",
    r"unpack(ing)? for a library": "dequantize",
    r"torch's products|a library's products": "torch.matmul, cuBLAS",
    r"the way of one call": "call path",
    r"in words that name": "with the name of",
    r"is at home|at hand to run": "runs, is available",
}


def of_page(text: str) -> str:
    """The text of a page without the output and code of other languages in fences."""
    return re.sub(r"```(text|json|cmake)[^`]*```", "", text)


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[page])
    for link in links:
        if link.startswith("http"):
            continue
        target, _, anchor = link.partition("#")
        path = ((ROOT / page).parent / target).resolve() if target else ROOT / page
        assert path.exists(), f"{page} links to {link}"
        # Sphinx looks at anchors between the pages of docs/ (make docs), not at those of other pages.
        inside = page.startswith("docs/") and path.parent.name in ("docs", "api")
        if anchor and path.suffix == ".md" and not inside:
            assert anchor in anchors(path.read_text("utf-8")), f"{page} links to {link}"


@pytest.mark.parametrize("page", PAGES)
def test_files_that_are_named_exist(page: str) -> None:
    named = re.findall(
        r"(?<![\w./<])(?:tests|csrc|benchmarks|examples|cmake|\.ci)/[\w./*-]+\w", of_page(PAGES[page])
    )
    for name in named:
        found = list(ROOT.glob(name)) or list(ROOT.glob(name + "*"))
        assert found, f"{page} names {name}"


def parsers() -> dict[str, argparse.ArgumentParser]:
    """The parser of each subcommand of the command line."""
    from littlebit2 import cli

    parser = cli.build_parser()
    (subparsers,) = (
        action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return dict(subparsers)


def command_lines(text: str, program: str) -> Iterator[list[str]]:
    """The words of every call of ``program`` in code, up to a comment or the end of the code."""
    code = re.findall(r"`([^`]+)`|^    (.+)$|^(littlebit2 .+)$", re.sub(r"```\w*", "", text), re.MULTILINE)
    for parts in code:
        for line in "".join(parts).replace("\n", " ").split("#")[0].split("&&"):
            match = re.search(rf"(?:^|\s){program}\s+(.+)", line)
            if match:
                yield match[1].split()


@pytest.mark.parametrize("page", PAGES)
def test_commands_have_the_options_that_are_named(page: str) -> None:
    subcommands = parsers()
    for words in command_lines(PAGES[page], "littlebit2"):
        if words[0].isupper() or words[0].startswith("-"):
            continue
        assert words[0] in subcommands, f"{page} calls littlebit2 {words[0]}"
        known = subcommands[words[0]]._option_string_actions
        options = [word.split("=")[0].rstrip(",.") for word in words if word.startswith("--")]
        unknown = [option for option in options if option not in known and option != "--distill-"]
        assert not unknown, f"{page}: littlebit2 {' '.join(words)}"


@pytest.mark.parametrize("page", PAGES)
def test_benchmarks_and_targets_exist(page: str) -> None:
    for words in command_lines(PAGES[page], r"python3? -m benchmarks"):
        assert words[0].isupper() or words[0] in COMMANDS, f"{page} calls python -m benchmarks {words[0]}"
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    for words in command_lines(PAGES[page], "make"):
        if re.fullmatch(r"[a-z-]+", words[0]):
            assert words[0] in targets, f"{page} calls make {words[0]}"


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/")])
def test_page_opens_with_what_it_is_for(page: str) -> None:
    title, _, rest = PAGES[page].partition("\n")
    assert title.startswith("# ")
    assert rest.lstrip().startswith("This page ")


@pytest.mark.parametrize("page", [page for page in PAGES if page not in GENERATED])
def test_wording(page: str) -> None:
    flat = " ".join(PAGES[page].split())
    for pattern, better in WORDING.items():
        match = re.search(pattern, flat)
        assert match is None, f"{page} has {match and match[0]!r}: write {better}"
    long = [
        line
        for line in PAGES[page].splitlines()
        if len(line) > MAX_WIDTH and not line.startswith(("|", "    "))
    ]
    assert not long, long


def test_hand_written_pages_are_short() -> None:
    own = {
        page: len(text.splitlines())
        for page, text in PAGES.items()
        if page.startswith("docs/") and page not in GENERATED
    }
    assert sum(own.values()) <= MAX_LINES, own
    assert sum(own[page] for page in KERNELS) <= MAX_KERNEL_LINES, own
    assert len(PAGES["README.md"].splitlines()) <= 120
    assert len(PAGES["CONTRIBUTING.md"].splitlines()) <= 120


@pytest.fixture
def api_reference(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load_script(ROOT / ".ci/api_reference.py", monkeypatch)


def test_api_pages_are_those_of_the_docstrings(api_reference: ModuleType) -> None:
    for path, text in api_reference.pages().items():
        assert path.read_text("utf-8") == text, (
            f"{path.relative_to(ROOT)} is out of date: run python .ci/api_reference.py"
        )


def test_api_pages_turn_docstrings_into_markdown(api_reference: ModuleType) -> None:
    docstring = (
        "Do it, as :func:`~a.b.other` and :class:`.Thing` do.\n\n"
        "Args:\n    x: ``[M, K]``,\n        two lines.\n    y: another.\n\nReturns:\n    What ``x`` gives."
    )
    assert "\n".join(api_reference.markdown(docstring)).split("\n") == [
        "Do it, as `other` and `Thing` do.",
        "",
        "**Args**",
        "",
        "- `x`: `[M, K]`, two lines.",
        "- `y`: another.",
        "",
        "**Returns**",
        "",
        "What `x` gives.",
        "",
    ]
