"""``python -m benchmarks gpu-suite`` as a script, from any folder and with nothing installed."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

if __name__ == "__main__":
    sys.path[:1] = [str(ROOT), str(ROOT / "python")]
    from benchmarks.__main__ import main

    sys.exit(main(["gpu-suite", *sys.argv[1:]]))
