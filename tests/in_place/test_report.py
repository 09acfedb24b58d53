"""What stays dense, why, and how the report says it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from littlebit2 import QuantConfig, quantize_
from littlebit2_kernels import LittleBitLinear
from tests.in_place.builders import FusedExperts

CONFIG = QuantConfig(ranks=(8,), method="joint-itq", itq_iterations=2)


class Conv1D(nn.Module):
    """As in transformers: a linear layer with its weight transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(32, 48))


class Subclass(nn.Linear):
    """Computes something else than its name says."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).abs()


class Mixture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = FusedExperts()


class Tied(nn.Module):
    """A language model whose head is the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Linear(32, 32)
        self.to_words = nn.Linear(32, 50, bias=False)
        if tied:
            self.to_words.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        return self.to_words


def reasons(model: nn.Module, *args: object, **options: object) -> dict[str, tuple[str, str]]:
    report = quantize_(model, *(args or (CONFIG,)), progress=False, **options)  # type: ignore[arg-type]
    return {one.name: (one.reason, one.detail) for one in report.dense}


def test_a_tied_head_stays_dense_and_tied() -> None:
    model = Tied()
    report = quantize_(model, CONFIG, exclude=(), progress=False)
    (left,) = report.dense
    assert (left.name, left.kind, left.shape, left.reason) == ("to_words", "Linear", (50, 32), "tied")
    assert left.detail == "shares its weight with embed.weight"
    assert model.to_words.weight is model.embed.weight


def test_a_tied_head_is_packed_if_asked_for() -> None:
    model = Tied()
    embedding = model.embed.weight
    report = quantize_(model, CONFIG, exclude=(), include_tied=True, progress=False)
    assert [layer.name for layer in report.layers] == ["body", "to_words"]
    assert model.embed.weight is embedding
    assert isinstance(model.to_words, LittleBitLinear)


def test_the_head_is_the_one_that_the_model_names() -> None:
    assert reasons(Tied(tied=False)) == {"to_words": ("head", "output head")}
    assert reasons(Tied(tied=False), exclude=()) == {}


def test_layers_that_are_too_small_stay_dense() -> None:
    model = nn.ModuleDict({"large": nn.Linear(256, 256), "small": nn.Linear(32, 16)})
    found = reasons(model, 0.4)
    ((name, (reason, detail)),) = found.items()
    assert (name, reason) == ("small", "budget")
    assert detail.startswith("layer 'small': bpw must be above 1.5, what the scales of one path cost")
    assert isinstance(model["large"], LittleBitLinear)
    # Explicit ranks are taken as long as they save anything.
    model = nn.ModuleDict({"small": nn.Linear(32, 16), "smaller": nn.Linear(8, 8)})
    found = reasons(model, CONFIG)
    assert list(found) == ["smaller"]
    assert "ranks [8] would store 20 bits per weight" in found["smaller"][1]


def test_unsupported_kinds_are_listed_and_embeddings_are_not() -> None:
    model = nn.ModuleDict(
        {
            "attention": nn.MultiheadAttention(32, 2),
            "conv": Conv1D(),
            "convolution": nn.Conv1d(8, 8, 1),
            "embed": nn.Embedding(50, 32),
            "encoder": nn.TransformerEncoderLayer(32, 2, 64, batch_first=True),
            "lazy": nn.LazyLinear(8),
            "linear": nn.Linear(32, 32),
            "odd": Subclass(32, 32),
        }
    )
    found = reasons(model)
    assert {reason for reason, _ in found.values()} == {"kind"}
    assert list(found) == [
        "attention",
        "attention.out_proj",
        "conv",
        "encoder.self_attn",
        "encoder.self_attn.out_proj",
        "encoder.linear1",
        "encoder.linear2",
        "lazy",
        "odd",
    ]
    assert "nn.MultiheadAttention" in found["attention.out_proj"][1]
    assert "shares its weight or computes something else" in found["conv"][1]
    assert found["lazy"][1] == "has no weight before its first call"
    assert found["odd"][1] == "Subclass computes something else than a linear layer"
    model.eval()
    with torch.no_grad():
        x = torch.randn(2, 5, 32)
        assert model["attention"](x, x, x)[0].shape == model["encoder"](x).shape == x.shape


def test_computed_weights_are_packed_as_they_are() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(32, 32))
    pruned = prune.l1_unstructured(nn.Linear(32, 32), "weight", amount=0.5)
    model = nn.ModuleDict({"normed": normed, "pruned": pruned})
    weights = {name: linear.weight.detach().clone() for name, linear in model.items()}
    report = quantize_(model, CONFIG, progress=False)
    assert report.dense == ()
    for layer in report.layers:
        left = (weights[layer.name] - model[layer.name].dequantize()).square().sum()
        assert float(left / weights[layer.name].square().sum()) == pytest.approx(layer.error, rel=1e-4)


def test_experts_that_are_fused_become_packed_modules(rng: torch.Generator) -> None:
    model = Mixture()
    x = torch.randn(6, 32, generator=rng)
    index = torch.randint(0, 2, (6, 1), generator=rng)
    report = quantize_(model, CONFIG, include="*.0.*", progress=False)
    assert [layer.name for layer in report.layers] == [
        f"experts.0.{part}" for part in ("gate_proj", "up_proj", "down_proj")
    ]
    assert model.experts(x, index, torch.ones(6, 1)).shape == x.shape
    other = Mixture()
    before = other.experts
    with torch.no_grad():
        before.down_proj[1, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"layer 'experts\.1\.down_proj': weight must be finite"):
        quantize_(other, CONFIG, progress=False)
    assert other.experts is before


