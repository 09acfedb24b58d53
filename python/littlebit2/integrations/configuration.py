"""The ``quantization_config`` of our checkpoints, as transformers wants it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from littlebit2.architecture.typed import TypedLinear
from littlebit2.checkpoint import ColumnsSpec, LayerSpec, quantization_config
from littlebit2_kernels import FORMAT_VERSION, LittleBitLinear
from littlebit2_kernels.dispatch import BACKENDS, check_activation_mode

__all__ = ["METHOD", "LittleBit2Config"]

METHOD = "littlebit2"
#: Arguments that say how a model is loaded and run, and are not stored.
RUN_SETTINGS = ("backend", "activation", "prepack", "fuse", "source")
#: Entries that say which layers are packed and how.
STRUCTURE = ("ranks", "single_stage", "shares", "modules_to_not_convert", "salient_columns", "int8")
PACK = "i32-lsb-neg1"


class LittleBit2Config(QuantizationConfigMixin):
    """The ``quantization_config`` of a packed checkpoint (docs/checkpoints.md), and how to run it.

    Args:
        ranks: rank of every path of the two-stage layers, by module name.
        single_stage: names of the single-stage (OneBit-like) layers.
        shares: layers with shared first stages, or single-stage layers of several paths: for each path, the
            path whose first stage it uses.
        modules_to_not_convert: linear modules that stayed dense.
        format_version: version of the packed format.
        pack: name of the packing.
        salient_columns: number of dense columns of the layers that have some (:class:`.SalientLinear`); their
            packed part is the layer ``NAME.linear``.
        int8: names of the head and the embedding where they are in int8 rows.
        backend: backend for every layer, see :func:`littlebit2_kernels.littlebit_linear`; not stored.
        activation: likewise.
        prepack: whether layers on the CPU are brought to the kernels' layout while loading; not stored.
        fuse: whether norms, projections, MLPs and residuals are computed in fewer calls
            (:func:`littlebit2.fuse_projections`); not stored.
        source: directory of the checkpoint, where its files are not those that transformers finds; not
            stored.

    Raises:
        ValueError: the format is newer than this package, or an argument is unknown or malformed.
    """

    quant_method: Any

    def __init__(
        self,
        ranks: Mapping[str, Sequence[int]] | None = None,
        single_stage: Sequence[str] = (),
        shares: Mapping[str, Sequence[int]] | None = None,
        modules_to_not_convert: Sequence[str] | None = (),
        format_version: int = FORMAT_VERSION,
        pack: str = PACK,
        *,
        salient_columns: Mapping[str, int] | None = None,
        int8: Sequence[str] = (),
        quant_method: str = METHOD,
        backend: str = "auto",
        activation: str = "auto",
        prepack: bool = True,
        fuse: bool = True,
        source: str | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise ValueError(f"quantization_config has unknown entries: {', '.join(sorted(unknown))}")
        if quant_method != METHOD:
            raise ValueError(f"quant_method must be {METHOD!r}, got {quant_method!r}")
        if format_version != FORMAT_VERSION:
            raise ValueError(
                f"format_version must be {FORMAT_VERSION}, got {format_version!r}: "
                "the checkpoint needs another version of littlebit2"
            )
        if pack != PACK:
            raise ValueError(f"pack must be {PACK!r}, got {pack!r}")
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
        check_activation_mode(activation, backend, prepacked=True)
        self.quant_method = METHOD
        self.ranks = {name: list(values) for name, values in (ranks or {}).items()}
        self.single_stage = list(single_stage)
        self.shares = {name: list(values) for name, values in (shares or {}).items()}
        self.modules_to_not_convert = list(modules_to_not_convert or ())
        self.salient_columns = dict(salient_columns or {})
        self.int8 = list(int8)
        self.format_version = format_version
        self.pack = pack
        self.backend = backend
        self.activation = activation
        self.prepack = prepack
        self.fuse = fuse
        self.source = source

    @classmethod
    def from_layers(
        cls,
        layers: Mapping[str, LayerSpec],
        modules_to_not_convert: Sequence[str] = (),
        columns: Mapping[str, ColumnsSpec] | None = None,
        int8: Sequence[str] = (),
        **how: Any,
    ) -> LittleBit2Config:
        """Make the configuration of the given layers; ``how`` are the arguments that are not stored."""
        stored = quantization_config(layers.values(), modules_to_not_convert, (columns or {}).values(), int8)
        return cls(**stored, **how)

    def run_as(self, given: LittleBit2Config) -> LittleBit2Config:
        """Return this configuration of a checkpoint with the run settings of one that the caller gave.

        Raises:
            ValueError: ``given`` names layers, and not those of the checkpoint.
        """
        stored, wanted = self.to_dict(), given.to_dict()
        differing = [key for key in STRUCTURE if wanted.get(key) and wanted[key] != stored.get(key)]
        if differing:
            raise ValueError(
                f"quantization_config must leave {', '.join(differing)} out, or agree with the checkpoint, "
                f"got {wanted[differing[0]]!r:.200}"
            )
        return type(self)(**stored, **{name: getattr(given, name) for name in RUN_SETTINGS})

    @property
    def layer_names(self) -> tuple[str, ...]:
        """Names of all packed layers."""
        return (*self.ranks, *self.single_stage)

    def to_dict(self) -> dict[str, Any]:
        """Return what config.json holds."""
        return {
            "quant_method": self.quant_method,
            "format_version": self.format_version,
            "pack": self.pack,
            "ranks": {name: list(values) for name, values in self.ranks.items()},
            "single_stage": list(self.single_stage),
            "shares": {name: list(values) for name, values in self.shares.items()},
            "modules_to_not_convert": list(self.modules_to_not_convert),
            **({"salient_columns": dict(self.salient_columns)} if self.salient_columns else {}),
            **({"int8": list(self.int8)} if self.int8 else {}),
        }

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(self.to_dict().items())

    def make_layer(self, spec: LayerSpec, device: str, typed: bool = False) -> LittleBitLinear:
        """Return an all-zero layer of this configuration, ``typed`` if it is asked for a dtype."""
        return (TypedLinear if typed else LittleBitLinear)(
            spec.shape.in_features,
            spec.shape.out_features,
            spec.shape.ranks,
            spec.bias,
            shares=spec.shape.shares,
            backend=self.backend,
            activation=self.activation,
            device=device,
        )
