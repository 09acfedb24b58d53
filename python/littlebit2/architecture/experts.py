"""``LittleBitExperts``: the experts of a mixture as linear layers of their own, so that each can be packed.

Model libraries hold the experts of a layer as fused tensors, ``gate_up_proj [E, 2 I, H]`` and ``down_proj
[E, H, I]`` (or transposed). :func:`expand_experts` puts a module in their place whose children
``<i>.gate_proj``, ``<i>.up_proj`` and ``<i>.down_proj`` are ``nn.Linear`` modules on views of those tensors:
whatever quantizes, calibrates or loads linear layers then sees them under the names that checkpoints with one
tensor per expert use. Only experts that tokens are routed to are computed.

Modules are recognized by their tensors, not by their class (:func:`experts_layout`).
"""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .places import MODULE_STATE, Places
from .select import shared_parameters

__all__ = [
    "PROJECTION_NAMES",
    "Expert",
    "ExpertsLayout",
    "LittleBitExperts",
    "collapse_experts",
    "expand_experts",
    "experts_layout",
    "is_unknown_experts",
]

#: Children of an expert.
PROJECTION_NAMES = ("gate_proj", "up_proj", "down_proj")

#: Name of transformers' function for ``act_fn(gate) * up`` of gate and up side by side.
_PLAIN_GATE = "_default_apply_gate"


@dataclass(frozen=True)
class ExpertsLayout:
    """How a module holds its experts.

    Attributes:
        experts: E, those that have weights.
        hidden: H, the size of inputs and outputs.
        inner: I, between the projections.
        gated: whether there is a gate projection beside the up projection, fused with it.
        transposed: whether tensors are ``[E, in, out]``.
        interleaved: whether rows of gate and up projection alternate, instead of gate rows first.
        biased: whether the projections have biases.
        per_expert_inputs: whether ``forward`` takes ``[E * M, H]``, the inputs of one expert after the
            other (Llama 4), instead of inputs, expert indices and weights of every token.
    """

    experts: int
    hidden: int
    inner: int
    gated: bool
    transposed: bool
    interleaved: bool
    biased: bool
    per_expert_inputs: bool

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the children of every expert."""
        return PROJECTION_NAMES if self.gated else PROJECTION_NAMES[1:]

    @property
    def first(self) -> str:
        """Name of the parameter that holds the first stage."""
        return "gate_up_proj" if self.gated else "up_proj"

    def shape(self, projection: str) -> tuple[int, int]:
        """Return ``(K, N)`` of a projection."""
        return (self.inner, self.hidden) if projection == "down_proj" else (self.hidden, self.inner)

    def parameter(self, projection: str) -> str:
        """Return the name of the fused parameter that holds a projection."""
        return "down_proj" if projection == "down_proj" else self.first

    def rows(self, projection: str) -> slice:
        """Return which output rows of the fused parameter are those of a projection."""
        if projection == "down_proj" or not self.gated:
            return slice(None)
        gate = projection == "gate_proj"
        if self.interleaved:
            return slice(0 if gate else 1, None, 2)
        return slice(0, self.inner) if gate else slice(self.inner, None)

    def weight(self, fused: torch.Tensor, index: int, projection: str) -> torch.Tensor:
        """Return the weight ``[N, K]`` of one projection, a view of the fused tensor."""
        matrix = fused[index]
        return (matrix.T if self.transposed else matrix)[self.rows(projection)]

    def bias(self, fused: torch.Tensor, index: int, projection: str) -> torch.Tensor:
        """Return the bias ``[N]`` of one projection, a view of the fused tensor."""
        return fused[index][self.rows(projection)]


def experts_layout(module: nn.Module) -> ExpertsLayout | None:
    """Return how ``module`` holds experts, ``None`` if it does not, or in a way that is not known."""
    parameters = module._parameters
    down = parameters.get("down_proj")
    gated = parameters.get("gate_up_proj") is not None
    up = parameters.get("gate_up_proj" if gated else "up_proj")
    if up is None or down is None or up.dim() != 3 or down.dim() != 3:
        return None
    sides = 2 if gated else 1
    plain = up.shape[2] == down.shape[1] and up.shape[1] == sides * down.shape[2]
    transposed = up.shape[1] == down.shape[2] and up.shape[2] == sides * down.shape[1]
    if plain and transposed:
        transposed = bool(getattr(module, "is_transposed", False))
    if not (plain or transposed):
        return None
    arguments = _arguments(module)
    if len(arguments) not in (1, 3):
        return None
    biased = parameters.get("down_proj_bias") is not None
    return ExpertsLayout(
        experts=down.shape[0],
        hidden=down.shape[2] if transposed else down.shape[1],
        inner=down.shape[1] if transposed else down.shape[2],
        gated=gated,
        transposed=transposed,
        interleaved=not getattr(module, "is_concatenated", True),
        biased=biased,
        per_expert_inputs=len(arguments) == 1,
    )


def is_unknown_experts(module: nn.Module) -> bool:
    """Whether a module holds matrices of experts, to judge by its class, in a form that is not expanded.

    DBRX (``w1``, ``v1`` and ``w2`` of all experts in one matrix each) and JetMoE (one tensor for each stage,
    whose caller applies the activation) are such families.
    """
    matrices = any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))
    return matrices and "Expert" in type(module).__name__ and experts_layout(module) is None


def _arguments(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's own forward, under whatever wraps it."""
    return list(inspect.signature(inspect.unwrap(type(module).forward)).parameters)[1:]


