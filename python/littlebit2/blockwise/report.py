"""What a block-by-block run did, and whether its result is of use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from littlebit2.offline import RunReport

__all__ = ["BLOCKWISE_NAME", "BlockwiseReport"]

#: The report of blocks inside the output; it holds nothing that differs from run to run.
BLOCKWISE_NAME = "blockwise_report.json"
#: Perplexity relative to the dense model's above which a model is of no use.
_USABLE = 5.0


@dataclass(frozen=True)
class BlockwiseReport:
    """The report of :func:`.quantize_blockwise`.

    Attributes:
        run: the layers, as every quantized checkpoint has them.
        settings: :class:`.BlockwiseSettings` as JSON values.
        blocks: for each block ``index``, ``layers``, errors on held-out text ``before`` and ``after`` tuning
            (:func:`.relative_error`, weighted as in the tuning), ``steps`` that were taken.
        distillation: KL on held-out text ``before`` and ``after`` it, and ``steps``; ``None`` without.
        perplexity: on held-out text, by stage: ``dense``, ``tuned``, ``distilled``.
        vocabulary: number of tokens among which the model chooses.
        tokens: tokens that were predicted.
        seconds: measured time of each part of the work; empty for a run that had been finished before.
        allocation: how ranks came about (:class:`.RanksByKl`); ``None`` where they are uniform.
    """

    run: RunReport
    settings: dict[str, Any]
    blocks: tuple[dict[str, Any], ...]
    distillation: dict[str, Any] | None
    perplexity: dict[str, float]
    vocabulary: int
    tokens: int
    seconds: dict[str, float] = field(default_factory=dict)
    allocation: dict[str, Any] | None = None

    @property
    def final(self) -> float:
        """The perplexity of the result."""
        return list(self.perplexity.values())[-1]

    @property
    def dense_is_at_chance(self) -> bool:
        """Whether the dense model knows nothing of the text: no work on the packed one helps then."""
        return not self.perplexity["dense"] < self.vocabulary

    @property
    def unusable(self) -> str | None:
        """Why the result is of no use; ``None`` if its perplexity speaks for it."""
        if self.dense_is_at_chance:
            return (
                f"the dense model's own perplexity {self.perplexity['dense']:.4g} on this text is no better "
                f"than a uniform guess among {self.vocabulary} tokens"
            )
        if not self.final < self.vocabulary:
            return (
                f"its perplexity {self.final:.4g} is no better than a uniform guess among {self.vocabulary} "
                "tokens"
            )
        dense = self.perplexity["dense"]
        if self.final > _USABLE * dense:
            return f"its perplexity {self.final:.4g} is more than {_USABLE:g} times the dense {dense:.4g}"
        return None

    def as_dict(self) -> dict[str, Any]:
        """Return what the file in the output holds."""
        return {
            "settings": self.settings,
            "blocks": list(self.blocks),
            "allocation": self.allocation,
            "distillation": self.distillation,
            "perplexity": self.perplexity,
            "vocabulary": self.vocabulary,
            "tokens": self.tokens,
        }

    @classmethod
    def of(
        cls, run: RunReport, content: dict[str, Any], seconds: dict[str, float] | None = None
    ) -> BlockwiseReport:
        """Return the report of which :meth:`as_dict` gave ``content``."""
        return cls(
            run,
            content["settings"],
            tuple(content["blocks"]),
            content["distillation"],
            content["perplexity"],
            content["vocabulary"],
            content["tokens"],
            seconds or {},
            content["allocation"],
        )
