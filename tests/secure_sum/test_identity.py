"""Identity keys: Ed25519 as RFC 8032 has it, and files that only their owner can read."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat
from typer.testing import CliRunner

from lorica.cli import app
from lorica.errors import UserError
from lorica.owner.identity import make_identity, read_identity
from lorica.privacy.policy import Policy
from lorica.secure_sum.identity import Identity, Member

# RFC 8032, section 7.1, test 1: the empty message.
SECRET = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
PUBLIC = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
SIGNATURE = bytes.fromhex(
    "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24"
    "655141438e7a100b"
)


def test_signatures_are_those_of_rfc_8032() -> None:
    identity = Identity(Ed25519PrivateKey.from_private_bytes(SECRET))
    assert identity.public().key == PUBLIC
    assert identity.sign(b"") == SIGNATURE
    assert Member(PUBLIC).signed(b"", SIGNATURE)
    assert not Member(PUBLIC).signed(b"x", SIGNATURE)
    for index in (0, 31, 32, 63):
        altered = SIGNATURE[:index] + bytes([SIGNATURE[index] ^ 1]) + SIGNATURE[index + 1 :]
        assert not Member(PUBLIC).signed(b"", altered)
    for wrong in (b"", SIGNATURE[:-1], SIGNATURE + b"\0"):
        assert not Member(PUBLIC).signed(b"", wrong)


def test_lines_go_there_and_back() -> None:
    line = str(Member(PUBLIC, "clinic-a"))
    assert line == f"ed25519:{PUBLIC.hex()} clinic-a"
    assert Member.of(line) == Member(PUBLIC, "clinic-a")
    assert Member.of(line.split()[0]) == Member(PUBLIC)
    for wrong in (
        "",
        "ed25519:",
        line[:-20],
        line.upper(),
        f"{line} x",
        line.replace("ed25519", "x25519"),
        f"{line}\n",
    ):
        with pytest.raises(ValueError, match="not a public key as `lorica flower keys` prints it"):
            Member.of(wrong)


def test_the_command_makes_a_key_once_and_prints_the_line_for_policies(tmp_path: Path) -> None:
    folder = tmp_path / "keys"
    umask = os.umask(0)
    try:
        first = CliRunner().invoke(app, ["flower", "keys", str(folder), "--name", "clinic-a"])
    finally:
        os.umask(umask)
    again = CliRunner().invoke(app, ["flower", "keys", str(folder), "--name", "clinic-a"])
    assert first.exit_code == 0
    assert first.output == again.output == (folder / "identity.pub").read_text()
    assert stat.S_IMODE((folder / "identity.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    line = first.output.strip()
    assert read_identity(folder / "identity.key").public("clinic-a") == Member.of(line)
    policy = {"max_epsilon": 1, "delta": 1e-5, "base_models": None, "tasks": [{"type": "text-classification"}]}
    assert Policy(**policy, members={0: line}).members == {0: line}
    other = str(Identity.new().public())
    for wrong, problem in [
        ({}, "it is empty"),
        ({0: line, 1: line.split()[0]}, "the same key"),
        ({0: other, 1: "clinic-b"}, "not a valid|as printed by `lorica flower keys`"),
    ]:
        with pytest.raises(ValueError, match=problem):
            Policy(**policy, members=wrong)


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    make_identity(tmp_path, "a")
    path = tmp_path / "identity.key"
    for mode in (0o640, 0o604, 0o660):
        path.chmod(mode)
        with pytest.raises(UserError, match=r"node-config\.identity.*other accounts can read it.*chmod 600"):
            read_identity(path)


def test_what_is_no_identity_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "identity.key"
    with pytest.raises(UserError, match=r"node-config\.identity.*cannot be read"):
        read_identity(path)
    curve = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    locked = Ed25519PrivateKey.generate().private_bytes(
        Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret")
    )
    for content in (b"", b"key", b"\xff", curve, locked):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(UserError, match=r"node-config\.identity.*not an Ed25519 private key"):
            read_identity(path)
        with pytest.raises(UserError, match="not an Ed25519 private key"):
            # Nor is it overwritten.
            make_identity(tmp_path, "a")


def test_a_name_that_would_not_be_read_back_is_refused(tmp_path: Path) -> None:
    for name in ("", "clinic a", "a\nb", "x" * 101):
        with pytest.raises(UserError, match="--name"):
            make_identity(tmp_path / "keys", name)
    assert not (tmp_path / "keys").exists()
