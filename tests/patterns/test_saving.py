"""A file appears whole or not at all, and none is lost."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sparse_attn.patterns.file import load, save
from sparse_attn.patterns.pattern import CarriedPattern
from tests.patterns.example_pattern import FAMILY, LAYOUT, a_pattern

ROOT = Path(__file__).parents[2]


def test_nothing_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="no pattern to save"):
        save(CarriedPattern(FAMILY, LAYOUT, "64"), tmp_path, "none")
    assert not list(tmp_path.iterdir())


@pytest.fixture(params=["links", "no links"])
def links(request, monkeypatch):
    """A file system with hard links, and one without."""

    def refused(*args):
        raise OSError("not supported")

    if request.param == "no links":
        monkeypatch.setattr(os, "link", refused)


def test_a_failed_save_leaves_no_part_and_the_earlier_file(file, monkeypatch, links):
    before = file.read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save(a_pattern(), file.parent, "city")
    assert file.read_bytes() == before
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_save_that_is_stopped_while_it_takes_its_name_leaves_nothing(tmp_path, monkeypatch):
    def stopped(*args):
        raise KeyboardInterrupt

    for step, after in (("link", "replace"), ("replace", "link")):
        monkeypatch.setattr(os, step, stopped)
        if after == "link":
            monkeypatch.setattr(os, "link", lambda *args: os.stat(tmp_path / "absent"))
        with pytest.raises(KeyboardInterrupt):
            save(a_pattern(), tmp_path, "city")
        assert not list(tmp_path.iterdir())


def test_a_file_that_others_may_read(file):
    plain = file.with_name("plain")
    plain.touch()
    assert file.stat().st_mode == plain.stat().st_mode


SAVER = """
import sys
from pathlib import Path
from sparse_attn.patterns.file import load, save
pattern = load(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(10):
    save(pattern, Path(sys.argv[2]), "tower")
"""


def assert_a_file_each(folder, paths, count):
    """Fail unless `count` savers of "tower", among them those of `paths`, wrote a file each."""
    numbered = [f"tower_{n:05}_.safetensors" for n in range(1, count)]
    assert sorted(path.name for path in folder.iterdir()) == ["tower.safetensors", *numbered]
    assert len(set(paths)) == len(paths)
    assert all(len(load(path).layers) == 2 for path in folder.iterdir())


def test_threads_that_save_one_name_never_overwrite_each_other(tmp_path, links):
    pattern, folder = a_pattern(), tmp_path / "new" / "folder"
    with ThreadPoolExecutor(30) as threads:
        paths = list(threads.map(lambda _: save(pattern, folder, "tower"), range(60)))
    assert_a_file_each(folder, paths, 60)


def test_processes_that_save_one_name_never_overwrite_each_other(file, tmp_path):
    folder = tmp_path / "new"
    process = subprocess.Popen(
        [sys.executable, "-c", SAVER, file, folder], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with process:
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        paths = [save(a_pattern(), folder, "tower") for _ in range(10)]
    assert process.returncode == 0
    assert_a_file_each(folder, paths, 20)
