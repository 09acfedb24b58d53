"""Whether a call may be computed together with others: of the module, and of its input."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad

__all__ = ["is_called_plainly", "needs_own_call"]


def is_called_plainly(module: nn.Module) -> bool:
    """Whether a call of ``module`` is one of its class's ``forward`` and nothing else: no hook, no patch."""
    # A step asks this a dozen times a layer, and attributes of modules are twice as slow.
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or "forward" in state
        or state.get("_compiled_call_impl") is not None
    )


def needs_own_call(x: Any) -> bool:
    """Whether a call with ``x`` has to be the module's own: gradients, autocast, other kinds of tensors."""
    # A step asks this some hundred times: what costs least comes first.
    compiling = torch.compiler.is_compiling()
    # Subclasses, and tensors of transforms, mean something else by the same object.
    if compiling:
        if not isinstance(x, torch.Tensor):
            return True
    elif type(x) is not torch.Tensor and type(x) is not nn.Parameter:
        return True
    if torch.is_grad_enabled() and x.requires_grad:
        return True
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta" or torch.is_autocast_enabled(device):
        return True
    if compiling:
        return False
    return forward_ad._current_level >= 0 or torch._C._functorch.maybe_current_level() is not None
