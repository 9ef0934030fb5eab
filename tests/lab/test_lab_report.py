"""What the lab measures of videos and makes of its results: `tests/lab`."""

import io
import json
import math
import sys
import xml.etree.ElementTree as ElementTree
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS / "lab"), str(TESTS / "tiny_model")]

import closeness  # noqa: E402
import compare_presets  # noqa: E402
import contestants  # noqa: E402
import cost  # noqa: E402
import equal_time  # noqa: E402
import metrics  # noqa: E402
import plots  # noqa: E402
import procedural_video as video  # noqa: E402
import report  # noqa: E402
from rule import PAPER  # noqa: E402

from sparse_attn.run import verdict  # noqa: E402
from tests.bench import bound_runs  # noqa: E402


def test_likeness_of_equal_and_of_different_videos():
    dense = torch.rand(2, 3, 8, 24, 24)
    same = metrics.likeness(dense, dense)
    other = metrics.likeness(dense, (dense + 0.1 * torch.randn_like(dense)).clamp(0, 1))
    assert same["psnr"] == [100.0] * 2
    assert same["flicker"] == [0.0] * 2 and same["ssim"] == pytest.approx([1.0] * 2)
    assert all(15 < x < 25 for x in other["psnr"])
    assert all(x > 5 for x in other["flicker"])


def test_reading_back_tells_right_from_wrong():
    import models

    first, second = models.scenes(models.MODELS["tiny"], 9)[:2]
    clip = (video.render([first], 16, 80, 104)[0] * 255).byte().numpy()
    assert metrics.read_back(first, clip) > metrics.read_back(second, clip)
    assert metrics.read_back(first, clip) >= 0.75


def test_equal_time_takes_a_lower_density_for_a_tail():
    extras = {"block means": 1.0, "tail": 5.0, "order": 2.0, cost.EVERY_STEP: 20.0}
    even = PAPER.but("paper", density=0.2)
    paper = cost.call_ms(even, extras)
    tail = even.but("tail", tail="pooled")
    assert 60 < paper < 75
    assert cost.call_ms(tail, extras) == pytest.approx(paper + 6.0)
    density = cost.density_at(paper, tail, extras)
    assert 0.15 < density < 0.2
    assert cost.call_ms(tail.but("less", density=density), extras) == pytest.approx(paper)
    assert cost.call_ms(even.but("fine", block_k=32), extras) is None


def results(path, gains, schedule="20"):
    """Two models and two seeds; `gains` in dB over the paper's rule at density 0.2."""
    other = {"ssim": [0.9] * 2, "flicker": [1.0] * 2, "recall": 0.8,
             "searches": 0, "recall_by_layer": {"0": 0.8}}  # fmt: skip
    rows = [
        {"model": model, "schedule": schedule, "rule": name, "density": density, "settings": settings,
         "psnr": [20.0 + gain, 22.0 + gain], "task": [1.0, 0.5], **other}
        for name, density, settings, gain in gains
        for model in ("a", "b")
    ]  # fmt: skip
    dense = [{"model": model, "schedule": schedule, "task": [1.0, 1.0]} for model in ("a", "b")]
    path.write_text(json.dumps({"rows": rows, "dense": dense}))
    return report.load([path])


def test_report_pairs_seeds_and_finds_equal_time(tmp_path):
    paper = {"head_adaptive": True, "again": [0.6]}
    rods = {"order": "position", "tail": "pooled"}
    gains = [
        (PAPER.name, 0.2, paper, 0.0),
        ("better", 0.2, rods, 1.5),
        ("better", 0.163, rods, 0.75),
        ("better", 0.02, rods, 0.5),
        ("worse", 0.2, {}, -2.0),
    ]
    data = results(tmp_path / "lab.json", gains)
    lines = report.table(data, "20", 0.2).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| better", f"| {PAPER.name}", "| worse"]
    assert "+1.50 ± 0.00" in lines[0] and "-2.00 ± 0.00" in lines[2]
    equal = report.equal_time(data)
    assert "better, 0.163, " in equal and "+0.75 ± 0.00 (4 of 4)" in equal
    assert "better, 0.2, " not in equal and "better, 0.02, " not in equal
    assert "-0.250 ± 0.144" in report.tasks(data)


