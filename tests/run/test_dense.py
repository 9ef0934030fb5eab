"""Who runs a dense call: the fastest candidate, and the host wherever another has no memory."""

import pytest
import torch
from close import assert_within

from sparse_attn.backends import cudnn
from sparse_attn.run import dense as module
from sparse_attn.run.dense import HOST_SERVED, MARGIN, PROBE_HEADS, DenseChoice
from tests.run.fakes import SCALE, Backend, Run, call_of, dense, no_memory, tensors


class Bench:
    """Candidates that take as long as they are told, on a clock that only they move."""

    def __init__(self, **seconds):
        self.seconds, self.now, self.calls = seconds, 0.0, []

    def perf_counter(self):
        return self.now

    def candidates(self):
        def candidate(name):
            def run(q, k, v):
                if isinstance(self.seconds[name], Exception):
                    raise self.seconds[name]
                self.calls.append((name, tuple(q.shape)))
                self.now += self.seconds[name]

            return run

        return {name: candidate(name) for name in self.seconds}


@pytest.fixture
def bench(monkeypatch):
    def make(**seconds):
        found = Bench(**seconds)
        monkeypatch.setattr(module, "time", found)
        return found

    return make


def a_call(tokens=70, heads=6):
    return call_of(torch.zeros(3, 2, heads, tokens, 64).unbind(0))


FASTEST = [
    # seconds of host, cuDNN and own, and who serves
    ({"host": 1.0, "own": 0.5}, "own"),
    ({"host": 1.0, "own": 2.0}, "host"),
    ({"host": 1.0, "cudnn": 0.5, "own": 0.8}, "cudnn"),
    ({"host": 1.0, "cudnn": 0.5, "own": 0.4}, "own"),
    ({"host": 1.0, "own": MARGIN + 0.01}, "host"),  # not worth a different rounding
    ({"host": 1.0, "own": MARGIN - 0.01}, "own"),
    ({"host": 1.0, "cudnn": 0.5, "own": 0.48}, "cudnn"),  # two near ones do not take turns
    # says so only when called
    ({"host": 1.0, "cudnn": RuntimeError("no kernel"), "own": 1.0}, "host"),
    ({"host": 1.0, "cudnn": RuntimeError("no kernel"), "own": 0.5}, "own"),
    ({"cudnn": RuntimeError("no kernel"), "own": 1.0}, "own"),
    ({"cudnn": 1.0, "own": 0.5}, "own"),
]


@pytest.mark.parametrize("seconds, name", FASTEST, ids=lambda x: str(x)[:60])
def test_the_fastest_with_a_margin_serves(bench, seconds, name):
    assert DenseChoice("auto").fastest(a_call(), bench(**seconds).candidates()) == name


def test_measures_once_per_shape_and_on_a_few_heads(bench):
    timed, choice = bench(host=1.0, own=0.5), DenseChoice("auto")
    choice.fastest(a_call(), timed.candidates())
    first = len(timed.calls)
    assert first == 4, "a warm-up and a measured call of each"
    assert {shape[1] for _, shape in timed.calls} == {PROBE_HEADS}
    assert choice.fastest(a_call(), timed.candidates()) == "own" and len(timed.calls) == first
    choice.fastest(a_call(tokens=71), timed.candidates())
    assert len(timed.calls) == 2 * first


@pytest.mark.parametrize("name", ["host", "own"])
def test_a_candidate_that_fails_is_not_hidden(bench, name):
    seconds = {"host": 1.0, "own": 0.5, name: RuntimeError("out of order")}
    with pytest.raises(RuntimeError, match="out of order"):
        DenseChoice("auto").fastest(a_call(), bench(**seconds).candidates())


def test_describes_what_it_measured(bench):
    choice = DenseChoice("auto")
    assert choice.describe("host") == "host"
    choice.fastest(a_call(), bench(host=0.1, own=0.0505).candidates())
    measured = "4 of 6 heads x 70 tokens: host 100.0 ms, own 50.5 ms"
    assert choice.describe("own") == f"own ({measured})"
    assert choice.describe("own int8") == f"own int8, not exact ({measured})"


# ---- in a run


@pytest.fixture
def make_run(monkeypatch):
    """make_run(fastest, **config): a run in which that candidate is the fastest; asked: among whom."""

    def make(fastest, with_cudnn=False, **config):
        run = Run("DDS", **config)
        run.asked = []

        def fastest_of(call, candidates):
            run.asked.append([*candidates])
            return fastest

        run.state.dense.choice.fastest = fastest_of
        monkeypatch.setattr(module, "cudnn_serves", lambda q: with_cudnn)
        monkeypatch.setattr(module, "torch_cudnn", torch_cudnn)
        return run

    def torch_cudnn(q, k, v, scale):
        assert scale == SCALE
        return q + 2, "cudnn's lse"

    return make


def plainly_dense(run, qkv, **more):
    return run.attend(0, qkv, key=None, **more)


