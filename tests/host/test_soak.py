"""200 runs through one server by two clients, some of them cancelled: its memory stays flat."""

import asyncio
import json
import random
import time
import uuid
from collections import Counter
from pathlib import Path
from statistics import fmean

import psutil
import pytest

from tests.host.host_fixtures import HERE
from tests.host.host_models import MODELS
from tests.host.host_results import write_results
from tests.host.test_server import graph, node
from tests.tools.comfy_server import ComfyServer, PromptFailed

# after the first runs, which load what is loaded once, the mean and the lowest RSS of as many runs as
# meet every model and every end are compared; the highest is of what the other client was sampling
RUNS, WARM_UP, WINDOW, FLAT = 200, 50, 25, 1.05
TINY = Path(__file__).resolve().parents[1] / "tiny_model"
NAMES = [*MODELS, "wan"]
SETTINGS = [
    {},
    {"tail": "none", "search_points": "0.5"},
    {"block_size": "128x64", "token_order": "position"},
    {"tail": "none", "head_adaptive": True, "block_size": "128"},
    {"recall": 0.8, "cache": "cpu"},
    {"dense_attention": "auto", "warmup": 0.25, "search_points": "0.75"},
    {"dense_layers": "0", "end_percent": 0.8},
    {"preset": "Fast"},
    {"min_tokens": 100_000},
    {"enabled": False},
]
# how the runs end, over and over; some of these are of more steps than anyone waits for
ENDS = ["finished"] * 5 + ["interrupted", "finished", "deleted", "finished", "freed"]


def prompt_of(number: int) -> dict:
    """One of the models with one of the settings; every run samples anew."""
    pick = random.Random(number)
    name = NAMES[number % len(NAMES)]
    prompt = graph(name, seed=number, **pick.choice(SETTINGS))
    if name == "wan":
        # the committed model reads words
        for words in ("positive", "negative"):
            prompt[words] = node("AdaSpaTinyPrompt", text="a red star" * (words == "positive"))
    prompt["latent"]["inputs"].update(
        length=pick.choice((5, 9, 13)), batch_size=pick.choice((1, 1, 2))
    )
    if ENDS[number % len(ENDS)] in ("interrupted", "deleted"):
        prompt["sampler"]["inputs"]["steps"] = 300
    return prompt


class Client:
    """One browser: a websocket that listens, and prompts one after another."""

    def __init__(self, server):
        self.server, self.name, self.heard = server, uuid.uuid4().hex, Counter()

    async def run(self, number: int) -> str:
        """Run a prompt to the end that is meant for it; returns how it ended."""
        server, ends = self.server, ENDS[number % len(ENDS)]
        running = asyncio.to_thread(server.submit, prompt_of(number), None, self.name)
        prompt = await running
        if ends == "deleted":
            await asyncio.to_thread(server.request, "/queue", {"delete": [prompt]})
        if ends in ("deleted", "interrupted"):
            while queued := await asyncio.to_thread(server.queue):
                if prompt not in queued["running"] + queued["pending"]:
                    return "deleted" if ends == "deleted" else "ended before it was interrupted"
                if prompt in queued["running"]:
                    await asyncio.sleep(random.Random(number).uniform(0, 0.8))
                    await asyncio.to_thread(server.interrupt, prompt)
                    break
                await asyncio.sleep(0.05)
        try:
            await asyncio.to_thread(server.wait, prompt)
        except PromptFailed as failure:
            if "interrupted" not in str(failure):
                raise
            return "interrupted"
        if ends == "freed":
            every = {"unload_models": True, "free_memory": True}
            await asyncio.to_thread(server.request, "/free", every)
        return ends

    async def listen(self, session) -> None:
        address = self.server.address.replace("http://", "ws://") + f"/ws?clientId={self.name}"
        async with session.ws_connect(address) as socket:
            async for message in socket:
                if isinstance(message.data, str):
                    self.heard[json.loads(message.data)["type"]] += 1

    async def work(self, numbers, rows: list[dict]) -> None:
        import aiohttp

        process = psutil.Process(self.server.process.pid)
        async with aiohttp.ClientSession() as session:
            listening = asyncio.create_task(self.listen(session))
            for number in numbers:
                began = time.monotonic()
                outcome = await self.run(number)
                rows.append(
                    {
                        "run": number,
                        "rss_mib": round(process.memory_info().rss / 2**20, 1),
                        "seconds": round(time.monotonic() - began, 2),
                        "model": NAMES[number % len(NAMES)],
                        "outcome": outcome,
                    }
                )
            listening.cancel()


@pytest.mark.long
def test_memory_of_a_server_stays_flat(comfyui, model_paths, tmp_path):
    rows: list[dict] = []
    server = ComfyServer(
        comfyui,
        tmp_path,
        extra_custom_nodes=[
            ("adaspa_host_tests", HERE / "host_nodes"),
            ("adaspa_tiny_model", TINY),
        ],
        model_files=[*model_paths.values(), TINY / "tiny_wan.safetensors.xz"],
        env={"OMP_NUM_THREADS": "1"},
    )

    async def both(clients) -> None:
        numbers = iter(range(RUNS))
        await asyncio.gather(*(client.work(numbers, rows) for client in clients))

    with server:
        # ComfyUI's own nodes may miss a package that nothing here needs
        started = len(server.log)
        clients = [Client(server), Client(server)]
        asyncio.run(both(clients))
        log = server.log[started:]
    write_results("soak", rows)
    rss = [row["rss_mib"] for row in rows]
    assert [row["run"] for row in sorted(rows, key=lambda row: row["run"])] == list(range(RUNS))
    outcomes = Counter(row["outcome"] for row in rows)
    assert {*outcomes} >= {*ENDS} and min(outcomes[end] for end in ENDS) >= RUNS // 20
    assert all(client.heard["adaspa.status"] > RUNS for client in clients)
    assert "Traceback" not in log
    windows = [rss[i : i + WINDOW] for i in range(WARM_UP, RUNS, WINDOW)]
    for value in fmean, min:
        found = [value(window) for window in windows]
        assert max(found) <= FLAT * min(found), found
