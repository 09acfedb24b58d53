"""What commands do to transformers on first use, done beforehand: tests may run in any order, or alone."""

from __future__ import annotations

import transformers.processing_utils  # noqa: F401  # on first import, transformers replaces its own module

import littlebit2

littlebit2.register()
