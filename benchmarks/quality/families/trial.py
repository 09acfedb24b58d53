"""One model class: what of it is packed, whether that loads, and whether it computes the same."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import littlebit2
from littlebit2.quantize import QuantConfig

from .compare import dequantized, difference, outputs_of, packed_share
from .inputs import inputs_of
from .sizes import FILES
from .tiny import tiny_configs

__all__ = ["FAILED", "KINDS", "NOT_BUILT", "REFUSED", "WORKS", "OutOfTime", "Outcome", "try_type"]

#: Weights of the largest model that is tried.
MOST_WEIGHTS = 30e6
#: Relative difference of outputs that counts as a failure.
FAR = 1e-3
#: Magnitude below which the quantizer takes no matrix.
_SMALLEST = 2.0**-126
QUANT = QuantConfig(ranks=(16,), method="joint-itq", itq_iterations=1)

#: Works; refused before any work; no small dense model could be made (the type was not tried); wrong.
WORKS, REFUSED, NOT_BUILT, FAILED = KINDS = ("works", "refused", "not built", "FAILED")


@dataclass
class Outcome:
    """What became of one model type.

    Attributes:
        model: name of the class.
        model_type: of its configuration.
        kind: one of :data:`KINDS`.
        reason: for anything but the first.
        takes: what the class is fed with: ``text``, ``image``, ``audio``, ...
        packed: share of the parameters that is packed.
        compared: whether outputs were compared.
        not_compared: why not: what the model said of the inputs that were tried.
        seconds: CPU time.
        commit: of this project, at which it was tried.
    """

    model: str
    model_type: str
    kind: str
    reason: str = ""
    takes: list[str] = field(default_factory=list)
    packed: float = 0.0
    compared: bool = False
    not_compared: str = ""
    seconds: float = 0.0
    commit: str = ""


#: Further calls in 16 bits that show whether a model's outputs are always finite.
_CALLS = 2


class OutOfTime(BaseException):
    """A class took longer than it may. No ``Exception``, which the code of models catches."""


def try_type(model_type: str, names: Sequence[str], folder: Path, step: Callable[[str], None]) -> Outcome:
    """Try one model type.

    Args:
        model_type: of the configuration.
        names: of its model classes; the first that can be built is tried.
        folder: where files go.
        step: told what is done next.
    """
    outcome = Outcome(names[0], model_type, NOT_BUILT)
    try:
        outcome.takes = _modalities(getattr(transformers, names[0]))
        dense, inputs, outcome.not_compared = _dense_model(model_type, names, folder, step)
    except Exception as error:  # whatever the code of a family raises
        outcome.reason = _line(error)
        return outcome
    outcome.model, outcome.takes = type(dense).__name__, _modalities(type(dense))
    step("quantize")
    try:
        littlebit2.quantize_checkpoint(folder / "dense", folder / "files", QUANT, progress=False)
    except ValueError as error:
        outcome.kind, outcome.reason = REFUSED, _line(error, typed=False)
        return outcome
    except Exception as error:
        outcome.kind, outcome.reason = FAILED, "quantize: " + _line(error)
        return outcome
    doing = ""

    def note(what: str) -> None:
        nonlocal doing
        doing = what
        step(what)

    outcome.kind = FAILED
    try:
        models = _packed_models(dense, folder, note)
        if inputs is not None:
            outcome.reason = _disagreement(models, dense, inputs)
            note("bfloat16")
            outcome.reason = outcome.reason or _disagreement_in_16_bits(folder, inputs)
    except Exception as error:
        outcome.reason = f"{doing}: {_line(error)}"
        return outcome
    outcome.packed = packed_share(models["files"])
    if not outcome.packed:
        outcome.reason = outcome.reason or "nothing is packed"
    if not outcome.reason:
        outcome.kind, outcome.compared = WORKS, inputs is not None
    return outcome


def _modalities(kind: Any) -> list[str]:
    given = getattr(kind, "input_modalities", "text")
    return [given] if isinstance(given, str) else list(given)


def _dense_model(
    model_type: str, names: Sequence[str], folder: Path, step: Callable[[str], None]
) -> tuple[Any, Any, str]:
    """Save a small random model in ``folder / "dense"`` and load it from there.

    Of the configurations the first is taken whose model runs; the first that can be built if none does.

    Returns:
        The model, inputs that it takes or ``None``, and why there are none.

    Raises:
        Exception: no model can be built; that of the first class and configuration.
    """
    first: Exception | None = None
    for name in names:
        try:
            model, inputs, why = _first_that_runs(name, model_type, step)
        except Exception as error:
            first = first or error
            continue
        step("save of the dense model")
        _save(model, folder / "dense")
        step("load of the dense model")
        return littlebit2.load(folder / "dense", dtype=torch.float32), inputs, why
    assert first is not None  # there is at least one class
    raise first


def _save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    # Files that a class reads and does not write.
    for name, content in FILES.get(model.config.model_type, {}).items():
        torch.save(content, folder / name)


def _first_that_runs(name: str, model_type: str, step: Callable[[str], None]) -> tuple[Any, Any, str]:
    first: Exception | None = None
    built: tuple[Any, str] | None = None
    for config, last_resort in tiny_configs(model_type):
        if last_resort and built is not None:
            break
        step("build")
        try:
            model = _random_model(name, config)
        except Exception as error:
            first = first or error
            continue
        step("forward of the dense model")
        inputs, why = _working_inputs(model)
        if inputs is not None:
            return model, inputs, ""
        built = built or (model, why)
    if built is None:
        raise first or ValueError(f"{model_type} has no configuration")
    return built[0], None, built[1]


def _random_model(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    with torch.device("meta"):
        try:
            sizes = {name: p.numel() for name, p in kind(copy.deepcopy(config)).named_parameters()}
        except (RuntimeError, NotImplementedError):  # code that asks for values
            sizes = {}
    if sum(sizes.values()) > MOST_WEIGHTS:
        raise ValueError(
            f"its smallest configuration has {sum(sizes.values()) / 1e6:.0f} million weights, "
            f"{max(sizes.values()) / 1e6:.0f} million in {max(sizes, key=sizes.__getitem__)}"
        )
    model = kind(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.is_floating_point() or not parameter.numel():
                continue
            # Memory that no initialization has written to: no numbers, or such small ones as are refused.
            largest = float(parameter.abs().max())
            if not math.isfinite(largest) or 0 < largest < _SMALLEST:
                parameter.normal_(0, 0.02)
    return model


def _working_inputs(dense: Any) -> tuple[Any, str]:
    """Return the first inputs that the dense model takes, or ``None``, and what it says of the first."""
    why = ""
    for candidate in inputs_of(dense):
        try:
            if outputs_of(dense, candidate):
                return candidate, ""
        except Exception as error:
            why = why or f"{', '.join(candidate)}: {_line(error)}"
    return None, why or "no output"


def _packed_models(dense: Any, folder: Path, step: Callable[[str], None]) -> dict[str, Any]:
    """Do everything that can be done with a quantized checkpoint; return packed models by their origin."""
    step("load")
    first = littlebit2.load(folder / "files", dtype=torch.float32)
    step("save")
    _save(first, folder / "again")
    step("load what was saved")
    second = littlebit2.load(folder / "again", dtype=torch.float32)
    step("from_pretrained")
    type(first).from_pretrained(folder / "files")
    step("in memory")
    memory = copy.deepcopy(dense)
    quantize_in_memory(memory)
    step("save of what was quantized in memory")
    _save(memory, folder / "memory")
    step("load of what was quantized in memory")
    third = littlebit2.load(folder / "memory", dtype=torch.float32)
    step("forward")
    return {"files": first, "saved": second, "memory": third, "live": memory}


def _disagreement(models: dict[str, Any], dense: Any, inputs: Any) -> str:
    """Say which packed model is far from the dense one with its dequantized weights; empty if none is."""
    for what, packed in models.items():
        far = difference(outputs_of(dequantized(packed, dense), inputs), outputs_of(packed, inputs))
        if not far < FAR:
            return f"{what}: outputs differ by {far:.2g} from those of the dequantized model"
    return ""


def _disagreement_in_16_bits(folder: Path, inputs: Any) -> str:
    """Say where the packed model in bfloat16 gives other dtypes than the dense one, or no finite values.

    Empty if all is well, or if the dense model does not run in bfloat16 either. Values are not compared: what
    rounding makes of a random model's outputs says nothing.
    """
    lower = {name: value.bfloat16() if value.is_floating_point() else value for name, value in inputs.items()}
    dense = littlebit2.load(folder / "dense", dtype=torch.bfloat16)
    try:
        outputs_of(dense, lower)
    except Exception:  # whatever the code of a family raises
        return ""
    model = littlebit2.load(folder / "files", dtype=torch.bfloat16)
    packed = outputs_of(model, lower)
    # With the same weights: others may well overflow where those of the source do not.
    same = dequantized(model, dense)
    expected = outputs_of(same, lower)
    kinds = [[str(value.dtype) for value in values] for values in (expected, packed)]
    if kinds[0] != kinds[1]:
        return f"bfloat16: outputs are {', '.join(kinds[1])}, those of the dense model {', '.join(kinds[0])}"
    # Some families are finite in some calls only, of the same input: D-FINE.
    calls = [[packed, *(outputs_of(model, lower) for _ in range(_CALLS))]]
    calls += [[expected, *(outputs_of(same, lower) for _ in range(_CALLS))]]
    finite = [[all(value.isfinite().all() for value in values) for values in one] for one in calls]
    return "" if any(finite[0]) or not all(finite[1]) else "bfloat16: outputs are not finite"


def quantize_in_memory(model: Any) -> None:
    """Quantize a model in place, ready to be saved."""
    from littlebit2 import quantize_
    from littlebit2.integrations.transformers import attach

    quantize_(model, QUANT, progress=False)
    attach(model)


def _line(error: BaseException, *, typed: bool = True) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if typed else text
