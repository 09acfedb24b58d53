"""``python -m littlebit2``: the same as the command ``littlebit2``."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
