"""The numbers a run shows are the true ones: memory, recall, density, tokens, choice."""

from dataclasses import replace

import pytest
import torch
from close import mass_rounding

from sparse_attn.backends import choice, reference
from sparse_attn.orders.position import is_shared, serpentine_order
from sparse_attn.run import packed_lse
from sparse_attn.run.state import RunState
from tests.host.host_fixtures import VIDEO_15, assert_same_video, calls, sample, sparse

pytestmark = pytest.mark.any_comfyui


def tensors_of(run):
    """Every tensor a run remembers between calls."""
    for layer in run.layers.values():
        if layer.lse is not None:
            yield layer.lse
        if layer.pattern is not None:
            yield layer.pattern.mask.bits
            order = layer.pattern.order
            if order is not None and not is_shared(order):
                yield order


@pytest.fixture
def most_held(monkeypatch):
    """The most bytes of masks, orders and LSE that a run really held, counted storage by storage."""
    most = [0]
    attend = RunState.attend

    def counted(self, *args):
        out = attend(self, *args)
        storages = {x.untyped_storage().data_ptr(): x for x in tensors_of(self)}
        most[0] = max(most[0], sum(x.untyped_storage().nbytes() for x in storages.values()))
        return out

    monkeypatch.setattr(RunState, "attend", counted)
    return most


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"warmup": 0.25},
        {"warmup": 0.25, "search_points": (0.5,)},
        {"search_points": (0.25, 0.75)},
        {"warmup": 0.9},
        {"dense_layers": (0,), "search_points": (0.5,)},
        {"block_size": "128", "search_points": (0.5,)},
        {"block_size": "128x64", "search_points": (0.5,)},
    ],
    ids=["one", "warmup", "two", "three", "none", "dense_layer", "block_128", "block_128x64"],
)
@pytest.mark.parametrize("name", ["wan_h64", "hunyuan_15"])
def test_memory_held_is_what_was_predicted(load, most_held, name, fields):
    # 16 blocks and more, so that the bytes of a mask row are not mostly padding
    shape = (1, 16, 8, 16, 24) if name == "wan_h64" else (1, 32, 8, 8, 12)
    model, handle = sparse(load(name), **fields)
    sample(model, shape, cfg=1.0, texts=(7, 7))
    statistics = handle.latest()
    assert len(statistics.memory.conditionings) <= 1
    if fields.get("warmup") == 0.9:
        assert most_held == [0] and statistics.memory.predicted_bytes == 0
        return
    assert statistics.memory.held_bytes == most_held[0] > 0
    assert statistics.memory.predicted_bytes == pytest.approx(most_held[0], rel=0.05)


@pytest.fixture
def one_pass(monkeypatch):
    """Let plain torch search in one pass, as the kernels for GPUs do."""
    plain = choice.plain_torch()

    def attention_with_masses(q, k, v, *, previous_lse, block_q, block_k, **options):
        out, lse = plain.attention(q, k, v, **options)
        assert previous_lse.shape == lse.shape
        blocks = {"block_q": block_q, "block_k": block_k}
        return out, lse, plain.block_masses(q, k, lse, **blocks, **options)

    backend = replace(plain, one_pass_search=True, attention_with_masses=attention_with_masses)
    monkeypatch.setattr(choice, "choose", lambda *args: (backend, backend.name))


@pytest.mark.parametrize("fields", [{}, {"search_points": (0.75,)}], ids=["one", "two"])
def test_lse_kept_for_a_search_in_one_pass_is_predicted(load, most_held, one_pass, fields):
    model, handle = sparse(load("wan_h64"), warmup=0.5, **fields)
    sample(model, (1, 16, 8, 16, 24), cfg=1.0)
    statistics = handle.latest()
    assert statistics.memory.held_bytes == most_held[0] >= 2 * 4 * packed_lse.packed_bytes(768)
    assert statistics.memory.predicted_bytes == pytest.approx(most_held[0], rel=0.05)
    assert calls(handle)["dense"] == 4


@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
def test_search_in_one_pass_gives_the_same_video(load, request, name):
    # one pass attends the tokens in another order than two do, and rounding moves tokens that are
    # alike into another block
    fields = {"warmup": 0.5, "search_points": (0.75,), "token_order": "position"}
    expected = sample(sparse(load(name), **fields)[0])
    request.getfixturevalue("one_pass")
    model, handle = sparse(load(name), **fields)
    assert_same_video(sample(model), expected)
    # the pass of a search is not timed apart
    assert handle.latest().timing.search and not handle.latest().timing.search_dense


