"""Runs of vLLM without a server: the tokens of prompts, alone and together, as JSON.

Run by ``check.py`` in a process of its own.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "jobs", type=Path, help="JSON: model, prompts, tokens, out, settings and adapter of each run"
    )
    for job in json.loads(parser.parse_args().jobs.read_text()):
        began = time.monotonic()
        found = run(job)
        Path(job["out"]).write_text(json.dumps({**found, "seconds": time.monotonic() - began}))


def run(job: dict[str, Any]) -> dict[str, Any]:
    try:
        llm = LLM(
            job["model"],
            dtype=job.get("dtype", "float32"),
            max_model_len=512,
            max_num_seqs=16,
            enable_prefix_caching=False,
            seed=0,
            **job["settings"],
        )
        adapter = LoRARequest("adapter", 1, job["adapter"]) if job.get("adapter") else None
    except Exception as error:  # what a run was refused with is what its check looks at
        return {"error": f"{type(error).__name__}: {error}"}
    together = generate(llm, job["prompts"], job["tokens"], adapter)
    alone = [generate(llm, [prompt], job["tokens"], adapter)[0] for prompt in job["prompts"]]
    del llm
    gc.collect()
    return {"alone": alone, "together": together}


def generate(llm: LLM, prompts: list[list[int]], tokens: int, adapter: LoRARequest | None) -> list[list[int]]:
    how = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    inputs: Any = [{"prompt_token_ids": ids} for ids in prompts]
    answers = llm.generate(inputs, how, use_tqdm=False, lora_request=adapter)
    return [list(one.outputs[0].token_ids) for one in answers]


if __name__ == "__main__":
    main()
