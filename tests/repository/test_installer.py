"""pip's configuration as uv and our own download see it, and failures as one sentence."""

import base64
import hashlib
import http.server
import itertools
import json
import subprocess
import sys
import threading
import zipfile
from functools import partial
from pathlib import Path

import pytest

from tests.tools import index_file, pip_config, torch_build
from tests.tools.console import ExpectedFailure, Step
from tests.tools.installer import Installer, download_in, explain, run_logged
from tests.tools.stamps import ROOT, home_folder

LISTED = """\
:env:.cert='/etc/ca.pem'
:env:.default-timeout='180'
:env:.find-links='/wheels'
global.constraint='/etc/c.txt /etc/d.txt'
global.extra-index-url='https://one/simple\\nhttps://two/simple'
global.find-links='/other'
global.index-url='https://first/simple'
install.trusted-host='one'
list.format='columns'
"""


def test_reads_pips_configuration_as_pip_weighs_it():
    config = pip_config.parse(LISTED, {})
    assert config["find-links"] == ["/wheels"]  # a variable wins over a file
    assert config["constraint"] == ["/etc/c.txt", "/etc/d.txt"]
    assert config["index-url"] == ["https://first/simple"]
    assert config["extra-index-url"] == ["https://one/simple", "https://two/simple"]
    assert (config["cert"], config["trusted-host"]) == (["/etc/ca.pem"], ["one"])
    assert config["timeout"] == ["180"]
    assert pip_config.parse("", {}) == {}
    assert pip_config.parse("", {"REQUESTS_CA_BUNDLE": "/r.pem"}) == {"cert": ["/r.pem"]}


def test_uv_is_told_all_of_it():
    told = pip_config.for_uv(pip_config.parse(LISTED, {}))
    pairs = list(itertools.pairwise(told))
    for option, value in (
        ("--default-index", "https://first/simple"),
        ("--index", "https://one/simple"),
        ("--index", "https://two/simple"),
        ("--find-links", "/wheels"),
        ("--constraints", "/etc/c.txt"),
        ("--constraints", "/etc/d.txt"),
        ("--allow-insecure-host", "one"),
        ("--index-strategy", "unsafe-best-match"),
    ):
        assert (option, value) in pairs
    assert "--no-index" in pip_config.for_uv(pip_config.parse("global.no-index='true'", {}))
    assert "--no-index" not in told


def test_uv_gets_certificate_and_proxy_and_none_of_its_own_settings():
    config = {"cert": ["/ca.pem"], "proxy": ["http://p:1"], "timeout": ["9"]}
    env = {"UV_INDEX_URL": "https://else/", "UV_CACHE_DIR": "/c", "A": "b"}
    got = pip_config.uv_environment(config, env)
    assert "UV_INDEX_URL" not in got
    assert (got["UV_CACHE_DIR"], got["A"], got["UV_HTTP_TIMEOUT"]) == ("/c", "b", "9")
    assert got["SSL_CERT_FILE"] == "/ca.pem"
    assert got["https_proxy"] == got["HTTP_PROXY"] == "http://p:1"


# wheels and indexes of this test's own