def test_memory_is_predicted_for_each_of_two_prompts_and_videos(load, most_held):
    model, handle = sparse(load("hunyuan"), search_points=(0.5,))
    sample(model, (2, 16, 3, 16, 24), texts=(8, 8))
    statistics = handle.latest()
    assert len(statistics.memory.conditionings) == 2
    assert 2 * statistics.memory.predicted_bytes == pytest.approx(most_held[0], rel=0.05)
    report = "\n".join(statistics.lines())
    assert "2 conditioning(s)" in report and "Memory held" in report


# ---- recall and density


@pytest.fixture
def captured(monkeypatch):
    """q, k and the mask right after each search, by layer and conditioning."""
    found = {}
    attend = RunState.attend

    def noted(self, call):
        out = attend(self, call)
        pattern = self.layers[call.key].pattern if call.key else None
        if pattern is not None and pattern.searched_at == call.step:
            q, k = call.q.clone(), call.k.clone()
            _, order = self.layers.fetch(self.layers[call.key], q.device)
            if order is not None:
                # in the order of the mask
                q, k = (reference.in_order(x, order) for x in (q, k))
                bias = call.key_bias
                if bias is not None:
                    # it weighs text, which has one place in all heads
                    bias = bias[:, order[0, 0]]
                call = replace(call, key_bias=bias)
            found[call.layer, call.role] = (call, q, k, pattern.mask)
        return out

    monkeypatch.setattr(RunState, "attend", noted)
    return found


def exact_masses(call, q, k, block_q=64, block_k=64):
    bias = None if call.key_bias is None else call.key_bias.double()
    q, k = q.double(), k.double()
    lse = reference.scaled_logits(q, k, call.scale, bias).logsumexp(-1)
    return reference.block_masses(
        q, k, lse, block_q=block_q, block_k=block_k, scale=call.scale, key_bias=bias
    )


@pytest.mark.parametrize(
    "name, fields",
    [
        ("wan_h64", {"sparsity": 0.6}),
        ("wan_h64", {"sparsity": 0.4, "head_adaptive": True}),
        ("hunyuan", {"sparsity": 0.6}),
        ("hunyuan", {"sparsity": 0.6, "tail": "none"}),
        ("hunyuan", {"sparsity": 0.6, "block_size": "128"}),
        ("hunyuan", {"sparsity": 0.6, "block_size": "128x64"}),
        ("wan_h64", {"sparsity": 0.4, "head_adaptive": True, "block_size": "128x64"}),
    ],
)
def test_recall_shown_is_the_exact_recall_of_the_mask(load, captured, name, fields):
    model, handle = sparse(load(name), **fields)
    sample(model, steps=3)
    statistics = handle.latest()
    assert statistics.patterns.exact() and len(captured) == len(statistics.patterns)
    for key, (call, q, k, mask) in captured.items():
        keep = mask.to_dense()
        masses = exact_masses(call, q, k, mask.block_q, mask.block_k)
        true = (masses * keep).sum((-1, -2)) / masses.sum((-1, -2))
        shown = statistics.patterns[key]
        assert shown.recall == pytest.approx(true.mean(0).tolist(), abs=1e-5)
        assert shown.density == pytest.approx(keep.double().mean((0, 2, 3)).tolist(), abs=1e-6)
        assert min(shown.recall) < 0.98
    values = [r for p in statistics.patterns.values() for r in p.recall]
    mean, worst = statistics.patterns.recall()
    assert mean == pytest.approx(sum(values) / len(values)) and worst == min(values)
    assert f"recall {mean:.2f}, worst head {worst:.2f}" in statistics.summary()


@pytest.mark.parametrize("name", ["wan_h64", "hunyuan"])
@pytest.mark.parametrize("asked", [0.5, 0.8])
def test_a_recall_asked_for_is_held_in_every_head_and_search(load, captured, name, asked):
    model, handle = sparse(load(name), recall=asked, search_points=(0.5,))
    least = []

    def check(number, *args):
        for call, q, k, mask in captured.values():
            masses = exact_masses(call, q, k)
            keep = mask.to_dense()
            held = (masses * keep).sum((-1, -2)) / masses.sum((-1, -2))
            # the search held it by its own masses, in float32
            least.append(held.min().item() + 2 * mass_rounding(q, k, call.scale))
        captured.clear()

    sample(model, (1, 16, 8, 16, 24), callback=check)
    statistics = handle.latest()
    # two searches, and the sampler steps on after each
    assert len(least) == 2 * len(statistics.patterns) and min(least) >= asked
    assert statistics.patterns.exact() and statistics.patterns.density() < 0.99
    assert {step for step, _ in statistics.patterns.samples.values()} == {3}
    text = "\n".join(statistics.lines())
    assert f"Recall asked for: {asked}; the searches found {asked}" in text
    assert "in step 4 0." in text and "(sampled)" in text
    assert "The search decides what a recall of" in statistics.expected


