"""The progress bar of a run, on stderr: results alone go to stdout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm
from transformers.trainer_callback import TrainerCallback

__all__ = ["Progress"]


class Progress(TrainerCallback):
    """Shows steps, the last loss, the flip rate and the last perplexity."""

    def __init__(self) -> None:
        self._bar: Any = None
        self._shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Open the bar where the run is."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc="train",
                unit="step",
                disable=None,  # where stderr is no terminal
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Show the latest figures."""
        shown = {"loss": "{:.4g}", "flip_rate": "{:.2%}", "eval_perplexity": "{:.4g}"}
        for name, form in shown.items():
            if name in (logs or {}):
                self._shown[name.removeprefix("eval_")] = form.format(logs[name])  # type: ignore[index]
        if self._bar is not None:
            self._bar.set_postfix(self._shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
