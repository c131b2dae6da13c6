"""Model folders from anybody: their code is not run, their pickles do nothing, and errors are one line."""

from __future__ import annotations

import ast
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import lorica
from lorica.adapters.base_files import resolve_base
from lorica.adapters.base_model import load_base
from lorica.adapters.export import load_adapter
from lorica.config import ModelConfig
from lorica.errors import UserError
from lorica.pretrained import damaged_file
from lorica.tasks.images import load_preprocessing
from lorica.tasks.text import load_tokenizer
from tests.tasks.test_whole_runs import tiny_bert

NAMES = ["bad", "good"]
CODE = """
import os
os.mkdir({marker!r})
from transformers import BertConfig, BertModel, BertTokenizer, BaseImageProcessor
class EvilConfig(BertConfig):
    model_type = "evil"
class Evil(BertModel):
    config_class = EvilConfig
class EvilTokenizer(BertTokenizer):
    pass
class EvilProcessor(BaseImageProcessor):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    "AutoModel": "evil.Evil",
    "AutoModelForSequenceClassification": "evil.Evil",
    "AutoModelForImageClassification": "evil.Evil",
    "AutoModelForCausalLM": "evil.Evil",
    "AutoModelForQuestionAnswering": "evil.Evil",
    "AutoTokenizer": ["evil.EvilTokenizer", None],
    "AutoImageProcessor": "evil.EvilProcessor",
}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was asked on the terminal; the answer is always yes."""
    questions: list[str] = []
    monkeypatch.setattr("builtins.input", lambda text="": (questions.append(text), "y")[1])
    return questions


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """A folder that hostile code makes."""
    return tmp_path / "it-ran"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | changes))


def model(task_type: str, **settings: Any) -> Callable[[str], Any]:
    return lambda base: load_base(ModelConfig(base=base, **settings), task_type, NAMES, 0)


LOADERS: dict[str, Callable[[str], Any]] = {
    "classifier": model("text-classification"),
    "encoder": model("text-classification", pooling="mean"),
    "image": model("image-classification"),
    "questions": model("question-answering"),
    "causal": model("language-modelling", head="freeze"),
    "tokenizer": load_tokenizer,
    "image processor": load_preprocessing,
}


@pytest.mark.parametrize("loader", LOADERS)
def test_code_in_a_model_folder_is_neither_run_nor_asked_about(
    loader: str, tmp_path: Path, marker: Path, asked: list[str]
) -> None:
    folder = Path(tiny_bert(tmp_path / "evil"))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    edit(folder / "config.json", model_type="evil", auto_map=AUTO_MAP)
    edit(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=AUTO_MAP)
    edit(folder / "preprocessor_config.json", image_processor_type="EvilProcessor", auto_map=AUTO_MAP)
    with pytest.raises(UserError, match=r"model\.base = .* needs code that comes with its files") as raised:
        LOADERS[loader](str(folder))
    assert "\n" not in str(raised.value)
    assert not asked
    assert not marker.exists()


def test_a_family_that_is_known_does_without_the_code_beside_it(tmp_path: Path, marker: Path, asked: list[str]) -> None:
    folder = Path(tiny_bert(tmp_path / "encoder"))
    (folder / "evil.py").write_text(CODE.format(marker=str(marker)))
    edit(folder / "config.json", auto_map=AUTO_MAP)
    LOADERS["encoder"](str(folder))
    load_tokenizer(str(folder))
    assert not asked
    assert not marker.exists()


def test_no_model_is_loaded_past_the_one_place_that_forbids_code() -> None:
    """Adapters are loaded into a model, by PEFT, which runs none."""
    found = []
    source = Path(lorica.__file__).parent
    for path in source.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "from_pretrained":
                found.append((path.name, ast.unparse(node.func)))
            if isinstance(node, ast.keyword) and node.arg in ("trust_remote_code", "weights_only"):
                assert ast.unparse(node.value) == {"trust_remote_code": "False"}.get(node.arg, "True")
    assert found == [("export.py", "PeftModel.from_pretrained")]


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def as_pickle(folder: Path, content: Any) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "pytorch_model.bin")


