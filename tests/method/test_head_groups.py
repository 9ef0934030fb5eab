"""Groups of heads change no bit of a result, and keep to the room that they were given."""

from dataclasses import replace

import pytest
import torch

from sparse_attn import block_mask
from sparse_attn import head_groups as groups_module
from sparse_attn.backends import reference
from sparse_attn.backends.choice import choose
from sparse_attn.block_mask import BlockMask
from sparse_attn.call import Call
from sparse_attn.config import AdaSpaConfig
from sparse_attn.head_groups import WORKSPACE_BYTES, head_groups
from sparse_attn.method import mask_search, sparse_step
from sparse_attn.method.fused_online_search import fused_online_search
from sparse_attn.method.lse_cached_search import lse_cached_search
from sparse_attn.method.recall import sampled_recall
from sparse_attn.orders import choice, similarity
from sparse_attn.orders.position import serpentine_order
from sparse_attn.token_layout import TokenLayout
from tests.method.chosen import TORCH

LAYOUT, HEADS = TokenLayout(12, 6, 8, 14, 20), 10
CONFIGS = {
    "similarity": AdaSpaConfig(),
    "position": AdaSpaConfig(token_order="position", block_size="128x64"),
    "recall": AdaSpaConfig(recall=0.7),
    "paper": AdaSpaConfig(tail="none", head_adaptive=True),
}


def a_call(batch=2, layout=LAYOUT, heads=HEADS, D=16):
    generator = torch.Generator().manual_seed(0)
    shape = 3, batch, layout.tokens, heads, D
    q, k, v = torch.randn(shape, generator=generator).transpose(2, 3)
    # heads from concentrated to scattered, so that some give blocks and others take them
    q = q * torch.linspace(0.1, 4, heads)[:, None, None]
    by_position = serpentine_order(layout, torch.device("cpu"))
    return Call(q, k, v, 0.25, layout, step=0, dense=lambda: 1 / 0, by_position=by_position)


def dense(call):
    return TORCH.attention(call.q, call.k, call.v, scale=call.scale)


def attention_with_masses(q, k, v, *, previous_lse, scale, key_bias, **blocks):
    masses = TORCH.block_masses(q, k, previous_lse, scale=scale, key_bias=key_bias, **blocks)
    return *TORCH.attention(q, k, v, scale=scale, key_bias=key_bias), masses


ONE_PASS = replace(TORCH, one_pass_search=True, attention_with_masses=attention_with_masses)


def results(call, config):
    """Every tensor that two searches and a sparse step answer with."""
    with_lse = fused_online_search(ONE_PASS, call, config, dense(call)[1], dense)
    first = fused_online_search(TORCH, call, config, None, dense)
    again = lse_cached_search(TORCH, call, config, first.lse + 0.3, int8=False)
    found = {}
    for name, x in (("one pass", with_lse), ("first", first), ("again", again)):
        found |= {f"{name} {field}": y for field, y in x._asdict().items() if field != "exact"}
        found[f"{name} mask"] = x.mask.bits
    out, lse = sparse_step.sparse_step(TORCH, call, again.mask, again.order, quantised=False)
    return {**found, "out": out, "sparse lse": lse}


