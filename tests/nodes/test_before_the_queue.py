"""What a server refuses before a prompt waits and runs: one sentence, on the node that is wrong."""

import pytest

from tests.host.test_server import graph, node
from tests.tools.comfy_server import PromptFailed

WRONG = [
    ({"start_percent": 0.8, "end_percent": 0.2}, "`start_percent` must be at least 0 and below"),
    ({"preset": "Paper", "recall": 0.9}, "the preset Paper is head-adaptive"),
    ({"dense_layers": "first, last"}, "`dense_layers` must be numbers with commas"),
    ({"warmup": 0.1, "search_points": "0,45"}, "got '0,45'. Write 0.45."),
    ({"search_points": "0.6, 0.3"}, "`search_points` must ascend"),
    ({"sparsity": 0.2, "head_adaptive": True}, "Raise the sparsity"),
    ({"preset": "Turbo"}, "`preset` must be one of"),
    ({"cache": "disk"}, "`cache` must be one of auto, gpu, cpu, got disk. Try auto."),
    ({"min_tokens": -1}, "`min_tokens` must be 0 or more"),
]


def pair(prompt):
    """The same prompt with the node for two experts."""
    inputs = dict(prompt["adaspa"]["inputs"])
    inputs |= {"model_high": inputs["model"], "model_low": inputs.pop("model")}
    report = {**prompt["report"]["inputs"], "adaspa": ["adaspa", 2]}
    return {
        **prompt,
        "adaspa": node("AdaSpaAttentionPair", **inputs),
        "report": node("AdaSpaReport", **report),
    }


def refusal(server, prompt, at="adaspa"):
    """The errors of a node, from a prompt that never ran."""
    with pytest.raises(PromptFailed) as refused:
        server.submit(prompt)
    assert list(refused.value.details["node_errors"]) == [at]
    return refused.value.details["node_errors"][at]["errors"]


@pytest.mark.parametrize("widgets, words", WRONG, ids=lambda value: str(value)[:40])
def test_a_wrong_setting_is_refused_with_one_sentence(comfy_server, widgets, words):
    prompt = graph(**widgets)
    for asked in (prompt, pair(prompt)):
        (error,) = refusal(comfy_server, asked)
        assert words in error["details"]


def test_a_value_from_another_node_is_left_to_the_run(comfy_server):
    prompt = graph(start_percent=0.8)
    prompt["adaspa"]["inputs"]["end_percent"] = ["number", 0]
    prompt["number"] = node("PrimitiveFloat", value=0.2)
    with pytest.raises(PromptFailed) as failed:
        comfy_server.post(prompt)
    assert failed.value.entry is not None and "`start_percent` must be" in str(failed.value)


def test_a_pattern_s_name_is_refused_where_it_would_leave_its_folder(comfy_server):
    prompt = graph()
    adaspa = {"model": ["adaspa", 0], "adaspa": ["adaspa", 1]}
    prompt["keep"] = node("AdaSpaSavePattern", **adaspa, name="../x")
    prompt["sampler"]["inputs"]["model"] = ["keep", 0]
    (error,) = refusal(comfy_server, prompt, "keep")
    assert "`name` must be a file name" in error["details"]
