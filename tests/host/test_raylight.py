"""What goes to Raylight's workers, and what comes back."""

import gc
import importlib
import json
import os
import pickle
import threading
import time
import weakref
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sparse_attn.config import AdaSpaConfig
from sparse_attn.run.statistics import Pattern, RunStatistics
from sparse_attn.schedule import Schedule, StepKind
from tests.host.host_fixtures import VIDEO, assert_same_video, sample, sparse


def run(heads=2, **fields) -> RunStatistics:
    kinds = (StepKind.DENSE, StepKind.SEARCH, StepKind.SPARSE)
    statistics = RunStatistics(AdaSpaConfig(), Schedule(kinds, 0, 3, (3.0, 2.0, 1.0)), **fields)
    for layer in range(2):
        statistics.patterns[layer, "positive"] = Pattern(
            1, True, [0.2 + layer] * heads, [0.9] * heads,
            torch.full((heads, 4, 4), 7, dtype=torch.uint8),
        )  # fmt: skip
    return statistics


def test_heads_stand_in_the_order_of_the_ranks(comfyui):
    from sparse_attn.host.raylight import joined

    first, second = run(), run()
    second.patterns[0, "positive"] = replace(second.patterns[0, "positive"], density=[0.5, 0.6])
    whole = joined([first, second])
    assert whole.patterns[0, "positive"].density == [0.2, 0.2, 0.5, 0.6]
    assert len(whole.patterns[0, "positive"].block_map) == 4


def test_a_rank_that_kept_a_layer_dense_has_all_of_it(comfyui):
    from sparse_attn.host.raylight import joined

    first, second = run(), run()
    del second.patterns[1, "positive"]
    pattern = joined([first, second]).patterns[1, "positive"]
    assert pattern.density == [1.2, 1.2, 1.0, 1.0] and pattern.recall == [0.9, 0.9, 1.0, 1.0]
    assert (pattern.block_map[2:] == 255).all() and (pattern.block_map[:2] == 7).all()


def test_times_are_those_of_the_slowest_rank(comfyui):
    from sparse_attn.host.raylight import joined

    first, second = run(), run()
    first.timing.sparse, second.timing.sparse = [1.0, 1.0], [2.0, 2.0]
    first.steps = [(StepKind.DENSE, 3.0), (StepKind.SPARSE, 1.0)]
    second.steps = [(StepKind.DENSE, 2.0), (StepKind.SPARSE, 2.0)]
    first.memory.held_bytes, second.memory.held_bytes = 5, 9
    whole = joined([first, second])
    assert whole.timing.sparse == [2.0, 2.0]
    assert whole.steps == [(StepKind.DENSE, 3.0), (StepKind.SPARSE, 2.0)]
    assert whole.memory.held_bytes == 9 and first.memory.held_bytes == 5


def test_what_only_one_rank_says_names_it(comfyui):
    from sparse_attn.host.raylight import joined

    first, second = run(kept_dense=Counter(text=4)), run(kept_dense=Counter(text=4, memory=1))
    first.warn("shared")
    second.warn("shared")
    second.warn("its own")
    whole = joined([first, second])
    assert whole.kept_dense == {"text": 4, "GPU 1: memory": 1}
    assert whole.warnings == ["shared", "GPU 1: its own"]


def test_one_rank_is_as_it_was(comfyui):
    from sparse_attn.host.raylight import joined

    alone = run()
    assert joined([alone]) is alone


class Worker:
    """A worker of Raylight's: a model that functions are called with, sent by value."""

    def __init__(self, model, cloudpickle):
        self.model, self.pickle = model, cloudpickle

    def model_function_runner(self, function):
        self.model = pickle.loads(self.pickle.dumps(function))(self.model)

    def model_function_runner_get_values(self, function):
        return pickle.loads(self.pickle.dumps(function))(self.model)


