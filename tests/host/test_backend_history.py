"""A node that forecasts inside the model, and asks AdaSpa as Spectrum's document describes."""

import pytest
import torch

from sparse_attn.host.backend_history import HISTORY, RECEIPTS, History, publish
from tests.forecast.polynomial_model import trace
from tests.host.host_fixtures import calls, sparse

pytestmark = pytest.mark.any_comfyui

STEPS = 14
SETTINGS = {"warmup": 0.2, "search_points": (0.55,), "tail": "none"}


class Reader:
    """Enters the model, and stands in for it where nothing has changed since two computed steps."""

    def __init__(self):
        self.identities, self.receipts, self.stood_in, self.kept = [], [], [], []

    def __call__(self, executor, x, timestep, *args, **kwargs):
        options = kwargs.get("transformer_options") or args[-1]
        policy = options[HISTORY]["adaspa"]
        identity = policy(layout=None, options=options, model=executor.class_obj)
        hash(identity)
        if self.kept and (identity is None or self.kept[-1] != identity):
            self.kept.clear()
        step = len(self.identities)
        self.identities.append(identity)
        if len(self.kept) >= 2 and self.stood_in[-1:] != [step - 1]:
            self.stood_in.append(step)
            return torch.zeros_like(x)
        receipts = options[RECEIPTS] = []
        out = executor(x, timestep, *args, **kwargs)
        hash(tuple(receipts))
        self.receipts.append(receipts)
        if identity is not None and policy.accept_receipts(receipts):
            self.kept.append(identity)
        return out


@pytest.fixture
def read(load):
    """A run beside the reader; returns both."""
    import comfy.patcher_extension

    reader = Reader()
    model, handle = sparse(load("wan_h64"), **SETTINGS)
    kind = comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL
    model.add_wrapper_with_key(kind, "reader", reader)
    trace(model, steps=STEPS, cfg=1.0)
    return reader, handle


def test_steps_that_must_be_computed_have_no_identity(read):
    reader, _ = read
    unknown = [step for step, identity in enumerate(reader.identities) if identity is None]
    # the step whose LSE the first search takes, and both searches
    assert unknown == [2, 3, 8]
    assert len({reader.identities[step] for step in (4, 5, 6, 7)}) == 1
    assert reader.identities[7] != reader.identities[9] != reader.identities[1]


def test_every_call_of_ours_leaves_a_receipt(read):
    reader, _ = read
    # two layers
    assert {len(receipts) for receipts in reader.receipts} == {2}
    kinds = [{receipt[1] for receipt in receipts} for receipts in reader.receipts]
    assert all(len(kind) == 1 for kind in kinds) and kinds.count({"search"}) == 2


def test_what_stands_in_takes_no_search_and_is_no_sparse_step(read):
    reader, handle = read
    assert reader.stood_in and not {2, 3, 8} & set(reader.stood_in)
    run = handle.latest()
    assert run.skipped() == reader.stood_in
    assert len(run.steps) == STEPS - len(reader.stood_in)
    done = calls(handle)
    assert done["search"] == 2 and done["search_again"] == 2


def test_others_keep_theirs_and_a_contract_that_nobody_knows_is_left_alone():
    other, options = object(), {}
    options[HISTORY] = {"other": other}
    publish(options, None, 0)
    assert options[HISTORY]["other"] is other and isinstance(options[HISTORY]["adaspa"], History)
    options[HISTORY] = other
    publish(options, None, 0)
    assert options[HISTORY] is other


def test_a_receipt_of_a_search_is_not_accepted(read):
    reader, _ = read
    history = History(None, 0)
    accepted = [history.accept_receipts(receipts) for receipts in reader.receipts]
    assert accepted.count(False) == 2
    assert history.accept_receipts([("another", "search", 0), "text"])
