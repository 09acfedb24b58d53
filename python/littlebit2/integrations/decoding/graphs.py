"""CUDA graphs captured by hand."""

from __future__ import annotations

from collections.abc import Callable

import torch

__all__ = ["capture"]

#: Runs before a capture: kernels load, libraries choose theirs, workspaces are allocated.
_WARM_UPS = 3


def capture(run: Callable[[], None], restore: Callable[[], None]) -> Callable[[], None]:
    """Capture ``run`` on the current CUDA device.

    Args:
        run: work on tensors at fixed addresses; called several times, and once more while capturing, when its
            kernels do not run.
        restore: undoes what a run did, so that the next one finds what the first one found.

    Returns:
        What replays it. It keeps alive what was captured.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            run()
            restore()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