def test_a_worker_is_patched_by_value_and_hands_its_runs_back(load):
    cloudpickle = pytest.importorskip("cloudpickle")
    from sparse_attn.host.raylight import WORKER_PACKAGE, RankedHandle, reader, sender

    fields = {"tail": "none", "search_points": ()}
    settings = sparse(load("wan_t2v"), **fields)[1].config
    workers = [Worker(load("wan_t2v"), cloudpickle) for _ in range(2)]
    read = reader()
    handle = RankedHandle(
        settings, lambda: [worker.model_function_runner_get_values(read) for worker in workers]
    )
    assert handle.latest() is None and handle.recent() == []
    for worker in workers:
        worker.model_function_runner(sender(settings))
    assert WORKER_PACKAGE in type(workers[0].model.get_attachment("adaspa")).__module__
    expected = sample(sparse(load("wan_t2v"), **fields)[0], VIDEO)
    for worker in workers:
        assert_same_video(sample(worker.model, VIDEO), expected)
    latest = handle.latest()
    assert type(latest) is RunStatistics and latest.finished
    assert all(len(p.density) == 4 for p in latest.patterns.values())
    assert any("on 2 GPUs" in line for line in latest.lines())
    worker = workers[0]
    worker.model_function_runner(sender(replace(settings, enabled=False)))
    assert not worker.model.wrappers.get("apply_model", {}).get("adaspa")


class Lines:
    """Stands for the actor of Ray's queue; pickled, it keeps its file."""

    def __init__(self, path):
        self.path, self.put_nowait = path, self

    def remote(self, message):
        with open(self.path, "a") as file:
            file.write(message + "\n")

    def taken(self) -> list[str]:
        return self.path.read_text().splitlines()


class Server:
    """ComfyUI's server, of which a test reads what it was told."""

    client_id = "client"

    def __init__(self):
        self.shown: list[dict] = []

    def send_sync(self, event, data, client):
        assert event == "adaspa.status"
        self.shown.append(data)

    def send_progress_text(self, text, node_id, client):
        assert node_id == self.shown[-1]["node"]


def test_the_first_worker_tells_its_steps_to_the_node(load, monkeypatch, tmp_path):
    cloudpickle = pytest.importorskip("cloudpickle")
    from sparse_attn.host import status
    from sparse_attn.host.raylight import sender

    lines = Lines(tmp_path / "lines")
    settings = sparse(load("wan_t2v"))[1].config
    worker = Worker(load("wan_t2v"), cloudpickle)
    worker.model_function_runner(sender(settings, "7", lines))
    sample(worker.model, VIDEO)
    server = Server()
    monkeypatch.setattr(status, "_server", lambda: server)
    for message in lines.taken():
        status.deliver(*json.loads(message))
    assert {data["node"] for data in server.shown} == {"7"}
    steps = [data["step"] for data in server.shown if not data["done"]]
    assert sorted(set(steps)) == list(range(len(server.shown[0]["steps"])))
    assert [data["done"] for data in server.shown][-2:] == [False, True]
    # patched for no node, it tells nobody
    taken = lines.taken()
    worker.model_function_runner(sender(settings, "7"))
    sample(worker.model, VIDEO)
    assert lines.taken() == taken


class Closed(Exception):
    pass


@pytest.mark.parametrize("joins", [True, False, "fails"])
def test_the_last_line_is_about_all_workers(comfyui, monkeypatch, joins):
    from sparse_attn.host import raylight, status

    class Queue:
        def __init__(self, *messages):
            self.messages = list(messages)

        def get(self):
            if not self.messages:
                raise Closed
            return self.messages.pop(0)

    def fetch():
        if joins == "fails":
            raise Closed
        return [pickle.dumps([run(finished=True)])] * 2 if joins else [None, None]

    server = Server()
    monkeypatch.setattr(status, "_server", lambda: server)
    handle = raylight.RankedHandle(AdaSpaConfig(), fetch)
    handle.node, handle.metadata = "7", {}
    told = {"node": "7", "said": [], "steps": [], "first": 0, "text": "its own"}
    messages = [json.dumps(["", {**told, "step": i, "done": i == 1}]) for i in range(2)]
    raylight._pass_on(Queue(*messages), weakref.ref(handle))
    assert [data["step"] for data in server.shown] == [0, 1]
    own = server.shown[1]["text"] == "its own"
    assert own == (joins is not True)
    assert ("adaspa" in handle.metadata) == (joins is True)


