"""One video on several ranks is the video of one: between an engine's all-to-alls."""

import importlib.util
from dataclasses import dataclass, field, replace
from math import prod
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.host import ulysses
from sparse_attn.host.calling_block import Callers
from sparse_attn.host.ulysses import CAUSAL, FAILED, JOINT, RING, Shards
from sparse_attn.run.statistics import RunStatistics
from sparse_attn.schedule import Schedule
from tests.host import ranks
from tests.host.host_fixtures import VIDEO, assert_other_video, assert_same_video, sample
from tests.tools import comfy_inprocess

pytestmark = pytest.mark.any_comfyui

FIELDS = {
    "min_tokens": 64, "sparsity": 0.6, "warmup": 0.0, "search_points": (0.6,), "precision": "bf16",
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A sampling on several ranks.

    Args:
        texts: tokens of the prompts. fields: settings.
        engine: yunchang or xfuser; empty shares the guidance and not the tokens.
        change: what a rank changes before it samples: change(rank, monkeypatch).
    """

    model: str = "wan_h64"
    shape: tuple[int, ...] = VIDEO
    texts: tuple[int, int] = (7, 9)
    fields: dict = field(default_factory=lambda: {"tail": "none"})
    engine: str = "yunchang"
    change: str = ""


POSITION = {"token_order": "position"}
CASES = {
    "wan": Case(),
    "wan, padded": Case(shape=(1, 16, 3, 10, 14), fields=POSITION),
    "wan, recall": Case(fields={"recall": 0.8, "tail": "none"}),
    "wan, similarity": Case(fields={}),
    "wan, xfuser": Case(engine="xfuser", fields=POSITION),
    "wan, batch of prompts": Case(texts=(7, 7)),
    "hunyuan": Case("hunyuan", texts=(8, 8)),
    "guidance": Case(texts=(7, 7), engine=""),
}
OTHERS = {
    "hunyuan, odd text": Case("hunyuan", texts=(7, 7)),
    "text and video in the wrong order": Case("hunyuan", texts=(8, 8), change="disorder"),
    "out of memory": Case(change="out_of_memory"),
    "kernel": Case(change="kernel"),
    "interrupt": Case(change="interrupt"),
    "not a number": Case(change="not_a_number"),
}


def on_rank(rank, world, folder, paths, cases):
    comfy_inprocess.start()
    found = {}
    for name, case in cases.items():
        with pytest.MonkeyPatch.context() as monkeypatch:
            found[name] = one(rank, world, paths[case.model], case, monkeypatch)
    return found


def one(rank, world, path, case, monkeypatch):
    """Latents and packed runs of one rank."""
    import comfy.ldm.flux.math
    import comfy.ldm.wan.model
    import comfy.sd

    for module in (comfy.ldm.flux.math, comfy.ldm.wan.model):
        monkeypatch.setattr(module, "optimized_attention", module.optimized_attention)
    model = comfy.sd.load_diffusion_model(path)
    if case.engine:
        engine = ranks.engine_of(case.engine, rank, world)
        ranks.share(model.model.diffusion_model, engine, world, rank)
    else:
        ranks.share_guidance(model, rank, world)
    if case.change:
        globals()[case.change](rank, monkeypatch)
    return video(model, case)


def video(model, case):
    from sparse_attn.host.raylight import packed, patched

    model = patched(model, {**vars(AdaSpaConfig()), **FIELDS, **case.fields})
    return sample(model, case.shape, texts=case.texts, steps=5), packed(model)


def runs_of(data):
    from sparse_attn.host.raylight import unpacked

    return unpacked(data)


def joined(runs):
    from sparse_attn.host.raylight import joined

    return joined(runs)


# ---- what a rank changes


def disorder(rank, monkeypatch):
    monkeypatch.setattr(Shards, "in_order", lambda self, x: x)
    monkeypatch.setattr(Shards, "gather", lambda self, x: x)


def _fails(rank, monkeypatch, error):
    from sparse_attn.run.state import RunState

    attend, calls = RunState.attend, []

    def failing(run, call):
        calls.append(call)
        # each kind of step, one layer of each
        if rank == 1 and len(calls) % 3 == 0:
            raise error
        return attend(run, call)

    monkeypatch.setattr(RunState, "attend", failing)


def out_of_memory(rank, monkeypatch):
    _fails(rank, monkeypatch, torch.OutOfMemoryError("of a test"))


def kernel(rank, monkeypatch):
    _fails(rank, monkeypatch, RuntimeError("a kernel that does not compile"))


def interrupt(rank, monkeypatch):
    _fails(rank, monkeypatch, KeyboardInterrupt())


def not_a_number(rank, monkeypatch):
    from sparse_attn.run.state import RunState

    attend = RunState.attend

    def spoiled(run, call):
        if rank == 1 and call.layer == 1:
            call = replace(call, k=call.k * float("nan"))
        return attend(run, call)

    monkeypatch.setattr(RunState, "attend", spoiled)


# ---- tests


def needs_yunchang():
    if importlib.util.find_spec("yunchang") is None:
        pytest.skip("yunchang is not installed; `python run.py test` installs it")


@pytest.fixture(scope="session")
def of_two_ranks(comfyui, model_paths, tmp_path_factory):
    """By case, latents and runs of two ranks."""
    needs_yunchang()
    paths = {name: str(path) for name, path in model_paths.items()}
    folder = tmp_path_factory.mktemp("ranks")
    by_rank = ranks.run(on_rank, 2, folder, paths, {**CASES, **OTHERS})
    return {
        name: [(out, runs_of(data)[-1]) for out, data in (found[name] for found in by_rank)]
        for name in by_rank[0]
    }


GRIDS = [
    ((1, 12, 1),),
    ((1, 13, 1),),
    ((1, 7, 1), (1, 12, 1)),
    ((1, 6, 1), (1, 13, 1)),
    ((1, 1, 1), (1, 1, 1)),
    # frames, and rows of frames
    ((1, 3, 8),),
    ((3, 5, 4),),
]


@pytest.mark.parametrize("segments", GRIDS)
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_what_is_gathered_comes_into_order_and_goes_back(segments, world):
    shards = Shards(segments, world)
    x = torch.randn(2, sum(shards.lengths), 3, 4)
    there = shards.gather(x)
    assert there.shape[1] == shards.gathered
    assert torch.equal(shards.in_order(there), x)
    # what one rank holds of each segment, one behind the other
    mine = there.chunk(world, 1)[0].split([prod(part) for part in shards.parts], 1)
    for segment, grid, part in zip(x.split(shards.lengths, 1), segments, mine, strict=True):
        share = -(-grid[1] // world)
        first = segment.unflatten(1, grid)[:, :, :share]
        assert torch.equal(
            part.unflatten(1, (grid[0], share, grid[2]))[:, :, : first.shape[2]], first
        )


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_video_of_one(name, of_two_ranks, load):
    case = CASES[name]
    expected, data = video(load(case.model), case)
    alone = runs_of(data)[-1]
    for out, _ in of_two_ranks[name]:
        assert_same_video(out, expected)
    runs = [run for _, run in of_two_ranks[name]]
    # without an engine each rank has its own conditioning
    assert_same_patterns([joined(runs)] if case.engine else runs, alone)
    assert all(run.timing.sparse and not run.warnings and not run.unseen for run in runs)


def assert_same_patterns(runs, alone):
    """What the runs found is what one process finds: densities, recall and masks of all heads."""
    found = {key: pattern for run in runs for key, pattern in run.patterns.items()}
    assert found.keys() == alone.patterns.keys() and found
    for key, pattern in alone.patterns.items():
        assert found[key].density == pattern.density
        assert found[key].recall == pytest.approx(pattern.recall, abs=1e-4)
        assert torch.equal(found[key].block_map, pattern.block_map)


@pytest.mark.long
@pytest.mark.parametrize("world", [4, 8])
def test_more_ranks_give_the_video_of_one_and_survive_a_failure(
    world, comfyui, model_paths, load, tmp_path
):
    needs_yunchang()
    model = "wan_h64" if world == 4 else "wan_h32"
    cases = {
        "none": Case(model),
        "tail": Case(model, fields=POSITION),
        "recall": Case(model, fields={"recall": 0.8, "tail": "none"}),
    }
    failing = {name: replace(OTHERS[name], model=model) for name in ("kernel", "interrupt")}
    paths = {model: str(model_paths[model])}
    by_rank = ranks.run(on_rank, world, tmp_path, paths, {**cases, **failing})
    for name, case in cases.items():
        expected, data = video(load(model), case)
        for found in by_rank:
            assert_same_video(found[name][0], expected)
        whole = joined([runs_of(found[name][1])[-1] for found in by_rank])
        assert f"{world} GPUs" in whole.backend
        assert_same_patterns([whole], runs_of(data)[-1])
    for name in failing:
        out = by_rank[0][name][0]
        assert torch.isfinite(out).all()
        assert all(torch.equal(found[name][0], out) for found in by_rank)
        runs = [runs_of(found[name][1])[-1] for found in by_rank]
        assert [bool(run.kept_dense[FAILED]) for run in runs] == [i == 1 for i in range(world)]
        assert all(run.timing.sparse for run in runs)
        assert f"GPU 1: {FAILED}" in joined(runs).warnings


def test_a_text_that_ranks_cannot_share_evenly_runs_by_the_engine(of_two_ranks):
    for _, run in of_two_ranks["hunyuan, odd text"]:
        assert "7 text tokens cannot be shared evenly by 2 GPUs" in run.kept_dense
        # they came, so no node is said to have replaced them
        assert not run.unseen


def test_a_wrong_order_is_seen(of_two_ranks, load):
    """The control: were the order of the ranks read as the model's, the video would be another."""
    case = OTHERS["text and video in the wrong order"]
    expected, _ = video(load(case.model), case)
    for out, run in of_two_ranks["text and video in the wrong order"]:
        assert run.timing.sparse
        assert_other_video(out, expected)


@pytest.mark.parametrize("name", ["out of memory", "kernel", "interrupt"])
def test_a_rank_that_fails_leaves_nobody_waiting(name, of_two_ranks):
    (first, _), (second, failed) = of_two_ranks[name]
    assert torch.equal(first, second) and torch.isfinite(first).all()
    assert failed.kept_dense[FAILED] and failed.timing.sparse
    whole = joined([run for _, run in of_two_ranks[name]])
    assert f"GPU 1: {FAILED}" in whole.warnings


@pytest.mark.parametrize(
    ("ring", "joint", "named", "reason"),
    [(2, False, {}, RING), (1, True, {}, JOINT), (1, False, {"causal": True}, CAUSAL)],
)
def test_what_is_not_ours_runs_by_the_engine(ring, joint, named, reason, monkeypatch):
    statistics = RunStatistics(AdaSpaConfig(), Schedule((), 0, 0, ()))
    met = []
    call = SimpleNamespace(
        run=SimpleNamespace(statistics=statistics), callers=Callers(), see=met.append,
        layout=SimpleNamespace(tokens=4), family=SimpleNamespace(segments=None),
    )  # fmt: skip
    monkeypatch.setattr(ulysses._thread, "model", ulysses._Model(call, {}))
    monkeypatch.setattr(ulysses, "_size", lambda group: ring if group == "ring" else 2)
    q = torch.ones(1, 4, 2, 8)
    out = ulysses._attend(lambda q, k, v, **_: q + 1, "ulysses", "ring", joint, q, q, q, **named)
    assert torch.equal(out, q + 1) and statistics.kept_dense == {reason: 1} and len(met) == 1


def test_a_number_that_is_none_on_one_rank_leaves_the_other_sparse(of_two_ranks):
    (first, sound), (second, spoiled) = of_two_ranks["not a number"]
    assert torch.equal(first, second) and torch.isfinite(first).all()
    assert len(spoiled.timing.sparse) < len(sound.timing.sparse)
    whole = joined([sound, spoiled])
    half = len(whole.patterns[1, "positive"].density) // 2
    # the rank that ran dense has all its blocks
    assert whole.patterns[1, "positive"].density[half:] == [1.0] * half
    assert whole.patterns[0, "positive"].density[half:] != [1.0] * half
