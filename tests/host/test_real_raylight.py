"""Every video model that Raylight runs on several GPUs, by its own forwards, on two ranks.

Runs where RAYLIGHT_PATH names a clone of it (https://github.com/komikndr/raylight), and writes down
what came out. LTX is missing: Raylight at c049571 unpacks a rotary embedding of another form than
that of ComfyUI 0.30.0.
"""

import json
import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from tests.host import ranks
from tests.host.family_cases import CASES, hunyuan
from tests.tools import comfy_inprocess

RESULTS = Path(__file__).parent / "results" / "raylight.json"
FIELDS = {
    "min_tokens": 64, "sparsity": 0.6, "warmup": 0.0, "precision": "bf16",
    "token_order": "position", "dense_attention": "host", "verdict": "sparse",
}  # fmt: skip
# text of both can be shared evenly by two
TEXT = 8
EXACT = (
    "wan", "vace", "camera", "scail", "causal", "cosmos", "predict2", "kandinsky-lite",
    "kandinsky-pro", "hunyuan",
)  # fmt: skip
# Raylight's own dense video is not that of one process, so they are compared with each other
INEXACT = ("speech", "humo", "animate", "dancer", "hunyuan-i2v", "hunyuan-reference")

pytestmark = pytest.mark.skipif(
    "RAYLIGHT_PATH" not in os.environ, reason="RAYLIGHT_PATH names no clone of Raylight"
)


def on_rank(rank, world, folder, names):
    comfy_inprocess.start()
    return {name: one(name, rank, world) for name in names}


def one(name, rank=0, world=1):
    """Latents: dense, with all blocks, and sparse; and the runs of the last."""
    from sparse_attn.host.raylight import packed, patched
    from tests.host import test_families
    from tests.host.family_models import build

    case = {**CASES, "hunyuan": hunyuan("hunyuan")}[name]
    model = build(case.model)
    if world > 1:
        ranks.share_by_raylight(model, rank, world, Path(os.environ["RAYLIGHT_PATH"]))
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(test_families, "TEXT", TEXT)
        settings = {**vars(AdaSpaConfig()), **FIELDS}
        dense = test_families.sample(model.clone(), case)
        whole = patched(model.clone(), {**settings, "sparsity": 0.0})
        sparse = patched(model, settings)
        return (
            dense, test_families.sample(whole, case), test_families.sample(sparse, case),
            packed(sparse),
        )  # fmt: skip


@pytest.fixture(scope="module")
def rows(comfyui, tmp_path_factory):
    from sparse_attn.host.raylight import unpacked

    names, found = (*EXACT, *INEXACT), []
    by_rank = ranks.run(on_rank, 2, tmp_path_factory.mktemp("ranks"), names)
    for name in names:
        dense, whole, sparse, _ = zip(*(results[name] for results in by_rank), strict=True)
        alone = one(name)
        runs = [unpacked(results[name][3])[-1] for results in by_rank]
        found.append(
            {
                "model": name,
                "engine_to_one_process": error(dense, alone[0]),
                "all_blocks_to_engine": error(whole, dense[0]),
                "sparse_to_one_process": error(sparse, alone[2]),
                "sparse_to_dense": error([alone[2]], alone[0]),
                "sparse_calls": [len(run.timing.sparse) for run in runs],
                "sparse_calls_of_one_process": len(unpacked(alone[3])[-1].timing.sparse),
                "warnings": [run.warnings + list(run.unseen) for run in runs],
            }
        )
    record(found)
    return {row["model"]: row for row in found}


def error(found, expected) -> float:
    """Largest difference of any to `expected`, over its largest value."""
    return max(float((x - expected).abs().max() / expected.abs().max()) for x in found)


def record(rows):
    import comfyui_version

    commit = subprocess.run(
        ["git", "-C", os.environ["RAYLIGHT_PATH"], "rev-parse", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    about = {
        "raylight": commit, "comfyui": comfyui_version.__version__, "torch": torch.__version__,
        "hardware": "CPU, two ranks over gloo", "date": f"{datetime.now(timezone.utc):%Y-%m-%d}",
        "command": "RAYLIGHT_PATH=... python -m pytest tests/host/test_real_raylight.py",
    }  # fmt: skip
    RESULTS.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_of_raylight_give_the_video_of_one_process(name, rows):
    row = rows[name]
    assert row["sparse_to_one_process"] < 1e-4
    assert row["sparse_calls"] == 2 * [row["sparse_calls_of_one_process"]]
    assert row["warnings"] == [[], []]


@pytest.mark.parametrize("name", INEXACT)
def test_all_blocks_give_the_video_of_raylight(name, rows):
    row = rows[name]
    assert row["all_blocks_to_engine"] < 1e-4
    assert row["sparse_calls"] == 2 * [row["sparse_calls_of_one_process"]]
    assert row["warnings"] == [[], []]
