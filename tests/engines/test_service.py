"""A node as a service of systemd, and the certificates of a hub."""

from __future__ import annotations

import getpass
import re
import shlex
import shutil
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lorica.cli import app
from lorica.engines.flower import service
from lorica.engines.flower.service import ENVIRONMENT, UNIT, write_service
from lorica.errors import UserError
from tests.engines.test_loopback import EXAMPLE
from tests.engines.test_policy_draft import node, written
from tests.scripts import load_script

__all__ = ["node"]
DOCS = Path(__file__).parent.parent.parent / "docs" / "federation.md"
OPTIONS = ["--superlink", "hub.example.org:8443", "--root-certificates", "ca.crt", "--node-config"]
with_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def unit_of(folder: Path) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in (folder / UNIT).read_text(encoding="utf-8").splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def environment_of(folder: Path) -> dict[str, str]:
    """As a shell reads the file, whose quoting systemd shares."""
    lines = (folder / ENVIRONMENT).read_text(encoding="utf-8").splitlines()
    assignments = [line.partition("=") for line in lines if line and not line.startswith("#")]
    return {key: "".join(shlex.split(value)) for key, _, value in assignments}


@with_systemd
@pytest.mark.parametrize("place", ["plain", 'with space, 100 % and "quotes"'])
@pytest.mark.parametrize("gpu", [True, False])
def test_systemd_accepts_the_unit(
    tmp_path: Path, node: dict[str, str], monkeypatch: pytest.MonkeyPatch, place: str, gpu: bool
) -> None:
    monkeypatch.setattr(service, "GPUS", ("/dev/null" if gpu else "/dev/no-such-device",))
    monkeypatch.setenv("LORICA_HOME", str(tmp_path / place / "home"))
    unit = write_service(tmp_path / "service", [*OPTIONS, written(node | {"folder": str(tmp_path / "node")})])
    # Without this installation's command, which need not be in a folder of its own.
    program = tmp_path / "lorica"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    text = unit.read_text(encoding="utf-8")
    unit.write_text(re.sub(r'ExecStart="[^"]+"', f'ExecStart="{program}"', text), encoding="utf-8")
    done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    command = ["systemd-analyze", "security", "--offline=yes", "--threshold=30", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_service_gets_the_options_and_may_write_what_a_node_writes(
    tmp_path: Path, node: dict[str, str], monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ca.crt").touch()
    (tmp_path / "books").mkdir()
    configuration = written(node | {"ledger": str(tmp_path / "books" / "ledger.sqlite")})
    monkeypatch.setattr(sys, "argv", ["lorica"])
    result = CliRunner().invoke(app, ["flower", "service", "made", *OPTIONS, configuration])
    assert result.exit_code == 0, result.output
    assert "systemctl enable --now lorica-node" in result.output
    folder = tmp_path / "made"
    assert stat.S_IMODE((folder / ENVIRONMENT).stat().st_mode) == 0o600
    found = environment_of(folder)
    assert found["LORICA_NODE_CONFIG"] == configuration
    # The service starts in another folder.
    absolute = ["--superlink", "hub.example.org:8443", "--root-certificates", str(tmp_path / "ca.crt")]
    assert shlex.split(found["LORICA_NODE_OPTIONS"]) == absolute
    assert found["LORICA_HOME"] == str(own_home)
    unit = unit_of(folder)
    assert unit["User"] == [getpass.getuser()]
    assert unit["EnvironmentFile"] == [str(folder / ENVIRONMENT)]
    places = [own_home, f"{node['data']}.lorica", tmp_path / "books"]
    assert sorted(shlex.split(unit["ReadWritePaths"][0])) == sorted(map(str, places))
    assert all(Path(place).is_dir() for place in places), "systemd does not start a unit without them"
    with pytest.raises(UserError, match=r"lorica-node.service exists there"):
        write_service(folder, [*OPTIONS, configuration])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy": "policy.yaml"}, r"node-config\.policy = 'policy\.yaml': a service starts in another folder"),
        ({"data": "/missing.csv"}, r"node-config\.data = '/missing\.csv': no such file"),
    ],
)
def test_what_the_service_would_not_find_is_refused_before_anything_is_written(
    tmp_path: Path, node: dict[str, str], monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        write_service(tmp_path / "service", [*OPTIONS, written(node | changes)])
    assert not (tmp_path / "service").exists()


def assert_trusted(authority: Path, certificate: Path, key: Path, names: list[str]) -> None:
    """A TLS handshake in memory for each name, by clients that trust this authority alone."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate, key)
    for name in names:
        client = ssl.create_default_context(cafile=str(authority))
        up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
        asking = client.wrap_bio(down, up, server_hostname=name)
        answering = server.wrap_bio(up, down, server_side=True)
        for _ in range(3):
            for side in (asking, answering):
                try:
                    side.do_handshake()
                except ssl.SSLWantReadError:
                    continue
        assert asking.version() == answering.version() == "TLSv1.3"
    with pytest.raises(ssl.SSLCertVerificationError):
        assert_trusted(authority, certificate, key, ["another.example.org"])


def test_the_certificates_of_the_example_are_accepted_for_this_machine(tmp_path: Path) -> None:
    load_script(EXAMPLE).write_certificates(tmp_path)
    key = tmp_path / "server.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert_trusted(tmp_path / "ca.crt", tmp_path / "server.crt", key, ["localhost", "127.0.0.1"])


def test_the_certificates_of_the_guide_are_accepted_for_the_hub(tmp_path: Path) -> None:
    """Its commands, in another folder."""
    text = DOCS.read_text(encoding="utf-8")
    (commands,) = re.findall(r"^umask 077\n.*?^mv .*?$", text, re.DOTALL | re.MULTILINE)
    script = commands.replace("/srv/hub", str(tmp_path)).replace("python -m", f"{shlex.quote(sys.executable)} -m")
    subprocess.run(["sh", "-ec", script], check=True, capture_output=True)
    key = tmp_path / "server.key"
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    assert_trusted(tmp_path / "ca.crt", tmp_path / "server.pem", key, ["hub.example.org", "localhost", "127.0.0.1"])
