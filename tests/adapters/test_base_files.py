"""A base model's hash: changes with what the model computes, and with nothing else."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from lorica.adapters.base_files import hash_of_base, resolve_base
from lorica.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(resolve_base("lorica:glyph-vit"), tmp_path / "model"))


def test_it_is_the_hash_of_names_and_contents(folder: Path) -> None:
    names = ["config.json", "model.safetensors", "preprocessor_config.json"]
    manifest = [[name, hashlib.sha256((folder / name).read_bytes()).hexdigest()] for name in names]
    expected = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    assert hash_of_base(folder) == hash_of_base("lorica:glyph-vit") == f"sha256:{expected}"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "preprocessor_config.json"])
def test_one_byte_changes_it(folder: Path, name: str) -> None:
    before = hash_of_base(folder)
    content = bytearray((folder / name).read_bytes())
    content[-1] ^= 1
    (folder / name).write_bytes(content)
    assert hash_of_base(folder) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "adapter_config.json", "pytorch_model.bin", "spiece.model"])
def test_a_file_more_or_another_name_changes_it(folder: Path, name: str) -> None:
    before = hash_of_base(folder)
    (folder / name).write_bytes(b"{}")
    with_it = hash_of_base(folder)
    (folder / name).rename(folder / f"other-{name}")
    assert len({before, with_it, hash_of_base(folder)}) == 3


def test_documents_caches_and_other_frameworks_do_not_change_it(folder: Path) -> None:
    before = hash_of_base(folder)
    (folder / "PROVENANCE.md").write_text("other words")
    for name in ("README.md", "LICENSE", ".gitattributes", "tf_model.h5"):
        (folder / name).write_text("text")
    for name in (".cache", "onnx"):
        (folder / name).mkdir()
        (folder / name / "model.safetensors").write_bytes(b"other weights")
    assert hash_of_base(folder) == before


def test_a_folder_of_links_is_what_it_links_to(folder: Path, tmp_path: Path) -> None:
    """As the hub's cache lays a snapshot out."""
    snapshot = tmp_path / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    for index, file in enumerate(sorted(folder.iterdir())):
        blob = shutil.copy(file, tmp_path / f"blob-{index}")
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    assert hash_of_base(snapshot) == hash_of_base(folder)
    (snapshot / "model.safetensors").resolve().unlink()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        hash_of_base(snapshot)


@pytest.mark.parametrize(
    ("base", "message"),
    [("./absent", "no such folder"), ("a/hub-id", "not a folder on this machine"), ("lorica:none", "no such embedded")],
)
def test_what_is_no_folder_is_refused(base: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"model\.base = .*{message}"):
        hash_of_base(base)