@pytest.mark.parametrize("fastest, did", [("own", ["dense"]), ("host", ["host"]), ("cudnn", [])])
def test_the_fastest_serves_a_dense_step_and_the_report_says_who(make_run, fastest, did):
    run, qkv = make_run(fastest, with_cudnn=True), tensors()
    out, found = plainly_dense(run, qkv)
    assert found == did and run.asked == [["host", "cudnn", "own"]]
    assert_within("out", out, qkv[0].double() + 2 if fastest == "cudnn" else dense(*qkv), 1e-5)
    assert run.statistics.dense_choice == fastest
    assert len(run.statistics.timing.dense) == 1


def test_the_host_serves_when_the_user_insists_or_a_mask_does(make_run):
    bias = torch.zeros(1, 640)
    for run, more in (
        (make_run("own", dense_attention="host"), {}),
        (make_run("own"), {"key_bias": bias}),
    ):
        assert plainly_dense(run, tensors(), **more)[1] == ["host"]
        assert run.asked == [], "nothing to measure"


def test_without_a_backend_the_host_competes_with_cudnn_alone(make_run):
    for with_cudnn, among in ((False, ["host"]), (True, ["host", "cudnn"])):
        run = make_run("host", with_cudnn)
        run.state.backends.of = lambda q, k, v: (None, "no backend")
        assert plainly_dense(run, tensors())[1] == ["host"] and run.asked == [among]


LSE = [
    # fastest, whether cuDNN is there, whether the keys have a bias; whose LSE
    ("own", False, False, "own"),
    ("cudnn", True, False, "cudnn"),
    ("own", True, False, "own"),
    ("cudnn", True, True, "own"),
]


@pytest.mark.parametrize("fastest, with_cudnn, biased, whose", LSE)
def test_a_search_runs_our_own_unless_cudnn_is_faster(
    make_run, fastest, with_cudnn, biased, whose
):  # fmt: skip
    run, qkv = make_run(fastest, with_cudnn), tensors()
    call = call_of(qkv, key_bias=torch.zeros(1, 640) if biased else None)
    out, lse = run.state.dense.of_search(call)
    if whose == "cudnn":
        assert lse == "cudnn's lse"
    else:
        assert_within("out", out, dense(*qkv), 1e-5)
    assert run.asked == ([["cudnn", "own"]] if with_cudnn and not biased else [])
    assert len(run.statistics.timing.search_dense) == 1


# ---- no memory


@pytest.mark.parametrize("fastest", ["own", "own int8"])
def test_the_host_serves_a_dense_step_that_our_own_has_no_memory_for(make_run, fastest):
    run, qkv = make_run(fastest, precision="int8"), tensors()
    run.backend.fails = {"dense": no_memory(), "int8": no_memory()}
    out, did = plainly_dense(run, qkv)
    assert did == ["dense" if fastest == "own" else "int8", "host"]
    assert_within("out", out, dense(*qkv), 1e-5)
    if fastest == "own":
        assert run.statistics.warnings == [HOST_SERVED]
    else:
        assert sum(run.statistics.low_precision.declined.values()) == 1


def test_the_host_serves_where_there_is_no_memory_to_measure_in():
    run, qkv = Run("DDS"), tensors()
    run.backend.fails["dense"] = no_memory()
    out, did = plainly_dense(run, qkv)
    # measured on the host first
    assert did[-1] == "host" and did.count("dense") == 1
    assert_within("out", out, dense(*qkv), 1e-5)


@pytest.mark.parametrize("allowed", ["auto", "host"])
def test_the_host_serves_the_dense_step_before_a_search_and_the_search_follows(allowed):
    run, qkv = Run("DSs", Backend(one_pass=True), dense_attention=allowed), tensors()
    run.backend.fails["dense"] = no_memory()
    out, did = run.attend(0, qkv)
    assert did == ["dense", "host"]
    assert_within("out", out, dense(*qkv), 1e-5)
    assert run.statistics.warnings == [HOST_SERVED] and run.layer().lse is None
    run.backend.fails.clear()
    # without an earlier LSE it takes two passes
    assert run.attend(1, qkv)[1] == ["dense", "masses"]
    assert run.attend(2, qkv)[1] == ["sparse"] and not run.statistics.kept_dense


# ---- cuDNN


def test_cudnn_does_not_serve_a_cpu():
    assert not cudnn.cudnn_serves(tensors()[0].bfloat16())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cudnn_yields_the_natural_log_of_the_denominator(device):
    q, k, v = torch.randn(3, 2, 3, 333, 64, device=device, dtype=torch.bfloat16)
    if not cudnn.cudnn_serves(q):
        pytest.skip("this GPU has no cuDNN attention")
    out, lse = cudnn.torch_cudnn(q, k, v, SCALE)
    logits = (q.double() @ k.double().transpose(-1, -2)) * SCALE
    torch.testing.assert_close(lse.double(), logits.logsumexp(-1), atol=2e-3, rtol=0)
    torch.testing.assert_close(
        out.double(), logits.softmax(-1) @ v.double(), atol=2e-2, rtol=0
    )  # fmt: skip
