"""``littlebit2 calibrate``: from text to the file that weighs errors."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest
import torch

from littlebit2.calibrate import calibrate
from littlebit2.cli import main
from littlebit2.offline import quantize_checkpoint
from littlebit2.quantize import QuantConfig, load_importance
from tests.integrations.families import FAMILIES, dense_model
from tests.train.builders import write_mixture, write_text

tokenizers = pytest.importorskip("tokenizers")
transformers = pytest.importorskip("transformers")

TEXT = " ".join(f"w{i * 7 % 150}" for i in range(200))


def save_model(family: str, path: Path) -> Path:
    model = dense_model(family)
    model.save_pretrained(path)
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({f"w{token}": token for token in range(160)}, unk_token="w3")
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0").save_pretrained(path)
    return path


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return save_model("llama", tmp_path / "dense")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, "utf-8")
    return path


def test_inputs_are_those_of_the_model_on_the_text(model_dir: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "importance.safetensors"
    done = calibrate(model_dir, [text], out, tokens=50, block=20, progress=False)
    assert done.tokens == 50
    assert done.missing == ()
    found = load_importance(out)
    assert set(found) == set(done.layers)
    assert len(found) == 14
    ids = torch.tensor([[i * 7 % 150 for i in range(50)]])
    embedded = transformers.AutoModelForCausalLM.from_pretrained(model_dir).model
    layer = embedded.layers[0]
    states = layer.input_layernorm(embedded.embed_tokens(ids))  # of every token by itself
    expected = states.detach().square().mean((0, 1))
    torch.testing.assert_close(found["model.layers.0.self_attn.q_proj"].inputs, expected)
    assert found["model.layers.0.self_attn.q_proj"].outputs is None
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("family", ["opt", "bert", "llama-tied"])
def test_names_are_those_of_the_checkpoint(family: str, text: Path, tmp_path: Path) -> None:
    assert family in FAMILIES
    path = save_model(family, tmp_path / "dense")
    done = calibrate(path, [text], tmp_path / "out", tokens=60, progress=False)
    assert not [name for name in done.missing if "pooler" not in name]
    options = ["--ranks", "8", "--method", "dual-svid", "--quiet", "--importance", str(tmp_path / "out")]
    assert main(["quantize", str(path), str(tmp_path / "q"), *options]) == 0


def test_the_command_writes_what_quantize_and_plan_read(
    model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "importance.safetensors")
    data = ["--data", str(text), "--out", out, "--gradients", "--tokens", "64", "--quiet"]
    assert main(["calibrate", str(model_dir), *data]) == 0
    captured = capsys.readouterr()
    assert "14 layers, 64 tokens" in captured.out
    assert captured.err == ""
    assert load_importance(out)["model.layers.1.mlp.up_proj"].outputs is not None
    spectral = ["--bpw", "3", "--budget", "spectral", "--importance", out]
    assert main(["plan", str(model_dir), *spectral, "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    options = ["--admm-iterations", "3", "--quiet", "--json", "--workers", "1"]
    assert main(["quantize", str(model_dir), str(tmp_path / "q"), *spectral, *options]) == 0
    made = json.loads(capsys.readouterr().out)
    ranks = {layer["name"]: (layer["ranks"], layer["predicted_error"]) for layer in planned["layers"]}
    assert ranks == {layer["name"]: (layer["ranks"], layer["predicted_error"]) for layer in made["layers"]}
    assert len({tuple(found[0]) for found in ranks.values()}) > 1
    assert main(["plan", str(model_dir), "--energy", "0.9"]) == 0
    assert "predicted squared error" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "--data", "{text}"], "nowhere"),
        (["{model}", "--data", "nothing.txt"], "no such file or directory: nothing.txt"),
        (["{model}", "--data", "{text}", "--tokens", "1"], "tokens must be an integer of at least 2, got 1"),
        (
            ["{model}", "--data", "{text}", "--block", "65"],
            "block must be at most the model's max_position_emb",
        ),
        (
            ["{model}", "--data", "{model}/model.safetensors"],
            "must be of a known type (.txt, ",
        ),
        (["{model}", "--data", "{empty}"], "data must hold at least 2 tokens of text, got none in"),
        (["{model}", "--data", "{bad}"], "line 2: must be an object with a string 'text'"),
        (
            ["{model}", "--data", "{text}", "--dtype", "int"],
            "dtype must be float32, bfloat16 or float16, got 'int'",
        ),
    ],
)
def test_errors_name_what_is_wrong(
    arguments: list[str],
    message: str,
    model_dir: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bad.jsonl").write_text('{"text": "w1 w2 w3"}\n{"body": "w4"}\n')
    places = {
        "model": model_dir,
        "text": text,
        "empty": tmp_path / "empty.txt",
        "bad": tmp_path / "bad.jsonl",
    }
    out = tmp_path / "out.safetensors"
    given = [argument.format(**places) for argument in arguments]
    # A file that is not there is no wrong value.
    status = 1 if re.search("nowhere|no such file", message) else 2
    assert main(["calibrate", *given, "--out", str(out), "--quiet"]) == status
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not out.exists()


def test_a_model_without_tokenizer_or_loss(tmp_path: Path, text: Path) -> None:
    path = tmp_path / "bare"
    dense_model("bert").save_pretrained(path)
    with pytest.raises(ValueError, match="must hold a tokenizer, one of"):
        calibrate(path, [text], tmp_path / "out", progress=False)
    path = save_model("bert", tmp_path / "bert")
    with pytest.raises(ValueError, match="gradients needs a causal language model, got BertModel"):
        calibrate(path, [text], tmp_path / "out", gradients=True, progress=False)
    with pytest.raises(FileNotFoundError, match="is no directory to write out to"):
        calibrate(path, [text], tmp_path / "no" / "out", progress=False)


def test_an_existing_file_is_replaced_only_on_demand(
    model_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "importance.safetensors"
    out.write_text("something else")
    command = ["calibrate", str(model_dir), "--data", str(text), "--out", str(out), "--tokens", "20"]
    # Before any work: not even the model is looked for.
    assert main(["calibrate", "nowhere", *command[2:]]) == 1
    assert "out must be a new file, got" in (error := capsys.readouterr().err)
    assert "; --overwrite replaces it" in error
    assert main(command) == 1
    assert out.read_text() == "something else"
    capsys.readouterr()
    assert main([*command, "--overwrite"]) == 0
    assert capsys.readouterr().err == ""  # without --quiet: stderr is no terminal
    assert len(load_importance(out)) == 14
    with pytest.raises(FileExistsError, match=r"out must be a file, got .*, which is a directory"):
        calibrate(model_dir, [text], tmp_path, overwrite=True)


def test_text_is_read_as_for_training(model_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "b.txt").write_text("w3 w4", "utf-8")
    with gzip.open(folder / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write('{"body": "w1"}\n\n{"body": "w2"}\n')
    (folder / "ignored.bin").write_bytes(b"\xff")
    done = calibrate(model_dir, [folder], tmp_path / "out", text_field="body", progress=False)
    assert done.tokens == 4
    (folder / "inner" / "b.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(ValueError, match=r"b\.txt must be UTF-8 text"):
        calibrate(model_dir, [folder], tmp_path / "out2", text_field="body", progress=False)
    with pytest.raises(ValueError, match="data must name at least one file or directory, got none"):
        calibrate(model_dir, [], tmp_path / "out2", progress=False)
    assert not (tmp_path / "out2").exists()


def test_experts_are_measured_each_under_the_names_of_the_files(tmp_path: Path) -> None:
    model, data = write_mixture("mixtral", tmp_path / "model"), write_text(tmp_path / "text.txt", 3000)
    file = tmp_path / "importance.safetensors"
    done = calibrate(model, [data], file, tokens=512, progress=False)
    experts = [name for name in done.layers if ".block_sparse_moe.experts." in name]
    assert len(experts) == 2 * 4 * 3
    assert done.missing == ()
    importance = load_importance(file)
    config = QuantConfig(bpw=2.0, paths=1, method="joint-itq", itq_iterations=1)
    report = quantize_checkpoint(model, tmp_path / "q", config, importance=importance, progress=False)
    assert all("weighted_error" in layer for layer in report.layers)