def lab_file(path, weights, gain, models=("a",), task=(1.0, 0.5), rule="x"):
    row = {"schedule": "20", "rule": rule, "density": 0.2, "psnr": [20.0 + gain], "task": task}
    rows = [{"model": model, **row} for model in models]
    dense = [{"model": model, "schedule": "20", "task": [1.0, 1.0]} for model in models]
    path.write_text(json.dumps({"rows": rows, "dense": dense, "weights": weights}))
    return path


def test_later_files_replace_rows_and_other_weights_do_not_count(tmp_path):
    first = lab_file(tmp_path / "1", {"a": "one", "b": "one"}, 0.0, ("a", "b"))
    second = lab_file(tmp_path / "2", {"a": "one"}, 1.0)
    third = lab_file(tmp_path / "3", {"b": "two"}, 2.0, ("b",), rule="y")
    key, other = ("20", 0.2, "x"), ("20", 0.2, "y")
    found = report.load([first, second])["rows"][key]
    assert [found[model]["psnr"] for model in "ab"] == [[21.0], [20.0]]
    data = report.load([first, second, third])
    assert set(data["rows"][key]) == {"a"} and set(data["rows"][other]) == {"b"}
    assert [row["model"] for row in data["dense_rows"]] == ["a", "a", "b"]
    untold = lab_file(tmp_path / "4", {}, 3.0)
    assert set(report.load([untold])["rows"][key]) == {"a"}
    assert set(report.load([untold, second])["rows"][key]) == {"a"}
    assert report.load([second, untold])["rows"][key]["a"]["psnr"] == [21.0]


def test_videos_of_two_sizes_are_not_put_together(tmp_path):
    files = [lab_file(tmp_path / n, {"a": tag}, 0.0) for n, tag in zip("123", "xyy", strict=True)]
    for path, size in zip(files, ("8 tokens", "9 tokens", "9 tokens"), strict=True):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"layouts": {"a": size}}))
    assert report.load(files)["rows"]  # the first is of other weights, and does not count
    path.write_text(json.dumps(json.loads(path.read_text()) | {"layouts": {"a": "8 tokens"}}))
    with pytest.raises(ValueError, match="a was sampled at 9 tokens and at 8 tokens"):
        report.load(files)


def test_differences_count_wins_and_leave_out_what_was_not_measured():
    gain = report.paired(
        {"a": {"psnr": [2.0, 1.0]}, "b": {"psnr": None}, "c": {"psnr": [9.0]}},
        {"a": {"psnr": [1.0, 3.0]}, "b": {"psnr": [1.0]}},
        "psnr",
    )
    assert gain == (-0.5, pytest.approx(1.5), 1, 2)
    assert gain.text(1) + gain.wins_text() == "-0.5 ± 1.5 (1 of 2)"


def test_a_question_is_answered_against_its_base(tmp_path):
    one, two = contestants.ONE, contestants.TWO
    gains = [
        (two.name, 0.2, {}, 3.0), (one.name, 0.2, {}, 1.0), (PAPER.name, 0.2, {}, 0.0),
        ("unknown", 0.2, {}, 7.0), (one.name, 0.1, {}, 1.0),
    ]  # fmt: skip
    data = results(tmp_path / "lab.json", gains)
    head, _, _, _, *lines = report.question(data, "20", 0.2, "searches").splitlines()
    assert head == f"Base: {two.name}, 24.00 dB"
    [line] = lines
    assert line.startswith(f"| {one.name} | 22.00 | -2.00 ± 0.00 (0 of 4) | -2.0 ± 0.0 |")
    assert report.question(data, "20", 0.1, "searches") == "", "no base"
    assert report.question(data, "20", 0.2, "blocks") == "", "only the base"


