"""transformers knows packed models in every test here, whichever of them runs first or alone."""

from __future__ import annotations

import littlebit2

littlebit2.register()
