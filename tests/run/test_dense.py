from types import SimpleNamespace

import pytest
import torch

from sparse_attn.run import dense as dense_choice
from sparse_attn.run.dense import MARGIN, PROBE_HEADS, DenseChoice

SCALE = 0.125


class Bench:
    """Candidates that take as long as they are told, on a clock that only they move."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def run(self, name, q):
        if isinstance(self.seconds[name], Exception):
            raise self.seconds[name]
        self.calls.append((name, tuple(q.shape)))
        self.now += self.seconds[name]

    def host(self, q, k, v):
        self.run("host", q)
        return q

    def backend(self):
        def attention(q, k, v, scale, key_bias=None):
            assert scale == SCALE
            self.run("own", q)
            return q + 1, "lse"

        return SimpleNamespace(attention=attention)

    def cudnn(self, q, k, v, scale):
        assert scale == SCALE
        self.run("cudnn", q)
        return q + 2, "cudnn's lse"


@pytest.fixture
def bench(monkeypatch):
    def make(**seconds):
        found = Bench(**seconds)
        monkeypatch.setattr(dense_choice, "time", found)
        monkeypatch.setattr(dense_choice, "torch_cudnn", found.cudnn)
        monkeypatch.setattr(dense_choice, "cudnn_serves", lambda q: "cudnn" in seconds)
        return found

    return make


def tensors(tokens=70, heads=6):
    return torch.zeros(3, 2, heads, tokens, 64).unbind(0)


def choose(choice, bench, qkv=None, backend="own", **options):
    backend = bench.backend() if backend == "own" else backend
    return choice.choose(backend, *(qkv or tensors()), scale=SCALE, host=bench.host, **options)


FASTEST = [
    # seconds of host, own and cuDNN, and who serves
    ({"host": 1.0, "own": 0.5}, "own"),
    ({"host": 1.0, "own": 2.0}, "host"),
    ({"host": 1.0, "own": 0.8, "cudnn": 0.5}, "cudnn"),
    ({"host": 1.0, "own": 0.4, "cudnn": 0.5}, "own"),
    ({"host": 1.0, "own": MARGIN + 0.01}, "host"),  # not worth a different rounding
    ({"host": 1.0, "own": MARGIN - 0.01}, "own"),
    ({"host": 1.0, "own": 0.48, "cudnn": 0.5}, "cudnn"),  # two near ones do not take turns
    (
        {"host": 1.0, "own": 1.0, "cudnn": RuntimeError("no kernel")},
        "host",
    ),  # says so only when called
    ({"host": 1.0, "own": 0.5, "cudnn": RuntimeError("no kernel")}, "own"),
]


@pytest.mark.parametrize("seconds, name", FASTEST, ids=lambda x: str(x)[:60])
def test_the_fastest_with_a_margin_serves(bench, seconds, name):
    assert choose(DenseChoice("auto"), bench(**seconds)) == name


def test_the_host_serves_when_the_user_insists_or_a_mask_does(bench):
    candidates = bench(host=9.0, own=0.1)
    assert choose(DenseChoice("host"), candidates) == "host"
    assert choose(DenseChoice("auto"), candidates, key_bias=torch.zeros(2, 70)) == "host"
    assert candidates.calls == [], "nothing to measure"


def test_without_a_backend_the_host_competes_with_cudnn_alone(bench):
    assert choose(DenseChoice("auto"), bench(host=1.0), backend=None) == "host"
    assert choose(DenseChoice("auto"), bench(host=1.0, cudnn=0.2), backend=None) == "cudnn"


def test_measures_once_per_shape_and_on_a_few_heads(bench):
    candidates, choice = bench(host=1.0, own=0.5), DenseChoice("auto")
    choose(choice, candidates)
    first = len(candidates.calls)
    assert first == 4, "a warm-up and a measured call of each"
    assert {shape[1] for _, shape in candidates.calls} == {PROBE_HEADS}
    assert choose(choice, candidates) == "own" and len(candidates.calls) == first
    choose(choice, candidates, tensors(tokens=71))
    assert len(candidates.calls) == 2 * first


def test_a_host_that_fails_is_not_hidden(bench):
    with pytest.raises(RuntimeError, match="out of order"):
        choose(DenseChoice("auto"), bench(host=RuntimeError("out of order"), own=0.5))


def test_with_lse_runs_our_own_unless_cudnn_was_faster(bench):
    q, k, v = tensors()
    for seconds, lse in [
        ({"own": 1.0}, "lse"),
        ({"own": 1.0, "cudnn": 0.5}, "cudnn's lse"),
        ({"own": 0.5, "cudnn": 1.0}, "lse"),
        ({"own": 0.48, "cudnn": 0.5}, "cudnn's lse"),
        ({"own": 1.0, "cudnn": RuntimeError("no kernel")}, "lse"),
    ]:
        candidates = bench(**seconds)
        found = DenseChoice("auto").with_lse(candidates.backend(), q, k, v, scale=SCALE)
        assert found[1] == lse and found[0].shape == q.shape


def test_with_lse_and_a_key_bias_only_our_own_serves(bench):
    q, k, v = tensors()
    candidates = bench(own=1.0, cudnn=0.1)
    _, lse = DenseChoice("auto").with_lse(
        candidates.backend(), q, k, v, scale=SCALE, key_bias=torch.zeros(2, 70)
    )
    assert lse == "lse"


def test_runs_the_named_candidate(bench):
    q, k, v = tensors()
    candidates, choice = bench(own=1.0, cudnn=1.0), DenseChoice("auto")
    out = choice.run("own", candidates.backend(), q, k, v, scale=SCALE)
    assert torch.equal(out, q + 1)
    out = choice.run("cudnn", candidates.backend(), q, k, v, scale=SCALE)
    assert torch.equal(out, q + 2)


def test_describes_what_it_measured(bench):
    choice = DenseChoice("auto")
    assert choice.describe("host") == "host"
    choose(choice, bench(host=0.1, own=0.0505))
    measured = "4 of 6 heads x 70 tokens: host 100.0 ms, own 50.5 ms"
    assert choice.describe("own") == f"own ({measured})"
    assert choice.describe("own int8") == f"own int8, not exact ({measured})"


def test_cudnn_does_not_serve_a_cpu():
    assert not dense_choice.cudnn_serves(tensors()[0].bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_yields_the_natural_log_of_the_denominator(device):
    q, k, v = torch.randn(3, 2, 3, 333, 64, device=device, dtype=torch.bfloat16)
    if not dense_choice.cudnn_serves(q):
        pytest.skip("this GPU has no cuDNN attention")
    out, lse = dense_choice.torch_cudnn(q, k, v, SCALE)
    logits = (q.double() @ k.double().transpose(-1, -2)) * SCALE
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        out.double(), logits.softmax(-1) @ v.double(), atol=2e-2, rtol=0
    )  # fmt: skip
