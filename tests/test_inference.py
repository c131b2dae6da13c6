"""What one does with a finished run's adapter: load it anywhere, predict, evaluate, merge, share."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import HfApi, ModelCard
from peft import AutoPeftModelForSequenceClassification, PeftModel
from rich.console import Console
from typer.testing import CliRunner

from lorica import cli
from lorica.adapters.adapted import AdaptedModel, adapt
from lorica.adapters.base_model import load_base
from lorica.adapters.export import Export, export_adapter, load_adapter
from lorica.adapters.loading_section import loading_section
from lorica.adapters.share import copy_adapter, push_adapter, write_merged
from lorica.config import LoraSection, ModelConfig, TaskConfig
from lorica.errors import UserError
from lorica.inference import evaluate, predict
from lorica.tasks.kind import kind_of
from lorica.tasks.loading import load_tests
from lorica.testing.models import TEXT
from tests.causal import CHAT, END, FAMILIES, tokenizer
from tests.models import FAMILIES as CLASSIFIERS
from tests.models import VISION
from tests.tasks.conftest import WORDS, write_tokenizer
from tests.tiers import integration

NAMES = ["bad", "fair", "good"]
TEXTS = ["a fine film", "not at all good and long and dull", "secret plot"]
ENCODERS = ("bert", "roberta", "deberta-v3", "modernbert", "distilbert", "albert")


@dataclass
class Exported:
    """An exported adapter, and the model that it was exported from, before anything was merged."""

    folder: Path
    model: AdaptedModel
    export: Export
    base: Path

    @property
    def tokenizer(self) -> Any:
        return kind_of(self.export.task).processor(str(self.base))

    def logits(self, *texts: Any) -> torch.Tensor:
        with torch.inference_mode():
            return torch.cat(
                [
                    self.model.peft_model(**self.tokenizer(*row, return_tensors="pt")).logits
                    for row in zip(*texts, strict=True)
                ]
            )


def _classifier(folder: Path) -> None:
    CLASSIFIERS["bert"]().save_pretrained(folder)
    write_tokenizer(folder)


def _encoder(folder: Path) -> None:
    CLASSIFIERS["bert"]().base_model.save_pretrained(folder)
    write_tokenizer(folder)


def _decoder(folder: Path) -> None:
    """As many decoders come: no padding in the configuration, and a tokenizer that pads with something else than its
    end-of-text token.
    """
    model = CLASSIFIERS["gpt2"]()
    model.config.pad_token_id = None
    model.save_pretrained(folder)
    write_tokenizer(folder)


def _colours(folder: Path) -> None:
    transformers.ViTForImageClassification(transformers.ViTConfig(**(VISION | {"num_channels": 3}))).save_pretrained(
        folder
    )
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)


def _reader(folder: Path) -> None:
    transformers.BertForQuestionAnswering(transformers.BertConfig(**(TEXT | {"num_labels": 2}))).save_pretrained(folder)
    write_tokenizer(folder)


def _writer(folder: Path) -> None:
    FAMILIES["llama"]().save_pretrained(folder)
    tokenizer(chat_template=CHAT).save_pretrained(folder)


CASES: dict[str, tuple[Callable[[Path], None], dict[str, Any], dict[str, Any]]] = {
    "text": (_classifier, {"type": "text-classification"}, {}),
    "frozen head": (_classifier, {"type": "text-classification"}, {"head": "freeze"}),
    "decoder": (_decoder, {"type": "text-classification"}, {}),
    "mean": (_encoder, {"type": "text-classification"}, {"pooling": "mean"}),
    "pairs": (_encoder, {"type": "text-regression", "text": ["one", "two"], "label": "alike"}, {}),
    "images": (_colours, {"type": "image-classification"}, {}),
    "questions": (_reader, {"type": "question-answering", "max_length": 40, "max_question": 8, "stride": 4}, {}),
    "prompts": (_writer, {"type": "language-modelling", "text": ["ask", "say"]}, {"head": "freeze"}),
}
MERGED_CLASSES = {
    "images": "AutoModelForImageClassification",
    "questions": "AutoModelForQuestionAnswering",
    "prompts": "AutoModelForCausalLM",
}


def make(place: Path, case: str) -> Exported:
    build, task, model = CASES[case]
    torch.manual_seed(0)
    build(place / "base model")
    config = ModelConfig(base=str(place / "base model"), **model)
    described = TaskConfig.model_validate(task | {"train": "private.csv", "test": "public.csv"})
    labels = kind_of(described).labels
    names = {"classes": NAMES, "number": ["alike"], "none": []}[labels]
    base = load_base(config, described.type, names, seed=3)
    adapted = adapt(base, LoraSection(r=2), config, 3, torch.device("cpu"))
    draws = torch.Generator().manual_seed(1)
    adapted.write({name: torch.randn(value.shape, generator=draws) for name, value in adapted.read().items()})
    export = Export(config, described, names, 3)
    card = f"---\nlibrary_name: peft\n---\n\n## How to load it\n\n{loading_section(export, 'adapter')}\n\n## Privacy\n"
    export_adapter(adapted, {}, place / "adapter", export, card)
    return Exported(place / "adapter", adapted, export, place / "base model")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    made: dict[str, Exported] = {}

    def get(case: str) -> Exported:
        if case not in made:
            made[case] = make(tmp_path_factory.mktemp("exported"), case)
        return made[case]

    return get


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def photos(folder: Path, count: int) -> list[str]:
    from PIL import Image

    draws = np.random.default_rng(0)
    paths = [folder / f"{index}.png" for index in range(count)]
    for path in paths:
        Image.fromarray(draws.integers(0, 256, (11, 9, 3), dtype=np.uint8)).save(path)
    return [str(path) for path in paths]


@pytest.mark.parametrize("case", CASES)
def test_a_loaded_adapter_is_a_model_of_transformers(exported: Callable[[str], Exported], case: str) -> None:
    found = exported(case)
    model = load_adapter(found.folder)
    assert isinstance(model, transformers.PreTrainedModel)
    assert not model.training
    assert (model.device.type, model.dtype) == ("cpu", torch.float32)
    assert not any("lora" in name for name, _ in model.named_modules())
    if found.export.label_names:
        assert model.config.id2label == dict(enumerate(found.export.label_names))
    described = json.loads((found.folder / "adapter_config.json").read_text())
    types = {"images": None, "questions": None, "prompts": "CAUSAL_LM"}
    assert described["task_type"] == types.get(case, "SEQ_CLS")
    assert Path(described["base_model_name_or_path"]).is_absolute()
    assert "private.csv" not in (found.folder / "lorica.json").read_text()


@pytest.mark.parametrize("case", ["text", "frozen head", "decoder", "mean"])
def test_labels_are_predicted_as_in_training(exported: Callable[[str], Exported], tmp_path: Path, case: str) -> None:
    found = exported(case)
    scores = found.logits(TEXTS).softmax(1)
    expected = [
        {"label": NAMES[int(row.argmax())], "score": pytest.approx(float(row.max()), abs=1e-5)} for row in scores
    ]
    assert predict(found.folder, [TEXTS[0]]) == expected[:1]
    file = write_rows(tmp_path / "new.jsonl", [{"text": text, "unused": 1} for text in TEXTS])
    assert predict(found.folder, [file]) == expected
    labels = [0, 1, 2]
    rows = [{"text": text, "label": NAMES[label]} for text, label in zip(TEXTS, labels, strict=True)]
    metrics = evaluate(found.folder, write_rows(tmp_path / "labelled.jsonl", rows))
    assert metrics["accuracy"] == pytest.approx(np.mean(scores.argmax(1).numpy() == labels))
    losses = -scores[range(3), labels].log()
    assert metrics["loss"] == pytest.approx(float(losses.mean()), abs=1e-5)
    assert list(metrics) == ["accuracy", "loss"]


@pytest.mark.parametrize("case", ["text", "decoder", "mean"])
def test_text_classification_pipelines_take_the_model(exported: Callable[[str], Exported], case: str) -> None:
    found = exported(case)
    words = transformers.AutoTokenizer.from_pretrained(found.folder)
    pipe = transformers.pipeline("text-classification", model=load_adapter(found.folder), tokenizer=words)
    ours = [prediction for text in TEXTS for prediction in predict(found.folder, [text])]
    for size in (1, 3):
        for one, other in zip(pipe(TEXTS, batch_size=size), ours, strict=True):
            assert one == {"label": other["label"], "score": pytest.approx(other["score"], abs=1e-5)}


def test_numbers_are_predicted_of_pairs(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("pairs")
    expected = found.logits(TEXTS, TEXTS[::-1])[:, 0].tolist()
    assert predict(found.folder, [TEXTS[0], TEXTS[2]]) == [{"number": pytest.approx(expected[0], abs=1e-4)}]
    rows = [{"one": one, "two": two} for one, two in zip(TEXTS, TEXTS[::-1], strict=True)]
    file = write_rows(tmp_path / "new.jsonl", rows)
    assert [row["number"] for row in predict(found.folder, [file])] == pytest.approx(expected, abs=1e-4)
    words = transformers.AutoTokenizer.from_pretrained(found.folder)
    pipe = transformers.pipeline("text-classification", model=load_adapter(found.folder), tokenizer=words)
    [given] = [pipe({"text": TEXTS[0], "text_pair": TEXTS[2]})]
    given = given[0] if isinstance(given, list) else given
    assert given == {"label": "alike", "score": pytest.approx(expected[0], abs=1e-4)}
    with pytest.raises(UserError, match="1 texts, but a record has 2: one, two"):
        predict(found.folder, [TEXTS[0]])


def test_images_are_predicted_of_files_as_a_pipeline_does(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("images")
    paths = photos(tmp_path, 3)
    ours = predict(found.folder, paths)
    processor = transformers.AutoImageProcessor.from_pretrained(found.folder)
    pipe = transformers.pipeline("image-classification", model=load_adapter(found.folder), image_processor=processor)
    for one, other in zip(pipe(paths), ours, strict=True):
        assert one[0] == {"label": other["label"], "score": pytest.approx(other["score"], abs=1e-5)}
    assert len({prediction["score"] for prediction in ours}) == 3
    (tmp_path / "images.csv").write_text("image\n0.png\n2.png\n")
    approx = [{"label": row["label"], "score": pytest.approx(row["score"])} for row in (ours[0], ours[2])]
    assert predict(found.folder, [str(tmp_path / "images.csv")]) == approx
    with pytest.raises(UserError, match="no such image"):
        predict(found.folder, [paths[0], "missing.png"])


def test_questions_are_answered_by_the_best_span(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("questions")
    question, context = "not a plot", "a fine film and at all long good bad secret"
    encoded = found.tokenizer(question, context, return_tensors="pt")
    with torch.inference_mode():
        outputs = found.model.peft_model(**encoded)
    places = [index for index, part in enumerate(encoded.sequence_ids(0)) if part == 1]
    spans = [(start, end) for start in places for end in places if start <= end]
    start, end = max(spans, key=lambda span: float(outputs.start_logits[0, span[0]] + outputs.end_logits[0, span[1]]))
    words = context.split()
    answer = " ".join(words[start - places[0] : end - places[0] + 1])
    assert predict(found.folder, [question, context]) == [{"answer": answer}]
    answers = {"text": [answer], "answer_start": [context.index(answer)]}
    row = {"question": question, "context": context}
    file = write_rows(tmp_path / "new.jsonl", [row, row])
    assert predict(found.folder, [file]) == [{"answer": answer}] * 2
    metrics = evaluate(found.folder, write_rows(tmp_path / "labelled.jsonl", [row | {"answers": answers}]))
    assert metrics["exact_match"] == metrics["f1"] == 1


def test_prompts_are_continued_greedily(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("prompts")
    words = found.tokenizer
    chat = words.apply_chat_template([{"role": "user", "content": "what"}], tokenize=False, add_generation_prompt=True)

    def greedy(text: str, most: int) -> str:
        ids = words(text, add_special_tokens=False)["input_ids"]
        new: list[int] = []
        while len(new) < most and words.convert_tokens_to_ids(END) not in new:
            with torch.inference_mode():
                new.append(int(found.model.peft_model(input_ids=torch.tensor([ids + new])).logits[0, -1].argmax()))
        return str(words.decode(new, skip_special_tokens=True))

    assert predict(found.folder, ["what is"], answer_tokens=5) == [{"text": greedy("what is", 5)}]
    assert predict(found.folder, ["what"], answer_tokens=5, chat=True) == [{"text": greedy(chat, 5)}]
    prompts = ["no secret", "what", "Question:"]
    file = write_rows(tmp_path / "new.jsonl", [{"ask": text} for text in prompts])
    assert predict(found.folder, [file], answer_tokens=4) == [{"text": greedy(text, 4)} for text in prompts]
    talks = [[{"role": "user", "content": "what"}, {"role": "assistant", "content": "ignored"}]]
    file = write_rows(tmp_path / "talks.jsonl", [{"ask": talk} for talk in talks])
    assert predict(found.folder, [file], answer_tokens=5) == [{"text": greedy(chat, 5)}]
    pipe = transformers.pipeline(
        "text-generation",
        model=load_adapter(found.folder),
        tokenizer=transformers.AutoTokenizer.from_pretrained(found.folder),
    )
    given = pipe("what is", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert given[0]["generated_text"] == greedy("what is", 5)
    assert load_adapter(found.folder).config.use_cache


def test_evaluation_is_that_of_a_run(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("prompts")
    file = write_rows(
        tmp_path / "test.jsonl", [{"ask": "what is", "say": " it"}, {"ask": "no", "say": " secret at all"}]
    )
    task = load_tests(found.export.task.model_copy(update={"test": file}), str(found.base))
    expected = task.evaluate(found.model.peft_model, 1000, "cpu")
    assert evaluate(found.folder, file) == pytest.approx(expected, rel=1e-4)


def card_lines(folder: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)\n```", (folder / "README.md").read_text(), flags=re.S)


@pytest.mark.parametrize("case", [case for case in CASES if case != "mean"])
def test_the_lines_of_the_card_load_the_same_model_with_peft(
    exported: Callable[[str], Exported], case: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    found = exported(case)
    monkeypatch.chdir(found.folder.parent)
    ours: dict[str, Any] = {}
    plain: dict[str, Any] = {}
    with_lorica, with_peft = card_lines(found.folder)
    exec(with_lorica, ours)
    exec(with_peft, plain)
    assert not [str(warning.message) for warning in recwarn if "adapter keys" in str(warning.message)]
    inputs = padded_inputs(found, case)
    with torch.inference_mode():
        expected, given = ours["model"](**inputs), plain["model"](**inputs)
    for name in ("logits", "start_logits", "end_logits"):
        if name in expected:
            torch.testing.assert_close(given[name], expected[name], rtol=1e-4, atol=1e-4)
    if found.export.label_names:
        assert plain["model"].config.id2label == dict(enumerate(found.export.label_names))


def padded_inputs(found: Exported, case: str) -> dict[str, Any]:
    if case == "images":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    words = transformers.AutoTokenizer.from_pretrained(found.folder)
    pairs = [TEXTS[::-1]] if case in ("pairs", "questions") else []
    return dict(words(TEXTS, *pairs, padding=True, return_tensors="pt"))


def test_labels_cannot_end_the_lines_of_a_card(exported: Callable[[str], Exported]) -> None:
    section = loading_section(replace(exported("text").export, label_names=["```", "a'b\n"]), "adapter")
    assert """id2label={0: '```', 1: "a'b\\n"}""" in section
    assert section.count("````") == 2


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("automatic", ["AutoModelForSequenceClassification", *integration("AutoModel")])
def test_plain_peft_refuses_what_it_would_load_into_another_model(
    exported: Callable[[str], Exported], tmp_path: Path, family: str, automatic: str
) -> None:
    """Without the refusal, PEFT finds query and value in the other model, warns of missing keys, and goes on."""
    torch.manual_seed(0)
    CLASSIFIERS[family]().base_model.save_pretrained(tmp_path / "base")
    write_tokenizer(tmp_path / "base")
    config = ModelConfig(base=str(tmp_path / "base"), pooling="mean")
    task = TaskConfig(type="text-classification", train="", test="")
    model = adapt(load_base(config, task.type, NAMES, 0), LoraSection(r=2), config, 0, torch.device("cpu"))
    export_adapter(model, {}, tmp_path / "adapter", Export(config, task, NAMES, 0), "card")
    base = getattr(transformers, automatic).from_pretrained(tmp_path / "base")
    # What is said of a model with a head of its own is PEFT's; of any other, PEFT quotes the comment.
    alone = r"load this adapter with lorica\.load_adapter.*not found in the base model"
    message = alone if automatic == "AutoModel" else "No modules were targeted for adaptation"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(base, tmp_path / "adapter")
    with pytest.raises(ValueError, match="No modules were targeted for adaptation"):
        AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    assert load_adapter(tmp_path / "adapter").config.id2label == dict(enumerate(NAMES))


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_is_one_of_transformers(exported: Callable[[str], Exported], tmp_path: Path, case: str) -> None:
    found = exported(case)
    write_merged(found.folder, tmp_path / "merged")
    assert not list((tmp_path / "merged").glob("adapter*"))
    automatic = getattr(transformers, MERGED_CLASSES.get(case, "AutoModelForSequenceClassification"))
    merged = automatic.from_pretrained(tmp_path / "merged").eval()
    inputs = padded_inputs(found, case)
    with torch.inference_mode():
        given, expected = merged(**inputs), load_adapter(found.folder)(**inputs)
    name = "start_logits" if case == "questions" else "logits"
    torch.testing.assert_close(given[name], expected[name], rtol=1e-4, atol=1e-4)
    if found.export.label_names:
        assert merged.config.id2label == dict(enumerate(found.export.label_names))
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert "## Privacy" in card
    [lines] = card_lines(tmp_path / "merged")
    assert f'{automatic.__name__}.from_pretrained("merged"' in lines
    with pytest.raises(UserError, match="not empty"):
        write_merged(found.folder, tmp_path / "merged")


def test_a_merged_mean_pooled_model_loads_with_its_own_code_beside_lorica(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    found = exported("mean")
    write_merged(found.folder, tmp_path / "merged")
    automatic = transformers.AutoModelForSequenceClassification
    inputs = padded_inputs(found, "mean")
    for trusted in (True, False, True):
        merged = automatic.from_pretrained(tmp_path / "merged", trust_remote_code=trusted).eval()
        with torch.inference_mode():
            torch.testing.assert_close(merged(**inputs).logits, load_adapter(found.folder)(**inputs).logits)


@pytest.mark.integration
def test_a_merged_mean_pooled_model_loads_where_lorica_is_not_imported(
    exported: Callable[[str], Exported], tmp_path: Path
) -> None:
    found = exported("mean")
    write_merged(found.folder, tmp_path / "merged")
    inputs = padded_inputs(found, "mean")
    torch.save(inputs, tmp_path / "inputs.pt")
    [lines] = card_lines(tmp_path / "merged")
    script = f"import sys, torch\n{lines}\nassert not any(name.startswith('lorica') for name in sys.modules)\n"
    script += "torch.save(model(**torch.load('inputs.pt')).logits.detach(), 'logits.pt')"
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120, env={"HF_HOME": str(tmp_path)}
    )
    with torch.inference_mode():
        expected = load_adapter(found.folder)(**inputs).logits
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_whose_base_has_moved_says_what_to_give(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported("mean")
    place = Path(shutil.copytree(found.folder.parent, tmp_path / "elsewhere"))
    described = json.loads((place / "adapter" / "lorica.json").read_text())
    described["model"]["base"] = str(tmp_path / "gone")
    (place / "adapter" / "lorica.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"base = .*gone.*: no such folder. Give its folder or hub id: --base"):
        predict(place / "adapter", [TEXTS[0]])
    moved = str(place / "base model")
    assert predict(place / "adapter", [TEXTS[0]], base=moved) == predict(found.folder, [TEXTS[0]])
    monkeypatch.chdir(place)
    assert predict("adapter", [TEXTS[0]], base="./base model") == predict(found.folder, [TEXTS[0]])
    other = exported("text")
    with pytest.raises(UserError, match="not the model that the adapter was trained on"):
        load_adapter(place / "adapter", base=str(other.base))


def test_a_copy_names_the_base_that_others_have(exported: Callable[[str], Exported], tmp_path: Path) -> None:
    found = exported("text")
    copy_adapter(found.folder, tmp_path / "plain")
    assert {path.name: path.read_bytes() for path in (tmp_path / "plain").iterdir()} == {
        path.name: path.read_bytes() for path in found.folder.iterdir()
    }
    base = Path(shutil.copytree(found.base, tmp_path / "org-model"))
    copy_adapter(found.folder, tmp_path / "copy", str(base))
    assert json.loads((tmp_path / "copy" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert 'from_pretrained("org-model"' in (tmp_path / "copy" / "README.md").read_text()
    assert predict(tmp_path / "copy", [TEXTS[0]]) == predict(found.folder, [TEXTS[0]])
    with pytest.raises(UserError, match="not the model that"):
        copy_adapter(found.folder, tmp_path / "wrong", str(exported("mean").base))
    assert not (tmp_path / "wrong").exists()


class Hub:
    """In the place of the hub: keeps what is uploaded."""

    files: dict[str, bytes]
    created: tuple[str, bool]

    def create_repo(self, repository: str, private: bool, exist_ok: bool) -> None:
        if repository == "nobody/taken":
            raise OSError("no route to the hub")
        Hub.created = (repository, private)

    def upload_folder(self, repo_id: str, folder_path: Path, commit_message: str) -> Any:
        assert repo_id == Hub.created[0]
        Hub.files = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


def test_an_adapter_is_pushed_with_a_base_that_others_have(
    exported: Callable[[str], Exported], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = exported("text")
    monkeypatch.setattr("lorica.adapters.share.HfApi", Hub)
    with pytest.raises(UserError, match=r"others do not have this folder\. Name the base model's hub id"):
        push_adapter(found.folder, "me/adapter")
    assert push_adapter(found.folder, "me/adapter", "org/encoder") == "https://hub/me/adapter/commit/1"
    assert Hub.created == ("me/adapter", True)
    assert Hub.files.keys() == {path.name for path in found.folder.iterdir()}
    assert Hub.files["adapter_model.safetensors"] == (found.folder / "adapter_model.safetensors").read_bytes()
    card = ModelCard(Hub.files["README.md"].decode())
    assert card.data.base_model == "org/encoder"
    assert 'from_pretrained("org/encoder", id2label' in card.text
    # Not where the model was on this machine.
    assert not [name for name, content in Hub.files.items() if str(found.base).encode() in content]
    with pytest.raises(UserError, match="no route to the hub"):
        push_adapter(found.folder, "nobody/taken", "org/encoder")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("lorica.adapters.share.HfApi", lambda: HfApi("http://127.0.0.1:1", token="hf_none"))
    with pytest.raises(UserError, match=r"refused.*check the name and the network"):
        push_adapter(found.folder, "me/adapter", "org/encoder")


def test_a_run_is_no_adapter_but_has_one(exported: Callable[[str], Exported]) -> None:
    found = exported("text")
    with pytest.raises(UserError, match=rf"has no lorica\.json\. Give {re.escape(str(found.folder))}"):
        load_adapter(found.folder.parent)


def test_a_misspelt_file_is_no_text(exported: Callable[[str], Exported]) -> None:
    found = exported("text")
    with pytest.raises(UserError, match="no such file"):
        predict(found.folder, ["reviews.csv"])
    with pytest.raises(UserError, match="no such text file"):
        predict(found.folder, ["photo.png"])
    assert predict(found.folder, ["a long " * 3000])


def test_the_commands_print_what_scripts_and_people_read(
    exported: Callable[[str], Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "console", Console(width=150))
    adapter = str(exported("text").folder)
    run = partial(CliRunner().invoke, cli.app)
    [expected] = predict(adapter, [TEXTS[0]])
    assert run(["predict", adapter, TEXTS[0]]).stdout == f"{expected['label']} ({100 * expected['score']:.1f} %)\n"
    assert json.loads(run(["predict", adapter, TEXTS[0], "--json"]).stdout) == expected
    rows = [{"text": text, "label": NAMES[index]} for index, text in enumerate(TEXTS)]
    file = write_rows(tmp_path / "labelled.jsonl", rows)
    lines = run(["predict", adapter, file]).stdout.splitlines()
    assert [json.loads(line)["label"] for line in lines] == [row["label"] for row in predict(adapter, [file])]
    metrics = evaluate(adapter, file)
    assert json.loads(run(["evaluate", adapter, file, "--json"]).stdout) == metrics
    table = run(["evaluate", adapter, file]).stdout
    assert f"{metrics['accuracy']:.4f}" in table
    for command in (["predict", adapter, "missing.csv"], ["evaluate", adapter, "missing.csv", "--json"]):
        done = run(command)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "no such file" in done.stderr
    assert run(["export", adapter, str(tmp_path / "merged"), "--merge"]).exit_code == 0
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert run(["export", adapter, str(tmp_path / "copy")]).exit_code == 0
    assert (tmp_path / "copy" / "adapter_model.safetensors").is_file()


def test_what_is_predicted_is_not_kept(exported: Callable[[str], Exported], own_home: Path) -> None:
    found = exported("text")
    records = own_home / "cache" / "records"
    before = set(records.iterdir()) if records.exists() else set()
    predict(found.folder, [" ".join(WORDS)])
    assert (set(records.iterdir()) if records.exists() else set()) == before