def test_mask_keeps_the_blocks_of_most_mass(load, captured):
    model, _ = sparse(load("hunyuan"), sparsity=0.6, tail="none")
    sample(model, steps=2, cfg=1.0)
    for call, q, k, mask in captured.values():
        keep = mask.to_dense()
        masses = exact_masses(call, q, k)
        # the first block holds the text: its row and its column are kept whole
        assert keep[..., 0].all() and keep[..., 0, :].all()
        rest, kept = masses[..., 1:, 1:], keep[..., 1:, 1:]
        least_kept = rest.masked_fill(~kept, float("inf")).amin(-1)
        most_left = rest.masked_fill(kept, 0.0).amax(-1)
        assert (least_kept >= most_left - 1e-4).all()
        assert (keep[..., 1:, :].sum(-1) == 2).all()


def test_later_recall_is_an_estimate_from_the_kept_lse(load, captured):
    # both searches in one order, so that their rows are the same tokens
    model, handle = sparse(load("wan_h64"), search_points=(0.5,), token_order="position")
    first = {}

    def keep_first(number, *args):
        if number == 0:
            first.update(captured)

    sample(model, callback=keep_first)
    statistics = handle.latest()
    assert not statistics.patterns.exact() and "(estimated)" in statistics.summary()
    differences = []
    for key, (call, q, k, mask) in captured.items():
        keep = mask.to_dense()
        masses = exact_masses(call, q, k)
        true = (masses * keep).sum((-1, -2)) / masses.sum((-1, -2))
        shown = statistics.patterns[key]
        assert shown.step == 2
        # with the LSE that the first search kept, in eight bits, every row mended to its sum
        _, old_q, old_k, _ = first[key]
        lse = reference.scaled_logits(old_q.double(), old_k.double(), call.scale).logsumexp(-1)
        # it is kept in the order of the tokens
        order = serpentine_order(call.layout, lse.device).long()
        kept = packed_lse.pack(lse[..., order.argsort()].float())
        lse = packed_lse.unpack(kept, lse.shape[-1])[..., order].double()
        masses = reference.block_masses(
            q.double(), k.double(), lse, block_q=64, block_k=64, scale=call.scale
        )
        estimate = (masses * keep).sum((-1, -2)) / masses.sum((-1, -2))
        assert shown.recall == pytest.approx(estimate.mean(0).tolist(), abs=1e-4)
        differences += (estimate - true).abs().flatten().tolist()
    # an estimate, and not the truth by accident
    assert max(differences) > 1e-4


def test_summary_names_tokens_steps_density_and_time(load):
    model, handle = sparse(load("hunyuan_15"), warmup=0.25)
    sample(model, VIDEO_15)
    text = handle.latest().summary()
    assert " 295 tokens, steps 1 dense, 2 search, 3-4 sparse, density 0." in text
    assert " of attention" in text
    lines = "\n".join(handle.latest().lines())
    assert "Model: HunyuanVideo, 295 tokens (3x8x12 video, 7 other)" in lines
    assert "Not the video's self-attention: 8 calls, 7 tokens are not the 295" in lines


# ---- who runs the dense steps


def test_fastest_dense_attention_gives_the_same_video(load):
    model, handle = sparse(load("wan_h64"), warmup=0.5, sparsity=0.0, dense_attention="auto")
    assert_same_video(sample(model), sample(load("wan_h64")))
    assert calls(handle) == {"dense": 8, "search": 4, "sparse": 4}
    shown = handle.latest().dense_choice
    assert "host" in shown and "own" in shown and "288 tokens" in shown


@pytest.mark.parametrize("fastest", ["host", "own"])
def test_choice_of_dense_attention_lasts_over_runs(load, monkeypatch, fastest):
    from sparse_attn.run import dense as dense_choice

    measured = []

    def timed(run, args):
        measured.append(None)
        first = len(measured) % 2 == 1
        return 1.0 if first == (fastest == "host") else 2.0

    monkeypatch.setattr(dense_choice, "_time", timed)
    model, handle = sparse(load("wan_h64"), warmup=0.5, dense_attention="auto")
    first = sample(model)
    assert len(measured) == 2
    assert handle.latest().dense_choice.startswith(fastest)
    assert torch.equal(sample(model), first)
    assert len(measured) == 2
