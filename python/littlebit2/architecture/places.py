"""Modules in the place of others, also where a model keeps them outside of its children.

Code of some families calls its layers through a list of its own (``self.layers = [linear, activation]``,
MaskFormer and its kin) and registers the same modules as children for their names. A module that is replaced
among the children alone would go on being called through the list, without values if it was built without.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["MODULE_STATE", "Places", "copy_hooks"]

#: What every ``nn.Module`` has of its own, children and tensors included.
MODULE_STATE = frozenset(vars(nn.Module()))
#: Where a module keeps what is called around its forward and backward calls.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Give ``target`` the hooks of the module whose place it takes.

    The same dictionaries: handles that the hooks' owners hold go on removing them.
    """
    vars(target).update({hooks: vars(source)[hooks] for hooks in _HOOKS})


class Places:
    """Where a model keeps its modules; looked for once, and followed by every :meth:`put`.

    Args:
        model: holds the modules.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        #: By module: modules that hold it in an attribute, and the attribute's name.
        self._kept: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for owner in model.modules():
            for attribute, value in vars(owner).items():
                if attribute not in MODULE_STATE:
                    for module in _modules_in(value, set()):
                        self._kept.setdefault(module, []).append((owner, attribute))

    def put(self, name: str, module: nn.Module) -> None:
        """Put ``module`` in the place of the module ``name``, and of its other references in the model.

        Attributes, lists, tuples and dictionaries are followed. A name that is new to its parent is added.

        Raises:
            AttributeError: the model has no parent of this name.
        """
        parent, _, leaf = name.rpartition(".")
        old = self._model.get_submodule(parent)._modules.get(leaf)
        self._model.set_submodule(name, module)
        if old is None or old not in self._kept:
            return
        kept = self._kept.pop(old)
        for owner, attribute in kept:
            vars(owner)[attribute] = _exchanged(vars(owner)[attribute], old, module)
        self._kept.setdefault(module, []).extend(kept)


def _modules_in(value: Any, seen: set[int]) -> Iterator[nn.Module]:
    """Yield the modules in nested containers; ``seen`` holds those that were looked into."""
    if isinstance(value, nn.Module):
        yield value
    elif isinstance(value, (list, tuple, dict)) and id(value) not in seen:
        seen.add(id(value))
        for one in value.values() if isinstance(value, dict) else value:
            yield from _modules_in(one, seen)


def _exchanged(value: Any, old: nn.Module, new: nn.Module, within: tuple[int, ...] = ()) -> Any:
    """Return ``value`` with ``new`` for ``old``; lists and dictionaries change in place."""
    if value is old:
        return new
    if not isinstance(value, (list, tuple, dict)) or id(value) in within:
        return value
    inside = (*within, id(value))
    if isinstance(value, dict):
        value.update({key: _exchanged(one, old, new, inside) for key, one in value.items()})
        return value
    changed = [_exchanged(one, old, new, inside) for one in value]
    if isinstance(value, list):
        value[:] = changed
        return value
    # A tuple, perhaps one with names for its fields.
    return type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
