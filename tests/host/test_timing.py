"""How long samplers take, with AdaSpa and with it off, and what is remembered of it."""

import pytest
import torch

from tests.host import family_models
from tests.host.host_fixtures import calls, sample, sparse

pytestmark = pytest.mark.any_comfyui


def test_a_run_with_adaspa_off_is_timed_and_left_alone(load, pace):
    model, handle = sparse(load("wan_h64"), enabled=False)
    assert torch.equal(sample(model), sample(load("wan_h64")))
    run = handle.latest()
    assert run.took > 0 and not run.patterns and run.finished
    assert run.verdict()[0].code == "took_off" and len(run.lines()) == 1
    assert pace.off == {run.sampled: run.took}
    # a later run of the same size and steps is measured against it
    model, on = sparse(load("wan_h64"), warmup=0.25)
    sample(model, seed=5)
    assert on.latest().sampled == run.sampled and on.latest().seconds_off == run.took
    sample(model, steps=5)
    assert on.latest().seconds_off is None and on.latest().took > 0
    for other in ({"cfg": 1.0}, {"shape": (1, 16, 4, 16, 24)}):
        sample(model, *other.pop("shape", []) and [(1, 16, 4, 16, 24)], **other)
        assert on.latest().sampled != run.sampled


def test_a_run_is_measured_against_its_like_alone(load, pace, monkeypatch):
    """Of one class, latent and guidance, but larger, or with a node that skips or adds work."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    from comfy_extras.nodes_pag import PerturbedAttentionGuidance

    kind, settings = family_models.MODELS["wan"]
    monkeypatch.setitem(family_models.MODELS, "wan", (kind, {**settings, "num_layers": 3}))

    def skipping(model, threshold=0.1):
        return EasyCacheNode.execute(model, threshold, 0.15, 0.95, False).args[0]

    def latest(model, steps=2, **fields):
        model, handle = sparse(model, **fields)
        sample(model, steps=steps, cfg=1.0)
        return handle.latest()

    plain, cached = (
        latest(model, enabled=False) for model in (load("wan_h64"), skipping(load("wan_h64")))
    )
    others = (
        family_models.build("wan"),
        skipping(load("wan_h64"), 0.2),
        LazyCacheNode.execute(load("wan_h64"), 0.1, 0.15, 0.95, False).args[0],
        PerturbedAttentionGuidance.execute(load("wan_h64"), 2.0).args[0],
    )  # fmt: skip
    for other in others:
        run = latest(other)
        assert run.seconds_off is None and run.dense_step is None
    assert latest(load("wan_h64")).seconds_off == plain.took
    assert latest(skipping(load("wan_h64"))).seconds_off == cached.took
    # of another number of steps, it still tells what a dense one takes
    assert latest(load("wan_h64"), steps=3).seconds_dense() == pytest.approx(3 * plain.took / 2)


def test_no_clock_stays_in_the_options(load, pace):
    from sparse_attn.host.timing import CLOCK

    for enabled in (True, False):
        model, _ = sparse(load("wan_h64"), enabled=enabled)

        def stop(*args):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            sample(model, callback=stop)
        sample(model)
        assert CLOCK not in model.model_options["transformer_options"]


def test_a_verdict_outlives_its_node(load, pace, monkeypatch):
    """On a CPU, for 288 tokens, sparse loses by far."""
    from sparse_attn.backends.torch import attention

    slow = attention._attend_rows

    def slower(*args, **kwargs):
        torch.randn(600, 600) @ torch.randn(600, 600)
        return slow(*args, **kwargs)

    monkeypatch.setattr(attention, "_attend_rows", slower)
    fields = {"warmup": 0.2, "verdict": "auto"}
    model, handle = sparse(load("wan_h64"), **fields)
    sample(model, steps=6)
    run = handle.latest()
    assert run.schedule.describe() == "steps 1 dense, 2 search, 3 sparse, 4-6 dense"
    assert calls(handle)["sparse"] == 4 and run.speed is not None and not run.speed.pays
    assert "From step 4 on all ran dense: " in run.lines()[0]
    # another node, another model, and no search
    model, again = sparse(load("wan_h64"), **fields)
    sample(model, steps=6)
    assert "sparse" not in calls(again) and "search" not in calls(again)
    assert "All ran dense: " in again.latest().lines()[0]
    # pinned, a rerun is equal bit for bit
    model, pinned = sparse(load("wan_h64"), **{**fields, "verdict": "sparse"})
    assert torch.equal(sample(model, steps=6), sample(model, steps=6))
    assert calls(pinned)["sparse"] == 16


def test_settings_and_verdicts_are_written_into_metadata(load, pace):
    metadata = {"workflow": {}}
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    handle.node, handle.preset, handle.metadata = "7", "Balanced", metadata
    sample(model)
    sample(model)
    (record,) = metadata["adaspa"]
    assert record["node"] == "7" and record["preset"] == "Balanced"
    assert record["settings"]["sparsity"] == 0.6 and not {"search_gap", "query_stride"} & {
        *record["settings"]
    }
    assert record["verdict"] == " ".join(handle.latest().verdict())
    assert record["steps"] == "steps 1 dense, 2 search, 3-4 sparse"
    # a second node's stands beside it
    model, other = sparse(load("wan_h64"), enabled=False)
    other.node, other.metadata = "8", metadata
    sample(model)
    assert [record["node"] for record in metadata["adaspa"]] == ["7", "8"]


def test_what_another_node_keeps_on_the_model_is_not_printed(load, pace):
    class Large:
        def __repr__(self):
            raise AssertionError("printed")

    model, handle = sparse(load("wan_h64"), warmup=0.25)
    model.model_options["transformer_options"]["another_node"] = {"grid": Large(), "mask": Large()}
    sample(model)
    assert handle.latest().patterns and pace.dense_steps