def test_plot_is_well_formed_and_shows_every_point(tmp_path):
    curves = {"a & b": [(0.1, 20.0), (0.2, 25.0)], "c": [(0.2, 22.0), (0.1, 19.0)]}
    for name in ("one", "two"):
        plots.lines(curves, "density", "PSNR", "title", tmp_path / name)
    text = (tmp_path / "one").read_text()
    assert text == (tmp_path / "two").read_text(), "another file from the same figures"
    root = ElementTree.fromstring(text)
    words = [element.text for element in root.iter() if element.tag.endswith("text")]
    assert {"a & b", "c", "density", "PSNR", "title"} <= set(words)
    assert words.index("a & b") < words.index("c"), "the best first"


def test_a_report_makes_tables_and_plots_of_every_kind(tmp_path, monkeypatch, capsys):
    two, one = contestants.TWO, contestants.ONE
    rules = [(rule, density) for density in (0.1, 0.2) for rule in (PAPER, two, one)]
    gains = [(r.name, d, r.settings(), 10 * d + len(r.again)) for r, d in rules]
    paths = []
    for schedule in ("20", "8"):
        path = tmp_path / f"{schedule}.json"
        results(path, gains, schedule)
        paths.append(str(path))
    monkeypatch.setattr(sys, "argv", ["report.py", *paths, "--out", str(tmp_path / "out")])
    report.main()
    text = (tmp_path / "out" / "tables.md").read_text()
    assert text in capsys.readouterr().out
    for title in ("Steps 20, density 0.1", "Steps 8, density 0.2",
                  "Searches: steps 20, density 0.2", "Equal time of a run"):  # fmt: skip
        assert f"## {title}\n" in text
    made = {path.name for path in (tmp_path / "out").iterdir()}
    plotted = {f"quality_{name}.svg" for name in ("density", "time", "eight_steps")}
    assert made == {"tables.md"} | plotted


def test_a_run_costs_its_dense_steps_searches_and_sparse_steps():
    extras = {"block means": 1.0, "tail": 5.0, "order": 2.0, cost.EVERY_STEP: 20.0}
    one = contestants.ONE.but("one", density=0.2)
    seconds = {
        name: cost.run_seconds(rule, "8", extras)
        for name, rule in {
            "one": one,
            "two": one.but("two", again=(0.6,)),
            "denser": one.but("denser", density=0.35),
            "later": one.but("later", warmup=0.25),
        }.items()
    }
    steps = json.loads(cost.STEPS_BENCH.read_text())["variants"]["bf16, 128x64, pooled tail"]
    steps = steps["step_seconds"]
    sparse = (seconds["one"] - steps["dense"] - steps["search"]) / 6
    assert seconds["two"] - seconds["one"] == pytest.approx(steps["search_again"] - steps["sparse"])
    assert seconds["later"] - seconds["one"] == pytest.approx(steps["dense"] - sparse)
    calls = [cost.call_ms(one.but("x", density=d), extras) for d in (0.2, 0.35)]
    more = 6 * cost.LAYERS * (calls[1] - calls[0]) / 1000
    assert seconds["denser"] - seconds["one"] == pytest.approx(more)
    assert cost.run_seconds(one.but("int8", precision="int8"), "8", extras) is None


def users_graph():
    def node(kind, **inputs):
        return {"class_type": kind, "inputs": inputs}

    return {
        "1": node("UNETLoader", unet_name="wan"),
        "2": node("AdaSpaAttention", model=["1", 0], preset="Custom", enabled=True),
        "3": node("KSampler", model=["2", 0], seed=7, steps=20),
        "4": node("AdaSpaReport", samples=["3", 0], adaspa=["2", 1]),
        "5": node("VAEDecode", samples=["4", 0]),
        "6": node("CreateVideo", images=["5", 0]),
        "7": node("SaveVideo", video=["6", 0]),
    }