@pytest.mark.parametrize("loader", ["classifier", "encoder"])
def test_a_payload_in_a_pickle_does_nothing(loader: str, tmp_path: Path, marker: Path) -> None:
    folder = Path(tiny_bert(tmp_path / "encoder"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    as_pickle(folder, tensors | {"more": Payload(marker)})
    with pytest.raises(UserError, match=r"model\.base = .*pytorch_model\.bin is damaged, or contains more than data"):
        LOADERS[loader](str(folder))
    assert not marker.exists()
    # Lest it be the payload's own fault.
    torch.load(folder / "pytorch_model.bin", weights_only=False)
    assert marker.exists()


def test_tensors_in_a_pickle_are_still_read(tmp_path: Path) -> None:
    folder = Path(tiny_bert(tmp_path / "encoder"))
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    as_pickle(folder, tensors)
    loaded = LOADERS["encoder"](str(folder)).model.encoder.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def endless(path: Path) -> None:
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")


def unknown(path: Path) -> None:
    header = b'{"a":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)))


DAMAGE = {
    **{f"model.safetensors {change.__name__}": ("model.safetensors", change) for change in (cut, endless, garbage)},
    **{f"{name} garbage": (name, garbage) for name in ("config.json", "tokenizer.json", "tokenizer_config.json")},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    folder = Path(tiny_bert(tmp_path / "encoder"))
    file, change = DAMAGE[name]
    change(folder / file)
    load = load_tokenizer if file.startswith("tokenizer") else LOADERS["encoder"]
    with pytest.raises(UserError, match=rf"model\.base = .*\b{file}") as raised:
        load(str(folder))
    assert "\n" not in str(raised.value)


def test_a_damaged_pickle_is_named(tmp_path: Path) -> None:
    folder = Path(tiny_bert(tmp_path / "encoder"))
    as_pickle(folder, {})
    cut(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pytorch_model\.bin is damaged"):
        LOADERS["encoder"](str(folder))


def test_a_whole_folder_has_no_damaged_file(tmp_path: Path) -> None:
    assert damaged_file(Path(resolve_base("lorica:glyph-vit"))) is None
    assert damaged_file(Path(tiny_bert(tmp_path / "encoder"))) is None
    assert damaged_file(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from lorica.adapters.export import Export, export_adapter
    from lorica.adapters.loading import load_model
    from lorica.config import load
    from lorica.tasks.loading import load_tests

    folder = tmp_path_factory.mktemp("adapter")
    config = load(None, ["lora.r=2"])
    task = load_tests(config.task, resolve_base(config.model.base))
    export_adapter(
        load_model(config, task), {}, folder, Export(config.model, config.task, task.label_names, 0), "# card"
    )
    return folder


def test_an_adapter_is_read_from_safetensors_only(exported: Path, tmp_path: Path, marker: Path) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "adapter"))
    assert load_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"x": Payload(marker)}, folder / "adapter_model.bin")
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        load_adapter(folder)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_config.json", "lorica.json"])
@pytest.mark.parametrize("change", [cut, endless, unknown, garbage])
def test_a_damaged_adapter_is_one_error_that_names_the_file(
    exported: Path, tmp_path: Path, file: str, change: Callable[[Path], None]
) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "adapter"))
    change(folder / file)
    with pytest.raises(UserError, match=rf"adapter = .*{file}") as raised:
        load_adapter(folder)
    assert "\n" not in str(raised.value)


def test_an_adapter_names_no_module_to_import(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(shutil.copytree(exported, tmp_path / "adapter"))
    (tmp_path / "evil_module.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = {"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}
    edit(folder / "adapter_config.json", megatron_core="evil_module", megatron_config=settings)
    with pytest.raises(UserError, match=r"adapter_config\.json was not written by Lorica"):
        load_adapter(folder)
    assert "evil_module" not in sys.modules