def test_patterns_and_functions_are_given_as_reasons() -> None:
    model = nn.ModuleDict({name: nn.Linear(32, 32) for name in ("one", "two", "three", "four")})
    found = reasons(model, CONFIG, lambda _, name: name != "two", include=("one", "t*"), exclude="three")
    assert found == {
        "two": ("filter", "filter_fn returned False"),
        "three": ("pattern", "excluded"),
        "four": ("pattern", "not selected"),
    }


@pytest.mark.parametrize(
    ("model", "arguments", "seen"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU()), {}, "got none, only Conv2d, ReLU, Sequential"),
        (
            nn.ModuleDict({"lm_head": nn.Linear(32, 32), "odd": Subclass(32, 32)}),
            {},
            r"got 2 linear modules, all left dense: 1 not selected by include and exclude \(lm_head\); "
            r"1 of an unsupported kind \(odd\)",
        ),
        (
            nn.Sequential(*(nn.Linear(32, 32) for _ in range(5))),
            {"config": 0.5},
            r"5 too small for the budget \(0, 1, 2, \.\.\.\); layer '0': bpw must be above 1, .* give",
        ),
        (nn.Sequential(nn.Linear(32, 32)), {"include": "x"}, r"\(include=\['x'\]\)"),
    ],
)
def test_an_empty_selection_says_what_was_seen(
    model: nn.Module, arguments: dict[str, object], seen: str
) -> None:
    with pytest.raises(ValueError, match=f"model must have an nn.Linear to pack, .*{seen}"):
        quantize_(model, **{"config": CONFIG, "progress": False, **arguments})  # type: ignore[arg-type]


def test_a_packed_model_has_nothing_left_to_pack() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    quantize_(model, CONFIG, progress=False)
    with pytest.raises(ValueError, match="got none, only LittleBitLinear, Sequential"):
        quantize_(model, CONFIG, progress=False)


def test_bits_bytes_and_errors_are_those_of_the_packed_modules() -> None:
    model = nn.ModuleDict(
        {"a": nn.Linear(64, 96), "b": nn.Linear(128, 40, bias=False), "lm_head": nn.Linear(64, 9)}
    )
    before = sum(parameter.numel() * 4 for parameter in model.parameters())
    report = quantize_(model, CONFIG, progress=False)
    for layer in report.layers:
        packed = model[layer.name].packed
        assert (layer.in_features, layer.out_features) == (packed.in_features, packed.out_features)
        assert layer.ranks == packed.ranks
        assert (layer.counted_bpw, layer.stored_bpw) == (packed.shape.counted_bpw, packed.shape.stored_bpw)
    weights = [64 * 96, 128 * 40]
    bits = sum(model[name].packed.shape.counted_bits for name in ("a", "b"))
    assert report.counted_bpw == pytest.approx(bits / sum(weights))
    errors = [layer.error for layer in report.layers]
    assert report.error == pytest.approx(
        sum(e * w for e, w in zip(errors, weights, strict=True)) / sum(weights)
    )
    assert report.bytes_before == before
    dense = 4 * (64 * 9 + 9)
    assert report.bytes_after == dense + model["a"].nbytes + model["b"].nbytes


def test_layers_at_their_largest_rank_are_marked() -> None:
    model = nn.ModuleDict({"square": nn.Linear(64, 64), "flat": nn.Linear(64, 512)})
    config = QuantConfig(bpw=2.0, method="joint-itq", paths=1, itq_iterations=0)
    square, flat = quantize_(model, config, progress=False).layers
    assert (square.ranks, square.at_largest_rank) == ((40,), False)
    assert (flat.ranks, flat.at_largest_rank) == ((64,), True)
    assert flat.counted_bpw < 2


def test_the_report_reads_as_a_table() -> None:
    model = nn.ModuleDict({"body": nn.Linear(64, 64), "lm_head": nn.Linear(64, 100)})
    report = quantize_(model, CONFIG, progress=False)
    first, _, head, row, _, title, left = str(report).splitlines()
    layer = report.layers[0]
    assert first.startswith(
        f"1 linear modules packed at {layer.counted_bpw:.3f} counted ({layer.stored_bpw:.3f} stored) bits per"
    )
    assert first.endswith(f"1 left dense; 42.64 kB -> {report.bytes_after / 1e3:.2f} kB")
    assert head.split() == ["packed", "K", "N", "ranks", "counted", "bpw", "stored", "bpw", "error"]
    assert row.split() == [
        *("body", "64", "64", "8"),
        f"{layer.counted_bpw:.3f}",
        f"{layer.stored_bpw:.3f}",
        f"{layer.error:.4f}",
    ]
    assert title == "left dense"
    assert left == "  lm_head (Linear [100, 64]): excluded"


def test_experts_that_share_their_tensors_stay_as_they_are() -> None:
    twins = nn.ModuleDict({"encoder": FusedExperts(), "decoder": FusedExperts(), "linear": nn.Linear(32, 32)})
    twins["decoder"].gate_up_proj = twins["encoder"].gate_up_proj
    before = twins["encoder"]
    quantize_(twins, CONFIG, progress=False)
    assert twins["encoder"] is before
    assert isinstance(twins["linear"], LittleBitLinear)
    # Only the tie keeps them.
    apart = nn.ModuleDict({"encoder": FusedExperts()})
    quantize_(apart, CONFIG, progress=False)
    assert not isinstance(apart["encoder"], FusedExperts)


def test_a_layer_without_outputs_stays_dense() -> None:
    model = nn.ModuleDict({"empty": nn.Linear(32, 0), "linear": nn.Linear(32, 32)})
    assert reasons(model, CONFIG) == {"empty": ("budget", "layer 'empty': has no weights, 0 x 32")}