def test_the_node_is_offered_where_raylight_is(comfyui, tmp_path, monkeypatch):
    import folder_paths

    from tests.tools import comfy_inprocess

    pack = comfy_inprocess.load_pack()
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda kind: [str(tmp_path)])
    assert "AdaSpaRaylight" not in comfy_inprocess.nodes_of(pack)
    (tmp_path / "raylight" / "src" / "raylight").mkdir(parents=True)
    node = comfy_inprocess.nodes_of(pack)["AdaSpaRaylight"]
    main = comfy_inprocess.nodes_of(pack)["AdaSpaAttention"]
    mine, theirs = ([i.id for i in n.define_schema().inputs[1:]] for n in (node, main))
    assert mine == theirs


class RankActor:
    """A worker as Raylight makes it, whose model shares its tokens with the others."""

    def __init__(self, rank, world, folder, path, root):
        import sys

        sys.path.insert(0, root)
        import torch.distributed as dist

        from tests.host import ranks
        from tests.tools import comfy_inprocess

        torch.set_num_threads(1)
        comfy_inprocess.start()
        import comfy.sd

        where = f"file://{folder}/group"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world)
        self.model = comfy.sd.load_diffusion_model(path)
        engine = ranks.engine_of("yunchang", rank, world)
        ranks.share(self.model.model.diffusion_model, engine, world, rank)

    def model_function_runner(self, function):
        self.model = function(self.model)

    def model_function_runner_get_values(self, function):
        return function(self.model)

    def sample(self):
        return sample(self.model, VIDEO)


@pytest.mark.long
def test_two_ray_actors_give_the_video_of_one_process(load, model_paths, tmp_path, monkeypatch):
    ray = pytest.importorskip("ray", reason="`ray` is not installed")
    from sparse_attn.host.raylight import ROOT
    from tests.tools import comfy_inprocess

    fields = {"tail": "none", "search_points": (), "dense_attention": "host"}
    settings = sparse(load("wan_h64"), **fields)[1].config
    expected = sample(sparse(load("wan_h64"), **fields)[0], VIDEO)
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    variables = {"PYTHONPATH": os.pathsep.join(paths)}
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": variables})
    try:
        actor = ray.remote(num_cpus=1)(RankActor)
        path = str(model_paths["wan_h64"])
        workers = [actor.remote(i, 2, str(tmp_path), path, str(ROOT)) for i in range(2)]
        pack = comfy_inprocess.load_pack()
        node = importlib.import_module(f"{pack.__name__}.nodes.raylight").AdaSpaRaylight
        shown = importlib.import_module(f"{pack.__name__}.nodes.settings").shown
        status = importlib.import_module(f"{pack.__name__}.sparse_attn.host.status")
        server, metadata = Server(), {}
        monkeypatch.setattr(status, "_server", lambda: server)
        monkeypatch.setattr(node, "hidden", SimpleNamespace(unique_id="7", extra_pnginfo=metadata))
        out = node.execute({"workers": workers}, preset="Custom", **shown(settings))
        found = ray.get([worker.sample.remote() for worker in workers])
        for latents in found:
            assert_same_video(latents, expected)
        run = out.args[1].latest()
        assert all(len(p.density) == 4 for p in run.patterns.values()) and run.patterns
        deadline = time.monotonic() + 20
        while not metadata["adaspa"] and time.monotonic() < deadline:
            time.sleep(0.1)
        steps = {data["step"] for data in server.shown}
        assert steps == set(range(len(run.schedule.kinds))) and server.shown[-1]["done"]
        assert metadata["adaspa"]
        passing = [t for t in threading.enumerate() if "_pass_on" in t.name]
        assert passing
        del out
        gc.collect()
        passing[0].join(20)
        assert not passing[0].is_alive()
    finally:
        ray.shutdown()