def groups_of(size):
    """Groups of a given size, in place of those that fit the workspace."""

    def groups(call, copies, pair_bytes):
        for first in range(0, call.q.shape[1], size):
            some = slice(first, first + size)
            yield some, replace(call, **{x: getattr(call, x)[:, some] for x in "qkv"})

    return groups


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_groups_of_heads_change_no_bit(monkeypatch, config):
    call = a_call()
    whole = results(call, config)
    if config.head_adaptive:
        counts = whole["first mask"].float().mean((-1, -2))
        assert len({*counts[0].tolist()}) > 1, "no head gave a block"
    for size in (5, 4, 1):
        for module in (choice, mask_search, groups_module):
            monkeypatch.setattr(module, "head_groups", groups_of(size))
        for name, x in results(call, config).items():
            y = whole[name]
            assert (x is None and y is None) or torch.equal(x, y), (size, name)
            if name in ("out", "first out"):
                assert x.transpose(1, 2).is_contiguous(), "as the host lays it out"


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_mask_of_larger_blocks_is_that_of_the_small_ones_in_them(monkeypatch, config):
    call = a_call()
    # two query blocks, and two key blocks of some sizes, make one of the mask
    rows, blocks = (call.layout.num_blocks(size) for size in config.blocks.values())
    monkeypatch.setattr(block_mask, "MOST_PAIRS", (-(-rows // 2)) ** 2)
    found = fused_online_search(ONE_PASS, call, config, dense(call)[1], dense)
    mask, order = found.mask, found.order
    assert mask.block_q == 2 * config.block_q and mask.block_k % config.block_k == 0
    keep = mask.to_dense().repeat_interleave(2, -2)
    keep = keep.repeat_interleave(mask.block_k // config.block_k, -1)
    small = BlockMask.from_dense(keep[..., :rows, :blocks], **config.blocks)
    # a mean is of what is skipped together
    moved, options = call, {}
    if order is not None:
        moved = reference.permute(*(x.double() for x in (call.q, call.k, call.v)), order)
        options = {"pooled": moved.pooled.of_blocks(call.layout.tokens, 128), "order": order}
    wanted = reference.attention(
        moved.q.double(), moved.k.double(), moved.v.double(), scale=call.scale,
        mask=mask.as_walked(call.layout.tokens), **options,
    )[0]  # fmt: skip
    for size in (call.q.shape[1], 1):
        monkeypatch.setattr(groups_module, "head_groups", groups_of(size))
        out, _ = sparse_step.sparse_step(TORCH, call, mask, order, False)
        torch.testing.assert_close(out.double(), wanted, rtol=0, atol=1e-5)
    # what it holds is what its blocks hold
    every = list(range(call.layout.tokens))
    listed = sampled_recall(call, mask, every, order)
    torch.testing.assert_close(listed, found.recall, rtol=0, atol=1e-4)
    assert torch.equal(sampled_recall(call, small, every, order), listed)


@pytest.mark.parametrize("tokens", [7, 119_040, 522_256])
@pytest.mark.parametrize("heads", [1, 24, 40])
@pytest.mark.parametrize("batch", [1, 2])
def test_as_many_heads_as_the_workspace_has_room_for(tokens, heads, batch):
    q = torch.empty(1, dtype=torch.bfloat16).expand(batch, heads, tokens, 128)
    call = Call(q, q, q, 1.0, TokenLayout(0, 1, 1, tokens), step=0, dense=None)
    for copies, pair_bytes in ((0, 4), (4, 4), (4, 12)):
        groups = list(head_groups(call, copies, pair_bytes))
        need = batch * (copies * tokens * 256 + pair_bytes * (-(-tokens // 64)) ** 2)
        sizes = [part.k.shape[1] for _, part in groups]
        room = max(1, WORKSPACE_BYTES // need)
        assert max(sizes) <= room and sum(sizes) == heads
        # no more groups than it takes, and none much smaller than the others
        assert len(sizes) == -(-heads // room) and len({*sizes[:-1]}) <= 1
        assert [some.start for some, _ in groups] == [sum(sizes[:i]) for i in range(len(sizes))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only CUDA tells how much was allocated")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("int8", [False, True])
def test_no_call_takes_more_than_the_workspace(monkeypatch, config, int8):
    room = 64 << 20
    for module in (choice, mask_search):
        assert module.head_groups is head_groups
    monkeypatch.setattr(groups_module, "WORKSPACE_BYTES", room)
    monkeypatch.setattr(similarity, "WORKSPACE_BYTES", room)
    layout = TokenLayout(0, 30, 30, 40, 100)
    qkv = torch.randn(3, 1, layout.tokens, 16, 128, device="cuda", dtype=torch.bfloat16)
    by_position = serpentine_order(layout, qkv.device)
    call = Call(*qkv.transpose(2, 3), 0.1, layout, step=0, dense=None, by_position=by_position)
    backend, why = choose(call.q, call.k, call.v, 64, 64)
    assert why == "Triton kernels"
    _, lse = backend.attention(call.q, call.k, call.v, scale=call.scale)
    taken = {}
    taken["search"], _ = taken_by(lambda: fused_online_search(backend, call, config, lse, dense))
    taken["search again"], found = taken_by(
        lambda: lse_cached_search(backend, call, config, lse, int8)
    )
    taken["sparse"], _ = taken_by(
        lambda: sparse_step.sparse_step(backend, call, found.mask, found.order, int8)
    )
    # what is small is not counted
    assert max(taken.values()) <= 1.1 * room, taken


def taken_by(work):
    """The most bytes that some work held on the GPU beside what it answers with, and the answer."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    answer = work()
    torch.cuda.synchronize()
    kept = torch.cuda.memory_allocated() - before
    return torch.cuda.max_memory_allocated() - before - kept, answer
