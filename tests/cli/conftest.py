"""transformers knows packed models in every test here: commands that load one register with it."""

from __future__ import annotations

import littlebit2

littlebit2.register()
