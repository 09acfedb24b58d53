"""``littlebit2`` with FSDP on the CPU, which torch has and accelerate only enables on accelerators."""

from __future__ import annotations

import sys
from typing import Any

from accelerate import state
from accelerate.utils import DistributedType

_original = state.AcceleratorState.__init__


def _init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
    first = not state.AcceleratorState._shared_state
    _original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if first and fsdp_plugin is not None:
        self.distributed_type = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


if __name__ == "__main__":
    state.AcceleratorState.__init__ = _init
    from littlebit2.cli import main

    sys.exit(main(sys.argv[1:]))
