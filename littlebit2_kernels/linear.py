"""``LittleBitLinear``: a packed layer as a drop-in ``torch.nn.Module``."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from .dispatch import BACKENDS, check_activation_mode, choose_for
from .format import LayerShape, PackedLinear, PackedPath, pitched_words, words_per_row
from .functional import check_x, may_prepack, run, run_prepacked
from .ops.operands import Operands
from .prepacked import PrepackedLinear, prepack
from .reference import dense_weight
from .state import (
    UPSTREAM_EXTRAS,
    load_latent_scale,
    load_scale,
    packed_from_state,
    packed_to_state,
    path_suffix,
    portable_name,
)

__all__ = ["LittleBitLinear"]

#: Devices whose kernels read rows of words fastest at multiples of 16 bytes.
_PITCHED_DEVICES = ("cuda",)

# Held while a module changes its layout, which takes milliseconds and happens once.
_prepacking = threading.RLock()


def _renew_lock() -> None:
    global _prepacking
    _prepacking = threading.RLock()


# A thread that held it does not exist in a forked child.
os.register_at_fork(after_in_child=_renew_lock)


class _Group(Protocol):
    """Layers that are computed together: ``littlebit2_kernels.LinearGroup``, which knows this module."""

    members: tuple[LittleBitLinear, ...]
    on_cpu: bool

    def take(self, member: LittleBitLinear, x: torch.Tensor) -> torch.Tensor | None: ...


class LittleBitLinear(nn.Module):
    """A linear layer held as packed signs and float32 scales.

    Its buffers are the portable tensors of docs/format.md (``V_packed``, ``U_packed``, ``u1``, ``v2``,
    ``latent_scale``, ...), so ``state_dict`` is the file format. ``load_state_dict`` also takes the
    authors' ``v1``/``u2`` pairs and half-precision scales. Scales stay float32 under ``.half()``
    and ``.to(dtype)``; the layer returns the dtype of its input, or autocast's where that is on. Weights
    are frozen, the input is differentiable. There is no ``weight`` attribute: see :meth:`dequantize`.

    On the CPU, the first eager call replaces the buffers by one in the layout that the kernels read fastest
    (:meth:`prepack_`), so the weights exist once. ``state_dict``, pickling, :meth:`packed` and reading a
    buffer by its portable name still give the portable tensors, as copies: what is written into those is
    lost (assigning a new tensor to the name is not). Loading, and moving to another device, bring the buffers
    back. Code that walks ``buffers()`` of two copies in step, such as averaging, needs ``auto_prepack=False``
    or both prepacked. Tracing keeps what it finds. Call :meth:`prepack_` (or the layer) once before
    ``torch.compile``: else the trace holds the slower kernels, with exact sums for every dtype. Call
    :meth:`unpack_` before ``torch.export``, whose file must hold the portable tensors. On a GPU, rows of
    words start at multiples of 16 bytes, with padding between them where the rank needs it; ``state_dict``
    has copies of those tensors without the padding.

    Args:
        in_features: K.
        out_features: N.
        ranks: rank of every path, or ``None`` for a single-stage (OneBit-like) layer.
        bias: whether the layer has a bias.
        shares: for each path, the path whose first stage (``V`` and ``in_scale``) it uses, itself by
            default. Only equal ranks can share.
        backend: backend of every call, see :func:`littlebit2_kernels.littlebit_linear`.
        activation: how activations enter the sums, see there too; an attribute that may be changed. Which
            backend and mode run: docs/dispatch.md.
        auto_prepack: whether CPU calls prepack the layer; an attribute that may be changed.
        device: where the (all-zero) buffers are made; ``"meta"`` for loading without a copy.

    Raises:
        TypeError: a dimension or rank is not an integer, or ``ranks`` no sequence.
        ValueError: a dimension or rank is out of range, ``shares`` is inconsistent, or ``backend`` or
            ``activation`` is unknown.
    """

    auto_prepack: bool
    #: Layers that are computed together with this one (:func:`littlebit2_kernels.fuse_linears`).
    _group: _Group | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        ranks: Sequence[int] | None,
        bias: bool = True,
        *,
        shares: Sequence[int] | None = None,
        backend: str = "auto",
        activation: str = "auto",
        auto_prepack: bool = True,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        shape = LayerShape(in_features, out_features, ranks, () if shares is None else shares)  # type: ignore[arg-type]
        packed = _zero_layer(shape, bias, device)
        self._set_packed(packed, backend, activation, auto_prepack)

    @classmethod
    def from_packed(
        cls,
        packed: PackedLinear,
        *,
        backend: str = "auto",
        activation: str = "auto",
        auto_prepack: bool = True,
    ) -> LittleBitLinear:
        """Wrap a packed layer.

        Contiguous tensors become the module's buffers without a copy (but words on a GPU that need room
        between their rows), so loading a ``state_dict`` into a module that has not been prepacked writes into
        ``packed`` too.

        Raises:
            TypeError: ``packed`` is not a :class:`PackedLinear`.
        """
        if not isinstance(packed, PackedLinear):
            raise TypeError(f"packed must be a PackedLinear, got {type(packed).__name__}")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set_packed(packed, backend, activation, auto_prepack)
        return module

    def _set_packed(self, packed: PackedLinear, backend: str, activation: str, auto_prepack: bool) -> None:
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        check_activation_mode(activation, backend, prepacked=True)
        self.activation = activation
        self.auto_prepack = auto_prepack
        self.backend = backend
        self.shape = packed.shape
        self.in_features = packed.in_features
        self.out_features = packed.out_features
        buffers = _portable_buffers(packed)
        self._portable_names = _shared(frozenset(buffers) - {"bias"})
        for name, tensor in buffers.items():
            self.register_buffer(name, None if tensor is None else _placed(tensor))
        own = [path_suffix(p) for p in range(len(packed.paths))]
        first = [path_suffix(source) for source in self.shape.shares]
        # Buffer names of each operand; buffers themselves may be replaced by .to() or loading.
        self._operand_names = _shared(
            tuple(
                None
                if packed.single_stage and name in ("U_packed", "latent_scale")
                else tuple(name + s for s in suffixes)
                for name, suffixes in (
                    ("V_packed", first),
                    ("U_packed", own),
                    ("v2", first),
                    ("latent_scale", own),
                    ("u1", own),
                )
            )
        )

    def prepack_(self) -> LittleBitLinear:
        """Replace the portable buffers by the CPU kernels' own layout, now instead of at the first call.

        Returns:
            The module.

        Raises:
            ValueError: the layer is not on the CPU.
            NativeLibraryError: the compiled library is missing.
        """
        # Not as inference tensors, which autograd could not save in a later call.
        with _prepacking, torch.inference_mode(False):
            if "prepacked" not in self._buffers:
                self._replace_layout({"prepacked": prepack(self.packed).layer})
        return self

    def unpack_(self) -> LittleBitLinear:
        """Undo :meth:`prepack_`: the portable tensors are buffers again. Returns the module."""
        with _prepacking, torch.inference_mode(False):
            if "prepacked" in self._buffers:
                self._replace_layout(_portable_buffers(self.packed))
        return self

    def _replace_layout(self, layout: dict[str, torch.Tensor | None]) -> None:
        # By assignment, never in place: a call on another thread finds either all of the old buffers or all
        # of the new ones, and a shallow copy of the module keeps its own.
        replaced = self._portable_names | {"prepacked"}
        others = {name: buffer for name, buffer in self._buffers.items() if name not in replaced}
        self._non_persistent_buffers_set = (self._non_persistent_buffers_set - replaced) | (
            {"prepacked"} & layout.keys()
        )
        self._buffers = {**layout, **others}

    def __setattr__(self, name: str, value: Any) -> None:
        # A new tensor for a portable name is a new layer: it must not be shadowed by the prepacked one.
        if name in self.__dict__.get("_portable_names", ()) and "prepacked" in self._buffers:
            self.unpack_()
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name in self.__dict__.get("_portable_names", ()) and "prepacked" in self._buffers:
            return packed_to_state(self.packed)[name]
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # Pickles hold the portable tensors: the prepacked layout is no file format.
        state = self.__dict__.copy()
        state.pop("_group", None)  # the other layers may stay behind
        if "prepacked" in self._buffers:
            others = {name: buffer for name, buffer in self._buffers.items() if name != "prepacked"}
            state["_buffers"] = {**_portable_buffers(self.packed), **others}
            state["_non_persistent_buffers_set"] = self._non_persistent_buffers_set - {"prepacked"}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._place_buffers()  # a file may be loaded to another device

    def _place_buffers(self) -> None:
        for name, tensor in self._buffers.items():
            if tensor is not None:
                self._buffers[name] = _placed(tensor)

    def __deepcopy__(self, memo: dict[int, Any]) -> LittleBitLinear:
        # Unlike a pickle, a copy keeps the layout.
        module = self.__class__.__new__(self.__class__)
        memo[id(self)] = module
        own = {name: value for name, value in self.__dict__.items() if name != "_group"}
        module.__setstate__(copy.deepcopy(own, memo))
        return module

    def _operands(self, buffers: dict[str, Any]) -> Operands:
        lists = [
            None if names is None else [buffers[name] for name in names] for names in self._operand_names
        ]
        return tuple(lists)  # type: ignore[return-value]

    @property
    def packed(self) -> PackedLinear:
        """The layer as a checked :class:`PackedLinear`: a view of the buffers, or a copy if prepacked."""
        # Another thread may prepack the layer meanwhile: one look at which buffers there are.
        buffers: dict[str, Any] = self._buffers
        if "prepacked" in buffers:
            return self._as_prepacked(buffers).unpack()
        v, u, in_scale, latent_scale, out_scale = self._operands(buffers)
        paths: list[PackedPath] = []
        for p, source in enumerate(self.shape.shares):
            paths.append(
                PackedPath(
                    v=v[p],
                    in_scale=in_scale[p].flatten() if source == p else paths[source].in_scale,
                    out_scale=out_scale[p].flatten(),
                    u=u[p] if u else None,
                    latent_scale=latent_scale[p].flatten() if latent_scale else None,
                )
            )
        return PackedLinear(tuple(paths), self.bias)

    def _as_prepacked(self, buffers: dict[str, Any]) -> PrepackedLinear:
        return PrepackedLinear(buffers["prepacked"], self.bias, self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, without padding between rows on a GPU."""
        tensors = (*self._buffers.values(), *self._parameters.values())
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``x`` ``[..., K]`` (float32, float16 or bfloat16) to ``[..., N]`` of the same dtype.

        Raises:
            TypeError, ValueError, BackendUnavailableError, NativeLibraryError: as
                :func:`littlebit2_kernels.littlebit_linear`.
        """
        buffers: dict[str, Any] = self._buffers
        layer = buffers.get("prepacked")
        group = self._group
        if group is not None and (layer is None or group.on_cpu):
            y = group.take(self, x)
            if y is not None:
                return y
        if layer is not None:
            # A bias that is to be trained is a parameter.
            bias = buffers["bias"] if "bias" in buffers else self._parameters["bias"]
            y = run_prepacked(x, layer, bias, self.shape, self.backend, self.activation)
            if y is not None:
                return y
        return self._general_forward(x)

    def _general_forward(self, x: torch.Tensor) -> torch.Tensor:
        buffers: dict[str, Any] = self._buffers
        layer = buffers.get("prepacked")
        check_x(x, self.shape, (buffers["u1"] if layer is None else layer).device)
        device_type = x.device.type
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            x = x.to(torch.get_autocast_dtype(device_type))
        prepacks = layer is None and self._may_prepack(x, buffers)
        prepacked = layer is not None or prepacks
        choice = choose_for(x, self.shape, self.backend, self.activation, prepacked)
        if prepacks and choice.backend == "cpu":
            with _prepacking:  # so that no other thread unpacks it again in between
                buffers = self.prepack_()._buffers
            layer = buffers["prepacked"]
        tensors = self._operands(buffers) if layer is None else layer
        return run(x, tensors, self.bias, self.shape, choice)

    def _may_prepack(self, x: torch.Tensor, buffers: dict[str, Any]) -> bool:
        return self.auto_prepack and may_prepack(x, (buffers[name] for name in self._portable_names))

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Return the dense weight ``[N, K]`` that the layer stands for; a new tensor on every call."""
        return dense_weight(self.packed, dtype)

    def extra_repr(self) -> str:
        """Sizes, and bits per weight: by the papers' count and as stored, without the bias."""
        shape = self.shape
        kind = "single_stage=True" if shape.ranks is None else f"ranks={list(shape.ranks)}"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, {kind}, "
            f"bias={self.bias is not None}, "
            f"counted_bpw={shape.counted_bpw:.3g}, stored_bpw={shape.stored_bpw:.3g}"
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> LittleBitLinear:
        # The prepacked layer stays where it is kept as it is: under a change of dtype, or share_memory(). Not
        # under one of device, or to_empty().
        probe = torch.arange(64, dtype=torch.uint8, device="cpu")
        result = fn(probe.clone())
        if result.device != probe.device or result.dtype != probe.dtype or not torch.equal(result, probe):
            self.unpack_()

        def keep_dtype(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            # Scales are float32 by format: follow a change of device, not one of dtype.
            return _placed(result if result.dtype == tensor.dtype else tensor.to(result.device))

        return super()._apply(keep_dtype, recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        buffers: dict[str, Any] = self._buffers
        if "prepacked" in buffers:
            state = packed_to_state(self._as_prepacked(buffers).unpack())
            destination.update({prefix + name: tensor for name, tensor in state.items() if name != "bias"})
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # On a GPU there may be room between the rows of words, which is no part of the format.
        for key in [prefix + name for name in self._portable_names if prefix + name in destination]:
            destination[key] = destination[key].contiguous()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Into a twin, whose buffers then take the place of this module's, all at once: a call on another
        # thread finds the layer as it was or as it is, and can prepack it only before or after. Buffers that
        # are not prepacked are the same tensors in both, and are written in place.
        with _prepacking:
            twin = copy.copy(self)  # portable
            twin._buffers = dict(twin._buffers)
            failed = len(error_msgs)
            twin._load_portable(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )
            if len(error_msgs) == failed:
                self._non_persistent_buffers_set = twin._non_persistent_buffers_set
                self._buffers = twin._buffers

    def _load_portable(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # Nothing is copied before everything that is there was checked, together with what is not: a bad file
        # leaves the layer as it was. Keys that are missing or unexpected are torch's to report.
        own = {prefix + name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        try:
            self._normalize(state_dict, prefix, own)
        except (KeyError, TypeError, ValueError) as error:
            error_msgs.append(str(error.args[0]))
            return
        merged = {key: state_dict.get(key, buffer) for key, buffer in own.items()}
        # On the meta device there is nothing to check, and nothing to spoil.
        if not any(tensor.is_meta for tensor in merged.values()):
            # The file and the layer may be on different devices; what is there decides where to look.
            device = next((state_dict[key].device for key in own if key in state_dict), None)
            try:
                on_device = {key: tensor.to(device) for key, tensor in merged.items()}
                mismatch = self._mismatch(packed_from_state(on_device, prefix))
            except (KeyError, TypeError, ValueError) as error:
                mismatch = str(error.args[0])
            if mismatch is not None:
                error_msgs.append(mismatch)
                return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._place_buffers()  # assign=True replaces the buffers by tensors as they are stored

    def _normalize(self, state_dict: dict[str, Any], prefix: str, own: dict[str, torch.Tensor]) -> None:
        """Bring stored entries to the names, dtypes and layout of the module's buffers, in place."""
        for name in UPSTREAM_EXTRAS:
            state_dict.pop(prefix + name, None)
        for key in [key for key in state_dict if key.startswith(prefix)]:
            ours = prefix + portable_name(key[len(prefix) :])
            if ours != key:
                if ours in state_dict:
                    raise ValueError(f"{ours} must not be stored twice, under its own and the authors' name")
                state_dict[ours] = state_dict.pop(key)
        for suffix in map(path_suffix, range(self.shape.num_paths)):
            pair = (f"{prefix}v1{suffix}", f"{prefix}u2{suffix}")
            if any(name in state_dict for name in pair):
                folded = load_latent_scale(state_dict, prefix, suffix)
                for name in pair:
                    del state_dict[name]
                state_dict[f"{prefix}latent_scale{suffix}"] = folded
        for key, buffer in own.items():
            stored = state_dict.get(key)
            if stored is None:
                continue
            if buffer.is_floating_point():
                scale = load_scale(key, stored)
                state_dict[key] = scale if buffer.dim() == 1 else scale.unsqueeze(0)
            elif isinstance(stored, torch.Tensor):
                state_dict[key] = stored.contiguous()
            else:
                raise TypeError(f"{key} must be a torch.Tensor, got {type(stored).__name__}")

    def _mismatch(self, loaded: PackedLinear) -> str | None:
        if loaded.shape == self.shape:
            return None
        return f"the layer must have the shape {self.shape}, got {loaded.shape}"


#: Names of buffers, one object for all layers of a structure: a model may have tens of thousands of layers.
_structures: dict[Any, Any] = {}


def _shared(names: Any) -> Any:
    return _structures.setdefault(names, names)


def _placed(tensor: torch.Tensor) -> torch.Tensor:
    """A buffer as the kernels of its device read it fastest."""
    is_words = type(tensor) is torch.Tensor and tensor.dtype == torch.int32 and tensor.dim() == 2
    return pitched_words(tensor) if is_words and tensor.device.type in _PITCHED_DEVICES else tensor


def _portable_buffers(packed: PackedLinear) -> dict[str, torch.Tensor | None]:
    """The layer's tensors by name, contiguous and each on memory of its own; ``bias`` last."""
    buffers: dict[str, torch.Tensor | None] = {}
    seen: set[int] = set()
    for name, tensor in packed_to_state(packed).items():
        # Buffers on one memory, say out_scale of two paths, would overwrite each other when loaded.
        # Fake and meta tensors have none.
        address = tensor.data_ptr() if type(tensor) is torch.Tensor and not tensor.is_meta else None
        buffers[name] = tensor.clone() if address in seen else tensor.contiguous()
        if address is not None:
            seen.add(address)
    buffers.setdefault("bias", None)
    return buffers


def _zero_layer(shape: LayerShape, bias: bool, device: torch.device | str | None) -> PackedLinear:
    """A layer of this shape whose signs are all +1 and whose scales are all zero."""

    def words(rows: int, cols: int) -> torch.Tensor:
        return torch.zeros(rows, words_per_row(cols), dtype=torch.int32, device=device)

    def scale(size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.float32, device=device)

    paths: list[PackedPath] = []
    for p, (rows, source) in enumerate(zip(shape.rows, shape.shares, strict=True)):
        shared = paths[source] if source < p else None
        paths.append(
            PackedPath(
                v=shared.v if shared else words(rows, shape.in_features),
                in_scale=shared.in_scale if shared else scale(shape.in_features),
                out_scale=scale(shape.out_features),
                u=None if shape.ranks is None else words(shape.out_features, rows),
                latent_scale=None if shape.ranks is None else scale(rows),
            )
        )
    return PackedLinear(tuple(paths), scale(shape.out_features) if bias else None)
