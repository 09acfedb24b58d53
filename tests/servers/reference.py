"""Tokens of ``littlebit2.load`` and ``generate``, as JSON. Run by ``check.py`` in a process of its own."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import littlebit2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("jobs", type=Path, help="JSON: model, prompts, tokens and out of each model")
    for job in json.loads(parser.parse_args().jobs.read_text()):
        model = littlebit2.load(job["model"], dtype=torch.float32)
        if getattr(model.config, "attn_logit_softcapping", None):
            # The default attention of transformers leaves the soft cap out.
            model.set_attn_implementation("eager")
        tokens = []
        for prompt in job["prompts"]:
            ids = torch.tensor([prompt])
            count = job["tokens"]
            new = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                eos_token_id=None,
            )
            tokens.append(new[0, len(prompt) :].tolist())
        Path(job["out"]).write_text(json.dumps({"tokens": tokens}))


if __name__ == "__main__":
    main()
