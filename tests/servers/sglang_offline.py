"""One run of SGLang on the CPU: the tokens of prompts, alone and together, as JSON.

Run by ``sglang_checks.py`` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import sglang


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "jobs", type=Path, help="JSON: model, prompts, tokens, ranks, out and settings of a run"
    )
    for job in json.loads(parser.parse_args().jobs.read_text()):
        Path(job["out"]).write_text(json.dumps(run(job)))


def run(job: dict[str, Any]) -> dict[str, Any]:
    engine = sglang.Engine(
        model_path=job["model"],
        dtype="float32",
        tp_size=job["ranks"],
        device="cpu",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_radix_cache=True,
        skip_tokenizer_init=True,
        max_total_tokens=8192,
        context_length=512,
        log_level="warning",
        **job["settings"],
    )
    how = {"temperature": 0, "max_new_tokens": job["tokens"], "ignore_eos": True}
    together = [one["output_ids"] for one in engine.generate(input_ids=job["prompts"], sampling_params=how)]
    alone = [engine.generate(input_ids=ids, sampling_params=how)["output_ids"] for ids in job["prompts"]]
    engine.shutdown()
    return {"alone": alone, "together": together}


if __name__ == "__main__":
    main()