def test_users_graph_ends_in_its_frames_and_takes_presets():
    graph = compare_presets.prepared(users_graph(), {"SaveVideo", "AdaSpaReport"})
    assert set(graph) == {"1", "2", "3", "5", "6", "adaspa_frames"}
    assert graph["adaspa_frames"]["inputs"]["images"] == ["5", 0]
    assert graph["5"]["inputs"]["samples"] == ["3", 0], "the report passed the latent on"
    fast = compare_presets.variant(graph, "Fast", 3)
    dense = compare_presets.variant(graph, None, 3)
    assert fast["2"]["inputs"] | {"model": 0} == {"model": 0, "preset": "Fast", "enabled": True}
    assert dense["2"]["inputs"]["enabled"] is False and graph["2"]["inputs"]["enabled"]
    assert fast["3"]["inputs"]["seed"] == dense["3"]["inputs"]["seed"] == 3


def test_users_graph_without_our_node_is_refused():
    graph = users_graph()
    del graph["2"]
    with pytest.raises(ValueError, match="no AdaSpa node"):
        compare_presets.prepared(graph, set())


def test_users_frames_are_those_of_the_video():
    graph, link = users_graph(), ["5", 0]
    # frames that were given, dense ones, a report's picture and a comparison's, which go with them
    before = {
        "a": {"class_type": "LoadImage", "inputs": {"image": "first.png"}},
        "b": {"class_type": "SaveImage", "inputs": {"images": ["a", 0]}},
        "c": {"class_type": "PreviewImage", "inputs": {"images": ["4", 1]}},
        "d": {"class_type": "AdaSpaCompare", "inputs": {"dense": ["e", 0], "sparse": link}},
        "e": {"class_type": "VAEDecode", "inputs": {"samples": ["f", 0]}},
        "f": {"class_type": "KSampler", "inputs": {"model": ["1", 0], "seed": 7}},
        "g": {"class_type": "SaveImage", "inputs": {"images": ["d", 0]}},
        "h": {"class_type": "SaveImage", "inputs": {"images": ["e", 0]}},
    }
    outputs = {"SaveVideo", "AdaSpaReport", "SaveImage", "PreviewImage", "AdaSpaCompare"}
    found = compare_presets.prepared({**before, **graph}, outputs)
    assert found["adaspa_frames"]["inputs"]["images"] == link and not set("bcdgh") & set(found)
    graph["6"]["inputs"]["images"] = ["a", 0]
    with pytest.raises(ValueError, match='No node takes "images" of the video'):
        compare_presets.prepared({**before, **graph}, outputs)


def test_a_users_seed_may_be_the_number_of_a_node():
    graph = users_graph()
    graph["3"]["inputs"]["seed"] = ["s", 0]
    with pytest.raises(ValueError, match="has a seed"):
        compare_presets.prepared(graph, set())
    graph["s"] = {"class_type": "PrimitiveInt", "inputs": {"value": 7}}
    found = compare_presets.variant(compare_presets.prepared(graph, set()), "Fast", 3)
    assert found["s"]["inputs"]["value"] == 3 and found["3"]["inputs"]["seed"] == ["s", 0]


class Server:
    """Answers with one grey frame, darker when sparse; keeps what it was asked for."""

    def __init__(self):
        self.graphs = []

    def object_info(self):
        return {"SaveVideo": {"output_node": True}, "AdaSpaReport": {"output_node": True}}

    def post(self, graph, timeout):
        self.graphs.append(graph)
        return {"outputs": {"adaspa_frames": {"images": [graph["2"]["inputs"]["enabled"]] * 2}}}

    def view(self, sparse):
        picture = io.BytesIO()
        Image.new("RGB", (16, 16), (100 - 20 * sparse,) * 3).save(picture, "PNG")
        return picture.getvalue()