@functools.cache
def _keep_from_dynamo() -> None:
    """Make the call of experts a graph break; only now, because this loads Dynamo, which takes seconds."""
    LittleBitExperts.forward = torch.compiler.disable(LittleBitExperts.forward)  # type: ignore[method-assign]


class Expert(nn.Module):
    """The projections of one expert; called by the module that holds it."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class LittleBitExperts(nn.Module):
    """Experts as children ``"0"``, ``"1"``, ..., each with its projections; see :func:`expand_experts`.

    Everything else of the fused module is taken over: activation, limits, norms after the experts, and
    ``_apply_gate``. Only the experts that occur in the indices are computed; there is one synchronization
    with the device per call. Under ``torch.compile`` the call is a graph break.

    Args:
        source: the fused module; kept, without its tensors, for its code.

    Raises:
        ValueError: ``source`` holds no experts, or in a way that is not known.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        layout = experts_layout(source)
        if layout is None:
            raise ValueError(
                "source must hold 3-D gate_up_proj (or up_proj) and down_proj of experts, got "
                f"{type(source).__name__}"
            )
        _keep_from_dynamo()
        for name, value in vars(source).items():
            if name not in MODULE_STATE:
                self.__dict__[name] = value
        self.layout = layout
        self.training = source.training
        self._source_class = type(source)
        self._index_name, self._weight_name = [*_arguments(source)[1:], "", ""][:2]
        fused = {layout.first, "down_proj", f"{layout.first}_bias", "down_proj_bias"}
        for name, parameter in source._parameters.items():
            if name not in fused:
                self.register_parameter(name, parameter)
        for name, buffer in source._buffers.items():
            self.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
        for name, child in source._modules.items():
            self.add_module(name, child)
        for index in range(layout.experts):
            expert = Expert()
            for projection in layout.projections:
                expert.add_module(projection, _view(source, layout, index, projection))
            self.add_module(str(index), expert)

    def expert(self, index: int) -> Expert:
        """Return one expert."""
        return self._modules[str(index)]  # type: ignore[return-value]

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
        **named: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted sum of the outputs of every token's experts.

        Args:
            hidden_states: ``[..., H]``, M tokens; where the source takes the inputs of each expert,
                ``[E * M, H]``, of which rows of zeros are not computed.
            top_k_index: ``[M, k]``, experts of every token; indices past the last expert add nothing, or
                the token itself where the source has an identity expert.
            top_k_weights: ``[M, k]``.
            **named: the last two under the names that the source gives them.

        Returns:
            The shape and dtype of ``hidden_states``.
        """
        if self.layout.per_expert_inputs:
            return self._sorted_forward(hidden_states)
        index = named.get(self._index_name, top_k_index)
        weights = named.get(self._weight_name, top_k_weights)
        if index is None or weights is None:
            raise TypeError(
                f"{self._index_name} and {self._weight_name} must be given: the experts of every token and "
                "their weights"
            )
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen = index.reshape(-1)
        order = torch.argsort(chosen, stable=True)
        tokens = torch.div(order, index.shape[-1], rounding_mode="floor")
        scale = weights.reshape(-1)[order].unsqueeze(-1)
        found, counted = torch.unique_consecutive(chosen[order], return_counts=True)
        experts, counts = found.tolist(), counted.tolist()
        if not hasattr(self, "identity_expert"):
            while experts and experts[-1] >= self.layout.experts:
                experts.pop()
                counts.pop()
        total = sum(counts)
        tokens = tokens[:total]
        # Gathered and summed in one call each: what is done for every expert is its own products.
        parts = [
            self._compute(expert, rows) if expert < self.layout.experts else rows
            for expert, rows in zip(experts, flat[tokens].split(counts), strict=True)
        ]
        output = torch.zeros_like(flat, dtype=torch.promote_types(flat.dtype, torch.float32))
        if parts:
            output.index_add_(0, tokens, (torch.cat(parts) * scale[:total]).to(output.dtype))
        return output.to(hidden_states.dtype).reshape(hidden_states.shape)

    def _sorted_forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        inputs = hidden_states.reshape(self.layout.experts, -1, self.layout.hidden)
        used = (inputs != 0).any(-1)
        output = torch.zeros_like(inputs)
        for expert in used.any(-1).nonzero().flatten().tolist():
            rows = used[expert].nonzero().flatten()
            output[expert, rows] = self._compute(expert, inputs[expert, rows])
        return output.reshape(-1, self.layout.hidden)

    def _compute(self, index: int, rows: torch.Tensor) -> torch.Tensor:
        expert = self.expert(index)
        inner = expert.up_proj(rows)
        inner = (
            self._gate(expert.gate_proj(rows), inner) if self.layout.gated else self._call("act_fn", inner)
        )
        output: torch.Tensor = expert.down_proj(inner)
        if getattr(self, "has_post_expert_norm", False):
            output = self._call("post_expert_norm", output)
        return output

    def _call(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Call a module or function of the source."""
        function: Any = getattr(self, name)
        y: torch.Tensor = function(x)
        return y

    def _gate(self, gate: torch.Tensor, up: torch.Tensor) -> Any:
        apply: Any = getattr(self._source_class, "_apply_gate", None)
        if apply is None or (apply.__name__ == _PLAIN_GATE and not self.layout.interleaved):
            return self._call("act_fn", gate) * up
        if self.layout.interleaved:
            return apply(self, torch.stack((gate, up), -1).flatten(-2))
        return apply(self, torch.cat((gate, up), -1))

    def fused(self) -> nn.Module:
        """Return the fused module again, with the weights that the children have now.

        Raises:
            TypeError: a child is no ``nn.Linear``.
        """
        layout = self.layout
        module = self._source_class.__new__(self._source_class)
        nn.Module.__init__(module)
        for name, value in vars(self).items():
            if name not in MODULE_STATE and name not in _OWN:
                module.__dict__[name] = value
        for name in (layout.first, "down_proj"):
            weights, biases = self._gathered(name)
            module.register_parameter(name, nn.Parameter(weights, requires_grad=self._trainable(name)))
            if layout.biased:
                module.register_parameter(
                    f"{name}_bias", nn.Parameter(biases, requires_grad=self._trainable(name))
                )
        for name, parameter in self._parameters.items():
            module.register_parameter(name, parameter)
        for name, buffer in self._buffers.items():
            module.register_buffer(name, buffer, persistent=name not in self._non_persistent_buffers_set)
        for name, child in self._modules.items():
            if not isinstance(child, Expert):
                module.add_module(name, child)
        module.train(self.training)
        return module

    def _trainable(self, name: str) -> bool:
        children = [p for p in self.layout.projections if self.layout.parameter(p) == name]
        return any(getattr(self.expert(0), child).weight.requires_grad for child in children)

    def _gathered(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        layout = self.layout
        parts = [p for p in layout.projections if layout.parameter(p) == name]
        k, n = layout.shape(parts[0])
        like = self._linear(0, parts[0]).weight
        weights = like.new_empty(layout.experts, n * len(parts), k)
        if layout.transposed:
            weights = weights.transpose(1, 2).contiguous()
        biases = like.new_empty(layout.experts, n * len(parts))
        with torch.no_grad():
            for index in range(layout.experts):
                for part in parts:
                    linear = self._linear(index, part)
                    layout.weight(weights, index, part).copy_(linear.weight)
                    if linear.bias is not None:
                        layout.bias(biases, index, part).copy_(linear.bias)
        return weights, biases

    def _linear(self, index: int, projection: str) -> nn.Linear:
        linear = getattr(self.expert(index), projection)
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"{index}.{projection} must be an nn.Linear, got a {type(linear).__name__}")
        return linear

    def extra_repr(self) -> str:
        """Sizes."""
        return f"experts={self.layout.experts}, hidden={self.layout.hidden}, inner={self.layout.inner}"