def make_wheel(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as wheel:
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")
    return file


def make_index(folder: Path, *releases: tuple[str, str]) -> str:
    """An index in a folder; returns its URL."""
    for name, version in releases:
        make_wheel(folder / name, name, version)
    for project in folder.iterdir():
        links = [f'<a href="{w.name}">{w.name}</a>' for w in sorted(project.glob("*.whl"))]
        (project / "index.html").write_text("<!DOCTYPE html><html><body>" + "\n".join(links))
    return folder.as_uri()


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """Give pip a configuration file of its own, and variables; returns an installer that sees it."""
    for name in ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT"):
        monkeypatch.delenv(name, raising=False)
    home = home_folder(ROOT)
    empty = tmp_path / "empty.txt"
    empty.touch()

    def build(**settings) -> Installer:
        file = tmp_path / "pip.conf"
        settings = {"extra_index_url": "", "find_links": "", "constraint": str(empty), **settings}
        lines = [f"{key.replace('_', '-')} = {value}" for key, value in settings.items()]
        file.write_text("[global]\n" + "\n".join(lines) + "\n")
        monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
        return Installer(home)

    return build


def uv_takes(installer: Installer, requirement: str) -> str:
    command = [installer.uv, "pip", "install", "--dry-run", "--no-deps", "--python", sys.executable]
    code, output = run_logged(
        [*command, "--reinstall", requirement, *pip_config.for_uv(installer.config)],
        installer.log,
        pip_config.uv_environment(installer.config),
    )
    assert code == 0, output
    name = requirement.partition("=")[0]
    return next(line[4 + len(name) :] for line in output.splitlines() if f"+ {name}==" in line)[1:]


def pip_takes(requirement: str) -> str:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"]
    report = subprocess.run(
        [*command, "--ignore-installed", "--report", "-", requirement],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(report.stdout)["install"][0]["metadata"]["version"]


@pytest.mark.parametrize(
    ("settings", "asked", "taken"),
    [
        ({}, "torch==2.13.0", "2.13.0"),
        ({"find_links": "{links}"}, "torch==2.13.0", "2.13.0+cpu"),
        ({"find_links": "{links}"}, "torch===2.13.0", "2.13.0"),
        ({"extra_index_url": "{more}", "constraint": "{cap}"}, "torch", "2.14.0"),
        ({"find_links": "{links}", "no_index": "true"}, "torch", "2.13.0+cpu"),
    ],
)
def test_uv_takes_the_torch_that_pip_takes(configure, tmp_path, settings, asked, taken):
    make_wheel(tmp_path / "links", "torch", "2.13.0+cpu")
    index = make_index(tmp_path / "index", ("torch", "2.13.0"), ("torch", "2.14.0"))
    more = make_index(tmp_path / "more", ("torch", "2.15.0"))
    (tmp_path / "cap.txt").write_text("torch<=2.14.1\n")
    places = {"links": tmp_path / "links", "more": more, "cap": tmp_path / "cap.txt"}
    settings = {key: value.format(**places) for key, value in settings.items()}
    installer = configure(index_url=index, **settings)
    if installer.uv is None:
        pytest.skip("there is no uv for this system")
    assert pip_takes(asked) == taken
    assert uv_takes(installer, asked) == taken


@pytest.mark.parametrize(
    ("gpu", "version"), [(False, "2.13.0+cpu"), (True, "2.13.0")], ids=["cpu", "gpu"]
)
def test_torch_comes_in_the_build_that_pip_takes(
    configure, tmp_path, monkeypatch, gpu, version, capsys
):
    cpu = make_wheel(tmp_path / "links", "torch", "2.13.0+cpu")
    index = make_index(tmp_path / "index", ("torch", "2.13.0"), ("torch", "2.14.0"))
    cuda = tmp_path / "index" / "torch" / "torch-2.13.0-py3-none-any.whl"
    known = {hashlib.sha256(file.read_bytes()).hexdigest() for file in (cpu, cuda)}
    monkeypatch.setattr(torch_build, "known_hashes", lambda: known)
    monkeypatch.setattr(sys, "platform", "linux")
    installer = configure(index_url=index, find_links=tmp_path / "links")
    installer.home = tmp_path / "home"
    build = torch_build.fetch(installer, gpu, {}, Step("Fetching"))
    assert (build.version, build.sha256 in known, build.named) == (version, True, False)


def test_an_unknown_build_of_torch_has_to_be_named(configure, tmp_path):
    make_wheel(tmp_path / "links", "torch", "2.13.0+other")
    installer = configure(no_index="true", find_links=tmp_path / "links")
    installer.home = tmp_path / "home"
    with pytest.raises(ExpectedFailure, match=r"ADASPA_TORCH=torch==2\.13\.0\+other"):
        torch_build.fetch(installer, False, {}, Step("Fetching"))
    named = {"ADASPA_TORCH": "torch==2.13.0+other"}
    build = torch_build.fetch(installer, False, named, Step("Fetching"))
    assert (build.version, build.named) == ("2.13.0+other", True)


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_a_file_with_another_hash_is_not_installed(configure, tmp_path, tool):
    wheel = make_wheel(tmp_path / "links", "something", "1.0")
    installer = configure(no_index="true", find_links=tmp_path / "links")
    if tool == "pip":
        installer.uv = None
    elif installer.uv is None:
        pytest.skip("there is no uv for this system")
    target = tmp_path / "target"
    listed = tmp_path / "listed.txt"
    args = ["--no-deps", "--target", str(target), "-r", str(listed)]
    listed.write_text(f"something==1.0 --hash=sha256:{'0' * 64}\n")
    with pytest.raises(ExpectedFailure, match="not the one this project knows"):
        installer.install(sys.executable, args, Step("Installing"))
    right = hashlib.sha256(wheel.read_bytes()).hexdigest()
    listed.write_text(f"something==1.0 --hash=sha256:{right}\n")
    installer.install(sys.executable, args, Step("Installing"))
    assert (target / "something-1.0.dist-info").is_dir()


# one file of an index


class _Asked(http.server.SimpleHTTPRequestHandler):
    """Serves a folder to who knows the password."""

    def do_GET(self):
        word = base64.b64encode(b"me:p@ss").decode()
        if self.headers.get("Authorization") != f"Basic {word}":
            self.send_error(401)
            return
        super().do_GET()

    def log_message(self, *args):
        pass


def test_fetches_a_file_from_an_index_that_asks_for_a_password(tmp_path):
    project = tmp_path / "served" / "simple" / "some-project"
    project.mkdir(parents=True)
    (project / "a-1.tar.gz").write_bytes(b"content")
    (project / "index.html").write_text(
        '<a href="b-1.tar.gz">b</a>\n<a data-x="&lt;" href="./a-1.tar.gz#sha256=0">a-1.tar.gz</a>'
    )
    handler = partial(_Asked, directory=str(tmp_path / "served"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"127.0.0.1:{server.server_port}/simple"
        target = tmp_path / "a-1.tar.gz"
        with pytest.raises(OSError, match="401"):
            index_file.fetch({"index-url": [f"http://{here}"]}, "", "some-project", target)
        # the second index has it
        first, second = (tmp_path / "none").as_uri(), f"http://me:p%40ss@{here}"
        config = {"index-url": [first], "extra-index-url": [second]}
        index_file.fetch(config, "", "some-project", target)
        server.shutdown()
    assert target.read_bytes() == b"content"


def test_fetches_a_file_from_a_folder_and_from_an_index_in_one(tmp_path):
    index = make_index(tmp_path / "index", ("thing", "1.0"))
    name = "thing-1.0-py3-none-any.whl"
    found = [tmp_path / place / name for place in ("from_index", "from_folder")]
    for file, config in zip(
        found,
        ({"index-url": [index]}, {"find-links": [str(tmp_path / "index" / "thing")]}),
        strict=True,
    ):
        file.parent.mkdir()
        index_file.fetch({**config, "no-index": ["no"]}, "", "thing", file)
    assert found[0].read_bytes() == found[1].read_bytes()
    with pytest.raises(OSError, match=r"no package index of pip's has other\.whl"):
        index_file.fetch({"index-url": [index]}, "", "thing", tmp_path / "other.whl")
    with pytest.raises(OSError, match=r"no package index of pip's has other\.whl"):
        config = {"index-url": [index], "no-index": ["1"]}
        index_file.fetch(config, "", "thing", tmp_path / "other.whl")


def test_reads_pips_own_index_from_its_help():
    run = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--help"], capture_output=True, text=True,
        check=True, env={"COLUMNS": "1000", "PIP_CONFIG_FILE": "/dev/null", "PATH": ""},
    )  # fmt: skip
    assert index_file.default_index(run.stdout)[0].startswith("https://")


# what is said


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("OSError: [Errno 28] No space left on device", "disk is full"),
        ("error: failed to write: No space left on device (os error 28)", "disk is full"),
        ("NewConnectionError('<HTTPSConnection>: Failed to establish', )", "cannot be reached"),
        ("  Caused by: error sending request for url (https://x)", "cannot be reached"),
        ("SSLError(SSLCertVerificationError(1, 'CERTIFICATE_VERIFY_FAILED'))", "certificate"),
        ("error sending request\n  invalid peer certificate: UnknownIssuer", "certificate"),
        ("ERROR: No matching distribution found for torch==2.13.0\n", "no torch==2.13.0 for this"),
        (
            "  cause: Because there is no version of x==1 and you require x==1",
            "no x==1 for this",
        ),
        ("  cause: Because x was not found in the provided package locations", "no x for this"),
        ("ERROR: THESE PACKAGES DO NOT MATCH THE HASHES FROM", "not the one this project knows"),
        ("Collecting x\nERROR: broken thing\n\n", "broken thing"),
    ],
)
def test_failures_become_one_sentence(output, says):
    sentence = explain(output)
    assert says in sentence
    assert "\n" not in sentence


def test_reads_the_size_of_a_download():
    assert download_in("  Downloading a-1.whl (526.6 MB)") == ("a-1.whl", 526.6e6)
    assert download_in("Using cached a-1.whl (1.0 kB)") == ("a-1.whl", 1e3)
    assert download_in("Downloading a (2.0MiB)") == ("a", 2 * 2**20)
    assert download_in("  Downloading a-1.whl.metadata (31 kB)") is None
    assert download_in("Collecting a") is None
