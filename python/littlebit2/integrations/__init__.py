"""Ties to model libraries. Each module imports its library at the top; import the one that is needed.

``littlebit2.register()`` makes transformers know our checkpoints, ``littlebit2.load`` and
``littlebit2.generate`` run them, ``littlebit2.synthesize`` makes random ones.
"""

from littlebit2._messages import require

require("transformers")