#: Attributes that :class:`LittleBitExperts` adds to those of its source.
_OWN = frozenset({"layout", "_source_class", "_index_name", "_weight_name"})


def _view(source: nn.Module, layout: ExpertsLayout, index: int, projection: str) -> nn.Linear:
    """One projection as an ``nn.Linear`` on a view of the fused parameter."""
    name = layout.parameter(projection)
    fused: nn.Parameter = source._parameters[name]  # type: ignore[assignment]
    k, n = layout.shape(projection)
    linear = nn.Linear(k, n, bias=layout.biased, device="meta")
    view = layout.weight(fused.detach(), index, projection)
    linear.weight = nn.Parameter(view, requires_grad=fused.requires_grad)
    if layout.biased:
        bias: nn.Parameter = source._parameters[f"{name}_bias"]  # type: ignore[assignment]
        linear.bias = nn.Parameter(layout.bias(bias.detach(), index, projection), bias.requires_grad)
    linear.train(source.training)
    return linear


def expand_experts(model: nn.Module) -> dict[str, nn.Module]:
    """Replace the fused experts of ``model`` by :class:`LittleBitExperts`, in place.

    No weight is copied: the children are views. Modules that share their tensors with another one (Diffusion
    Gemma ties all of its encoder to its decoder) stay as they are.

    Returns:
        The modules that were replaced, by name; one with several names under each of them.
    """
    shared = shared_parameters(model)
    replaced = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if name
        and experts_layout(module) is not None
        and not isinstance(module, LittleBitExperts)
        and not any(id(parameter) in shared for parameter in module.parameters(recurse=False))
    }
    # All are made before any is put in its place: a module that cannot be expanded leaves the model as it is.
    made = {module: LittleBitExperts(module) for module in dict.fromkeys(replaced.values())}
    places = Places(model)
    for name, module in replaced.items():
        places.put(name, made[module])
    return replaced


def collapse_experts(model: nn.Module, replaced: dict[str, nn.Module]) -> None:
    """Undo :func:`expand_experts` where no child was replaced by anything else than an ``nn.Linear``.

    Children that stay dense in a module that stays expanded get tensors of their own, so that the fused
    tensors can be freed.

    Args:
        model: what :func:`expand_experts` was called with.
        replaced: what it returned.
    """
    places = Places(model)
    for name, source in replaced.items():
        module = model.get_submodule(name)
        if not isinstance(module, LittleBitExperts):
            continue
        layers = [
            layer for index in range(module.layout.experts) for layer in module.expert(index).children()
        ]
        if all(type(layer) is nn.Linear for layer in layers):
            places.put(name, source)
            continue
        for layer in layers:
            if type(layer) is nn.Linear and layer.weight.device.type != "meta":
                layer.weight = nn.Parameter(
                    layer.weight.detach().clone(memory_format=torch.contiguous_format),
                    layer.weight.requires_grad,
                )
                if layer.bias is not None:
                    layer.bias = nn.Parameter(layer.bias.detach().clone(), layer.bias.requires_grad)
