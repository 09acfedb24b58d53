"""``make test-tasks``: lm-evaluation-harness itself on a packed model, by a task in a folder.

pytest does not collect this file by its name: the harness is in an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from littlebit2 import QuantConfig, load, quantize_checkpoint
from littlebit2.cli import main
from tests.blockwise.builders import write_model
from tests.train.builders import byte_tokenizer

CHOICES = [" one", " two", " three"]
QUESTIONS = ["What is first?", "What is second?", "What comes after two?", "How many?", "Which one is it?"]

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


def likeliest(model: torch.nn.Module, question: str) -> int:
    """The choice whose tokens are likeliest after the question."""
    tokenizer = byte_tokenizer()
    context = tokenizer(question)["input_ids"]
    found = []
    for choice in CHOICES:
        ids = torch.tensor([context + tokenizer(choice)["input_ids"]])
        with torch.no_grad():
            values = model(input_ids=ids, use_cache=False).logits.float().log_softmax(-1)[0]
        found.append(sum(float(values[i - 1, ids[0, i]]) for i in range(len(context), ids.shape[1])))
    return found.index(max(found))


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    dense = write_model(tmp_path / "dense")
    config = QuantConfig(ranks=(16,), method="admm", admm_iterations=3, refine_rounds=1)
    quantize_checkpoint(dense, tmp_path / "packed", config, progress=False)
    return tmp_path / "packed"


def write_task(folder: Path, answers: list[int]) -> Path:
    """Write a task with right answers; return its folder."""
    folder.mkdir()
    file = folder / "tiny.jsonl"
    lines = [
        {"question": question, "choices": CHOICES, "answer": answer}
        for question, answer in zip(QUESTIONS, answers, strict=True)
    ]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "tiny.yaml").write_text(TASK.format(file=file))
    return folder


def test_accuracy_is_that_of_the_logits(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for name in ("HF_XET_HIGH_PERFORMANCE", "KMP_DUPLICATE_LIB_OK"):  # the harness sets them
        monkeypatch.setenv(name, "1")
    model = load(packed, dtype=torch.float32)
    chosen = [likeliest(model, question) for question in QUESTIONS]
    # Two of the answers are wrong.
    answers = [(choice + 1) % len(CHOICES) if i < 2 else choice for i, choice in enumerate(chosen)]
    tasks = write_task(tmp_path / "tasks", answers)
    arguments = [
        "evaluate",
        str(packed),
        "--tasks",
        "tiny",
        "--include-path",
        str(tasks),
        "--dtype",
        "float32",
    ]
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tasks"]["tiny"]["acc,none"] == pytest.approx(3 / 5)
    assert main([*arguments, "--limit", "2"]) == 0
    assert "tiny         acc,none  0.0000" in capsys.readouterr().out


def test_unknown_tasks_are_refused(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = write_task(tmp_path / "tasks", [0] * len(QUESTIONS))
    arguments = ["evaluate", str(packed), "--include-path", str(tasks), "--tasks"]
    assert main([*arguments, "tiny", "absent"]) == 2
    assert "tasks must be known to lm-evaluation-harness, got absent" in capsys.readouterr().err