def test_no_seed_that_is_compared_warms_up_and_none_is_below_0():
    server = Server()
    rows = compare_presets.compare(server, users_graph(), [0, 5], ["Fast", "Paper"])
    first = next(rows)
    assert (first["seed"], first["preset"]) == (0, "Fast"), "told before the others are sampled"
    assert len(server.graphs) == 3 and len(list(rows)) == 3
    asked = [(g["3"]["inputs"]["seed"], g["2"]["inputs"]["enabled"]) for g in server.graphs]
    assert asked == [(6, True), *((seed, on) for seed in (0, 5) for on in (False, True, True))]
    assert first["psnr"] == pytest.approx(20 * math.log10(255 / 20), abs=1e-4)


@pytest.mark.parametrize("text, said", [
    (None, "No such file"), ("no", "Export (API)"), ("[1]", "Export (API)"),
    ('{"nodes": [], "links": []}', "Export (API)"), ("{}", "no AdaSpa node"),
    (json.dumps(users_graph()), "No ComfyUI answers at http://127.0.0.1:9 "),
])  # fmt: skip
def test_what_cannot_be_compared_is_said_in_one_line(text, said, tmp_path, monkeypatch):
    graph = tmp_path / "graph.json"
    if text is not None:
        graph.write_text(text)
    words = [str(graph), "--server", "127.0.0.1:9", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["compare_presets.py", *words])
    if text == "{}":
        monkeypatch.setattr(compare_presets, "ComfyClient", Server)
    with pytest.raises(SystemExit) as ended:
        compare_presets.main()
    assert said in ended.value.code and "\n" not in ended.value.code


def test_presets_are_summed_up_over_seeds():
    row = {"ssim": 0.9, "flicker": 1.0, "seconds": 10.0, "dense_seconds": 20.0}
    rows = [
        {"seed": seed, "preset": preset, "psnr": psnr, **row}
        for preset, psnr in (("Fast", 20.0), ("Quality", 100.0))
        for seed in (1, 2, 3)
    ]
    rows[1]["psnr"], rows[0]["seconds"], rows[3]["psnr"] = 23.0, 70.0, 40.0
    table, points = compare_presets.summary(rows)
    assert "| Fast | 21.00 ± 1.00 | 0.900 | 1.00 | 10.0 | 20.0 |" in table
    assert "Mean of 3 seeds" in table and "dense ones: Quality 2 of 3." in table
    assert points == {"Fast": [(10.0, 21.0)], "Quality": [(10.0, 80.0)]}
    for row in rows:
        row |= {"perceptual": 0.25, "changes": 0.125}
    table, _ = compare_presets.summary(rows[:1])
    assert "| PSNR dB | SSIM | perceptual | changes | flicker, 1/255 | seconds |" in table
    assert "| Fast | 20.00 | 0.900 | 0.2500 | 0.1250 | 1.00 | 70.0 | 20.0 |" in table
    assert "equal" not in table and "Mean of" not in table


def test_words_of_the_verdict_begin_where_the_lab_says():
    found = closeness.derive()
    assert json.loads(json.dumps(found)) == json.loads(closeness.OUT.read_text(encoding="utf-8"))
    least = {word: row["recall"] for word, row in found["words"].items()}
    assert least | {"may_differ": 0.0} == verdict.CLOSENESS
    bare = found["without_a_tail"]
    assert round(bare["most_recall"], 2) == verdict.MAY_DIFFER_WITHOUT_A_TAIL
    # the help's figures
    text = (TESTS.parent / "web" / "docs" / "AdaSpaAttention.md").read_text(encoding="utf-8")
    for word, called in (
        ("very_close", "the videos called very close"),
        ("close", "those called close"),
    ):
        shares = [round(100 * model[word]["small_or_less"]) for model in found["judged"].values()]
        assert f"{min(shares)} to {max(shares)} % of {called}" in text
    assert bare["small_or_less"] < found["judged"]["joint"]["may_differ"]["small_or_less"]


