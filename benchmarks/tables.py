"""Rows as a markdown table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.markdown import markdown
from benchmarks.records import Document, Row

__all__ = ["describe_environment", "rows_table"]


def rows_table(rows: Iterable[Row]) -> str:
    """Medians with their quartiles; ratios are medians of the ratios within repetitions."""
    rows = list(rows)
    peers = list(dict.fromkeys(peer for row in rows for peer in row.speedups))
    checked = any(row.error is not None for row in rows)
    head = ["shape", "bpw", "M", "mode", "threads", "candidate", "us", "GMAC/s", "GB/s", "of floor"]
    head += ["error"] if checked else []
    head += [f"vs {peer}" for peer in peers]
    return markdown(head, [_cells(row, peers, checked) for row in rows])


def _cells(row: Row, peers: Sequence[str], checked: bool) -> list[str]:
    cells = [
        f"{row.in_features}->{row.out_features}",
        f"{row.bpw:g}",
        str(row.tokens),
        row.mode,
        str(row.threads or "-"),
        row.label,
        f"{row.median * 1e6:.4g} ({row.low * 1e6:.4g}-{row.high * 1e6:.4g})",
        f"{row.gmacs:.1f}",
        f"{row.gbs:.1f}",
        "" if row.floor_fraction is None else f"{row.floor_fraction:.0%}",
    ]
    if checked:
        over = row.error is not None and row.error_bound is not None and not row.error <= row.error_bound
        cells.append(("" if row.error is None else f"{row.error:.1e}") + (" > bound" if over else ""))
    for peer in peers:
        ratio = row.speedups.get(peer)
        cells.append("" if ratio is None else f"{ratio[0]:.3g}x ({ratio[1]:.3g}-{ratio[2]:.3g})")
    return cells


def describe_environment(document: Document) -> str:
    """What a reader needs to know about the circumstances, as lines of text."""
    about: dict[str, Any] = document.environment
    git = about.get("git") or {}
    commit = str(git.get("commit") or "unknown")[:12] + (" with local changes" if git.get("dirty") else "")
    variables = " ".join(f"{name}={value}" for name, value in about.get("variables", {}).items())
    versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
    return "\n".join(
        (
            f"{about.get('device')}, CPU kernels {about.get('isa')}, {about.get('platform')}",
            f"{versions}, commit {commit}, {about.get('date')}",
            f"threads {about.get('threads')} on processors {about.get('affinity')}; "
            f"{variables or 'no variables for pinning set'}; load average {about.get('load_average')}",
        )
    )