def test_lines_through_runs_say_where_a_word_begins():
    def run(recall):
        # 100 dB and an SSIM of 1 at a recall of 1, and 0.5 of an SSIM less at 0
        return {"recall": recall, "psnr": [90 * recall + 10], "ssim": [0.5 + 0.5 * recall]}

    found = closeness.least_recall([run(recall) for recall in (0.2, 0.5, 0.9)], "small")
    assert found == {"psnr": 0.2, "ssim": 0.86, "recall": 0.86}


def test_the_picture_of_the_presets_has_a_row_per_video_and_per_difference():
    import show_presets

    dense = torch.rand(3, 6, 20, 24)
    sheet = show_presets.picture({"dense": dense, "Fast": dense, "Quality": dense + 0.05})
    scale, rows = show_presets.SCALE, [20 * show_presets.SCALE * i for i in range(6)]
    assert sheet.size == (show_presets.MARGIN + 24 * scale * show_presets.COLUMNS, rows[5])
    parts = [sheet.crop((show_presets.MARGIN, a, sheet.width, b)) for a, b in pairwise(rows)]
    assert parts[0].tobytes() == parts[1].tobytes()
    assert parts[2].getextrema() == ((0, 0),) * 3, "no difference is black"
    assert parts[4].getextrema() == ((102, 102),) * 3, "0.05 times 8, of 255"


def test_equal_time_is_made_of_what_was_recorded():
    recorded = json.loads((TESTS / "lab" / "results" / "equal_time.json").read_text())["rows"]
    assert recorded == equal_time.all_rows()
    took = equal_time.step_seconds()
    # a dense step is a dense step, what is forecast takes none, fewer blocks take less
    assert equal_time.seconds({"dense": 3, "forecast": 9}) == 3 * took["dense"]
    assert (
        equal_time.seconds({"sparse": 1}, 0.1) < equal_time.seconds({"sparse": 1}) == took["sparse"]
    )
    both = [row for row in recorded if row["rule"] == "Balanced"]
    (schedule,) = {
        row["seconds"] for row in recorded if row["rule"] == "20 steps: 2 dense, density 0.2"
    }
    assert {row["seconds"] for row in both} == {schedule}


def test_the_readme_has_the_presets_as_whole_videos_had_them():
    rows = json.loads((TESTS / "lab" / "results" / "few_steps_h200.json").read_text())["rows"]
    for name, rule in (
        ("Quality", "Quality"), ("Balanced", "Balanced"), ("Fast", "fast: 2 dense steps, one row of four"),
    ):  # fmt: skip
        found = [row["psnr"] for row in rows if (row["schedule"], row["rule"]) == ("20", rule)]
        values = [psnr for model in found for psnr in model]
        assert len(found) == 3 and len(values) == 24
        words = f"{name} {sum(values) / len(values):.0f}"
        assert words in (TESTS.parent / "README.md").read_text(encoding="utf-8"), words


def test_the_readme_has_whole_runs_and_their_bounds_as_they_were_recorded():
    recorded = json.loads(bound_runs.RUNS.read_text())
    assert recorded["bounds"] == bound_runs.bounds()

    def took(name):
        rows = bound_runs.run_rows(bound_runs.WAN, name)
        return {row["steps"]: row["seconds"] for row in rows}

    default, ours = took("ComfyUI's default"), took("Balanced, int8")
    gain = min(default[steps] / ours[steps] for steps in (4, 8))
    readme = (TESTS.parent / "README.md").read_text(encoding="utf-8")
    assert f"{int(gain * 10) / 10}x ComfyUI's default" in readme
    page = (TESTS / "bench" / "README.md").read_text(encoding="utf-8")
    assert bound_runs.table(recorded["bounds"]) in page
    assert all(f"{ours[steps]:.2f}" in page for steps in (4, 8, 20))
