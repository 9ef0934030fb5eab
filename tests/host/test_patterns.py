"""Patterns in ComfyUI: on the MODEL wire, in the user's folders, and what a run says before it."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from sparse_attn.patterns.file import load as read
from tests.host.host_fixtures import VIDEO, assert_same_video, calls, kept_dense, sample, sparse
from tests.host.test_server import graph, node, text_of
from tests.tools import comfy_inprocess
from tests.tools.comfy_server import PromptFailed


@pytest.fixture
def folders(comfyui, tmp_path):
    """ComfyUI's output and input folders, for one test."""
    import folder_paths

    before = folder_paths.get_output_directory(), folder_paths.get_input_directory()
    folder_paths.set_output_directory(str(tmp_path / "output"))
    folder_paths.set_input_directory(str(tmp_path / "input"))
    yield SimpleNamespace(output=tmp_path / "output/adaspa", input=tmp_path / "input/adaspa")
    folder_paths.set_output_directory(before[0])
    folder_paths.set_input_directory(before[1])


@pytest.fixture
def nodes(folders):
    found = comfy_inprocess.nodes_of(comfy_inprocess.load_pack())
    return {
        name: node.PREPARE_CLASS_CLONE({"hidden_inputs": {}}) for name, node in found.items()
    }  # fmt: skip


@pytest.fixture
def attention(nodes, load):
    """attention(model, **settings) -> patched model and handle of the node itself."""

    def run(name="wan_h64", **settings):
        widgets = {
            "preset": "Custom", "sparsity": 0.6, "block_size": "64", "warmup": 0.0,
            "search_points": "", "min_tokens": 64, "dense_attention": "host",
            "verdict": "sparse", **settings,
        }  # fmt: skip
        model = load(name) if isinstance(name, str) else name
        return nodes["AdaSpaAttention"].execute(model, **widgets).args

    return run


@pytest.fixture
def saved(attention, nodes, folders):
    """A pattern of seed 1 and its video."""
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    out = sample(model, seed=1)
    return SimpleNamespace(path=folders.output / "city.safetensors", out=out, handle=handle)


def begin(nodes, model, handle, file="city.safetensors [output]"):
    return nodes["AdaSpaLoadPattern"].execute(model, handle, file).args


# ---- saving


def test_a_run_writes_its_pattern_when_it_ends(saved):
    pattern = read(saved.path)
    assert pattern.family == "Wan" and pattern.layout.tokens == 288
    # two layers, two prompts
    assert {(name.role, name.block_index) for name in pattern.layers} == {
        ("positive", 0), ("positive", 1), ("negative", 0), ("negative", 1),
    }  # fmt: skip
    statistics = saved.handle.latest()
    assert pattern.density() == pytest.approx(statistics.patterns.density(), abs=1e-3)
    assert pattern.recall() == pytest.approx(statistics.patterns.recall()[0], abs=1e-3)
    assert any(line.startswith("Pattern saved: city.safetensors, ") for line in statistics.lines())


def test_saving_changes_nothing_else(saved, attention):
    model, handle = attention()
    assert torch.equal(sample(model, seed=1), saved.out)
    assert not any("Pattern" in line for line in handle.latest().lines())
    assert handle.pattern is None and saved.handle.pattern is None


def test_a_file_is_never_overwritten(saved, attention, nodes, folders):
    before = saved.path.read_bytes()
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city.safetensors").args
    sample(model, seed=2)
    sample(model, seed=3)
    assert saved.path.read_bytes() == before
    assert sorted(path.name for path in folders.output.iterdir()) == [
        "city.safetensors", "city_00001_.safetensors", "city_00002_.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        "", " ", "../city", "a/b", "a\\b", "/city", "..", ".hidden", "C:city", "a\0b", "a\nb",
        "city.", "city. ", "city..safetensors", ".safetensors", "\udce9", 101 * "a", 51 * "é",
        34 * "城", "nul", "CON", "con.txt", "Aux .b", "com1", "LPT9.city", "COM¹", "prn.safetensors",
    ],
)  # fmt: skip
def test_a_name_that_no_system_takes_is_refused_before_sampling(attention, nodes, folders, name):
    model, handle = attention()
    with pytest.raises(ValueError, match="`name` must be a file name"):
        nodes["AdaSpaSavePattern"].execute(model, handle, name)
    assert not folders.output.exists()


@pytest.mark.parametrize(
    "name, file",
    [
        (100 * "a", 100 * "a"), (33 * "城", 33 * "城"), (" city .safetensors", "city"),
        ("nul_1", "nul_1"), ("console", "console"), ("com10", "com10"), ("cafe\u0301", "café"),
        ("v1.2 (night)", "v1.2 (night)"),
    ],
)  # fmt: skip
def test_any_other_name_becomes_the_file(attention, nodes, folders, name, file):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, name).args
    sample(model)
    assert [path.name for path in folders.output.iterdir()] == [f"{file}.safetensors"]


def test_a_full_disk_does_not_cost_the_video(attention, nodes, monkeypatch, saved):
    def full(*args, **options):
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "other").args
    assert torch.equal(sample(model, seed=1), saved.out)
    assert "the pattern was not saved (no space left)" in handle.latest().warnings


def test_a_dense_run_has_no_pattern_to_save(attention, nodes, folders):
    model, handle = attention(min_tokens=8192)
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    sample(model)
    assert "no pattern was saved, because no layer ran sparse" in handle.latest().warnings
    assert not folders.output.exists()


@pytest.fixture
def messages(nodes):
    """The pack's own module of messages; the nodes do not know those of the tests."""
    return sys.modules[f"{comfy_inprocess.load_pack().__name__}.sparse_attn.host.status"]


@pytest.fixture
def prompt(messages, monkeypatch):
    """prompt(id): from now on the server says that it runs this prompt."""

    def runs(prompt_id):
        monkeypatch.setattr(messages, "prompt_id", lambda: prompt_id)

    return runs


def not_saved(handle):
    lines = handle.latest().lines()
    return any(line.startswith("Pattern not saved: an earlier sampler of this") for line in lines)


def test_of_the_samplers_of_a_prompt_the_first_writes(attention, nodes, folders, prompt):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    found = []
    for number in (1, 1, 1, 2, 2):
        prompt(f"prompt {number}")
        sample(model, cfg=1.0)
        found.append((len(list(folders.output.iterdir())), not_saved(handle)))
    assert found == [(1, False), (1, True), (1, True), (2, False), (2, True)]


def test_every_sampler_writes_where_that_is_asked_for(attention, nodes, folders, prompt):
    model, handle = attention()
    save = nodes["AdaSpaSavePattern"]
    (model,) = save.execute(model, handle, "city", every_sampler=True).args
    prompt("prompt 1")
    for _ in range(3):
        sample(model, cfg=1.0)
        assert not not_saved(handle)
    assert len(list(folders.output.iterdir())) == 3


def test_a_run_that_has_nothing_to_save_or_fails_to_leaves_it_to_the_next(
    attention, nodes, folders, prompt, monkeypatch
):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    prompt("prompt 1")
    # too short
    sample(model, (1, 16, 1, 4, 4), cfg=1.0)
    with monkeypatch.context() as full:
        full.setattr("safetensors.torch.save_file", lambda *args, **options: 1 / 0)
        sample(model, cfg=1.0)
    assert "the pattern was not saved (division by zero)" in handle.latest().warnings
    sample(model, cfg=1.0)
    assert [path.name for path in folders.output.iterdir()] == ["city.safetensors"]


def test_the_size_is_said_before_the_file_is_written(
    attention, nodes, folders, messages, monkeypatch
):
    told = []
    monkeypatch.setattr(
        messages, "say", lambda node, text: told.append((text, folders.output.exists()))
    )
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    sample(model)
    (before, existed), (after, exists) = told
    assert (existed, exists) == (False, True)
    # two layers, two prompts, four heads of 5 x 5 blocks in a byte a row, and 288 tokens in order
    assert before == f"Writing a pattern of {2 * 2 * 4 * (5 + 288 * 4) / 2**20:.1f} MiB."
    assert after.startswith("Saved city.safetensors, ")


def test_a_message_that_cannot_be_sent_costs_neither_the_file_nor_the_run(
    attention, nodes, folders, messages, monkeypatch
):
    class Server:
        client_id = None

        def send_progress_text(self, *args):
            raise UnicodeEncodeError("utf-8", "\udce9", 0, 1, "surrogates not allowed")

        def send_sync(self, *args):
            pass

    monkeypatch.setattr(messages, "_server", Server)
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args
    monkeypatch.setattr(model.get_attachment("adaspa_save"), "node_id", "7")
    sample(model)
    assert (folders.output / "city.safetensors").exists()


# ---- loading


def test_the_same_seed_needs_no_search(saved, attention, nodes):
    model, handle = begin(nodes, *attention())
    out = sample(model, seed=1)
    assert calls(handle) == {"sparse": 16}
    statistics = handle.latest()
    assert statistics.reuse.masks == 4 and not statistics.reuse.refused
    # of the search step alone the result differs: it ran sparse
    assert torch.isfinite(out).all() and not torch.equal(out, saved.out)
    (line,) = [line for line in statistics.lines() if line.startswith("Pattern of ")]
    assert line.startswith("Pattern of city.safetensors: 4 masks used without a search, recall 0.")
    # 64 of 288 rows against the whole: the same tensors in step 0
    mean, _ = statistics.patterns.recall()
    assert mean == pytest.approx(read(saved.path).recall(), abs=0.03)


def test_a_loaded_pattern_decides_the_blocks(saved, attention, nodes):
    model, handle = begin(nodes, *attention(sparsity=0.2))
    sample(model, seed=1)
    assert handle.latest().patterns.density() == pytest.approx(read(saved.path).density(), abs=1e-3)


def test_without_a_loaded_pattern_the_wire_is_as_before(saved, attention, nodes):
    model, handle = attention()
    begin(nodes, model, handle)
    sample(model, seed=1)
    assert calls(handle) == {"search": 4, "sparse": 12}


@pytest.mark.parametrize(
    "name, shape, settings, words",
    [
        ("wan_h64", (1, 16, 5, 16, 24), {}, "and this run has 480 tokens (5x8x12 video)"),
        ("wan_h64", VIDEO, {"block_size": "128x64"}, "blocks of 64, and `block_size` is 128x64"),
        ("wan_t2v", VIDEO, {}, "4 heads, and this run has 1 and 2"),
        ("hunyuan", VIDEO, {}, "the pattern is of Wan, and this model is HunyuanVideo"),
    ],
)
def test_a_pattern_that_does_not_fit_is_no_error(saved, attention, nodes, name, shape, settings,
                                                 words):  # fmt: skip
    expected = sample(attention(name, **settings)[0], shape)
    model, handle = begin(nodes, *attention(name, **settings))
    assert torch.equal(sample(model, shape), expected)
    text = "\n".join(handle.latest().lines())
    assert f"Searched after all: {len(handle.latest().patterns)} masks, " in text and words in text


def test_a_video_of_another_batch_searches(saved, attention, nodes):
    model, handle = begin(nodes, *attention())
    sample(model, (2, *VIDEO[1:]))
    assert calls(handle)["search"] == 8
    (reason,) = handle.latest().reuse.refused
    assert reason.startswith("the pattern is for 1 video(s)")


def test_a_damaged_file_is_refused_before_sampling(saved, attention, nodes):
    saved.path.write_bytes(saved.path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"'city\.safetensors' cannot be read"):
        begin(nodes, *attention())


def test_only_files_in_the_users_folders_are_listed(saved, nodes, folders, tmp_path):
    folders.input.mkdir(parents=True)
    (folders.input / "mine.safetensors").write_bytes(saved.path.read_bytes())
    (folders.input / "notes.txt").write_text("no")
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(saved.path.read_bytes())
    (folders.input / "link.safetensors").symlink_to(outside)
    (file,) = [put for put in nodes["AdaSpaLoadPattern"].GET_SCHEMA().inputs if put.id == "file"]
    assert file.options == ["city.safetensors [output]", "mine.safetensors [input]"]


def test_what_cannot_be_named_or_read_is_not_listed(saved, nodes, folders):
    for name in (b"caf\xe9.safetensors", b"\xff\xfe.safetensors"):
        try:
            (folders.output / os.fsdecode(name)).write_bytes(saved.path.read_bytes())
        except OSError:
            pytest.skip("this file system has no such names")
    (folders.output / "folder.safetensors").mkdir()
    loop = folders.output / "loop.safetensors"
    loop.symlink_to(loop)
    folders.input.mkdir(parents=True)
    folders.input.rmdir()
    folders.input.write_text("a file where a folder is looked for")
    node = nodes["AdaSpaLoadPattern"]
    (file,) = [put for put in node.GET_SCHEMA().inputs if put.id == "file"]
    assert file.options == ["city.safetensors [output]"]
    assert node.fingerprint_inputs(file="caf\udce9.safetensors [output]") is None


def test_a_folder_that_cannot_be_listed_costs_only_its_own_files(
    saved, nodes, folders, monkeypatch
):
    glob = Path.glob

    def refused(self, pattern):
        if self == folders.input:
            raise PermissionError("no")
        return glob(self, pattern)

    monkeypatch.setattr(Path, "glob", refused)
    (file,) = [p for p in nodes["AdaSpaLoadPattern"].GET_SCHEMA().inputs if p.id == "file"]
    assert file.options == ["city.safetensors [output]"]


@pytest.mark.parametrize("file", ["../outside.safetensors", "link.safetensors [input]", ""])
def test_a_file_that_is_not_listed_is_not_opened(saved, attention, nodes, file):
    with pytest.raises(ValueError, match="There is no pattern"):
        begin(nodes, *attention(), file=file)


def test_a_changed_file_is_read_again(saved, nodes):
    node = nodes["AdaSpaLoadPattern"]
    before = node.fingerprint_inputs(file="city.safetensors [output]")
    assert before == node.fingerprint_inputs(file="city.safetensors [output]")
    saved.path.write_bytes(saved.path.read_bytes() + b" ")
    assert node.fingerprint_inputs(file="city.safetensors [output]") != before


@pytest.mark.parametrize("node, value", [("AdaSpaSavePattern", "city"),
                                         ("AdaSpaLoadPattern", "city.safetensors [output]")])  # fmt: skip
def test_wires_of_two_different_nodes_are_refused(saved, attention, nodes, load, node, value):
    model, _ = attention()
    _, handle = attention()
    for wrong in (model, load("wan_h64")):
        with pytest.raises(ValueError, match="wire both from the same node"):
            nodes[node].execute(wrong, handle, value)


def test_a_new_installation_does_not_keep_the_wishes_of_the_old(saved, attention, nodes):
    model, _ = begin(nodes, *attention())
    sample(model, seed=1)
    again, handle = attention(model)
    sample(again, seed=1)
    assert calls(handle) == {"search": 4, "sparse": 12}


def test_a_stopped_run_writes_nothing(attention, nodes, folders):
    model, handle = attention()
    (model,) = nodes["AdaSpaSavePattern"].execute(model, handle, "city").args

    def stop(*args):
        raise InterruptedError

    with pytest.raises(InterruptedError):
        sample(model, callback=stop)
    assert not folders.output.exists()


# ---- context windows


def test_windows_neither_keep_nor_begin_with_a_pattern(comfyui):
    from sparse_attn.host.model_call import Caller, name_of

    caller = Caller("a key", 3, 3, ("double", 3, 0))
    assert name_of(caller, "positive", None) == ("positive", "double", 3, 0)
    assert name_of(caller, "positive", ("window", 2, (0, 1))) is None
    assert name_of(caller, "conditioning 7", None) is None


# ---- before running


@pytest.fixture
def said(monkeypatch):
    """What the node shows: (lines, done)."""
    from sparse_attn.host import status

    found = []
    monkeypatch.setattr(
        status, "send", lambda node, statistics, said, step, done: found.append((said, done))
    )
    return found


def test_the_first_line_says_what_to_expect(load, said):
    model, handle = sparse(load("wan_h64"), warmup=0.25)
    sample(model)
    assert [done for _, done in said] == [False] * 4 + [True]
    progress, *expected = said[0][0]
    assert progress == "Step 1 of 4: dense."
    # plain torch searches in a pass and a half; 2 of 5 blocks and one of averages in two steps
    assert "288 tokens. Skips 7% of the video's attention, counted in blocks." in expected
    assert handle.latest().as_dict()["expected"] == " ".join(expected)
    # seconds, once a dense step was timed
    assert re.fullmatch(r"About .* s in all; about .* s without AdaSpa\.", said[1][0][-1])


def test_a_short_video_is_told_to_leave_it_off(load, said):
    model, handle = sparse(load("wan_h64"), min_tokens=8192)
    sample(model)
    assert said[0][0][1] == ("too short: 288 tokens, and `min_tokens` is 8,192: leave AdaSpa off.")
    assert len(said) == 5 and kept_dense(handle)


def test_a_model_without_a_layout_still_shows_its_steps(load, said, monkeypatch):
    from sparse_attn.host import install

    monkeypatch.setattr(install, "_layout", lambda *args: (None, "no rule"))
    model, _ = sparse(load("wan_h64"))
    assert_same_video(sample(model), sample(load("wan_h64")), 1e-6)
    assert [lines[0] for lines, _ in said[:4]] == [
        "Step 1 of 4: search.", *(f"Step {n} of 4: sparse." for n in (2, 3, 4)),
    ]  # fmt: skip


# ---- on a server


def test_a_pattern_of_one_prompt_serves_the_next(comfy_server):
    first = graph(warmup=0.0, seed=61)
    first["keep"] = node(
        "AdaSpaSavePattern", model=["adaspa", 0], adaspa=["adaspa", 1], name="tower"
    )
    first["sampler"]["inputs"]["model"] = ["keep", 0]
    entry = comfy_server.post(first)
    assert "Pattern saved: tower.safetensors, " in text_of(entry, "report")

    second = graph(warmup=0.0, seed=61, min_tokens=65)
    second["carried"] = node(
        "AdaSpaLoadPattern", model=["adaspa", 0], adaspa=["adaspa", 1],
        file="tower.safetensors [output]",
    )  # fmt: skip
    second["sampler"]["inputs"]["model"] = ["carried", 0]
    second["report"]["inputs"]["adaspa"] = ["carried", 1]
    entry = comfy_server.post(second)
    assert text_of(entry, "carried").startswith("Wan, 288 tokens (3x8x12 video), density 0.4")
    assert "Pattern of tower.safetensors: 4 masks used without a search" in text_of(entry, "report")
    second["carried"]["inputs"]["file"] = "../tower.safetensors"
    with pytest.raises(PromptFailed, match="not in list"):
        comfy_server.post(second)


def test_no_pattern_file_ends_the_thread_that_runs_prompts(comfy_server):
    """Whatever is chosen, the prompt fails with a sentence and the next one runs."""
    folder = comfy_server.base_directory / "output/adaspa"
    folder.mkdir(exist_ok=True)
    (folder / os.fsdecode(b"caf\xe9.safetensors")).write_bytes(b"no pattern")
    (folder / "broken.safetensors").write_bytes(b"no pattern")
    nested = {"format": "adaspa pattern", "version": "3", "crc32": "0", "layers": 9999 * "["}
    save_file({"mask.00000": torch.zeros(1)}, folder / "nested.safetensors", metadata=nested)
    options = comfy_server.object_info()["AdaSpaLoadPattern"]["input"]["required"]["file"]
    assert "broken.safetensors [output]" in str(options) and "caf" not in str(options)
    prompt = graph(warmup=0.0, seed=62)
    prompt["carried"] = node(
        "AdaSpaLoadPattern", model=["adaspa", 0], adaspa=["adaspa", 1], file=""
    )
    prompt["sampler"]["inputs"]["model"] = ["carried", 0]
    for file, words in [
        ("caf\udce9.safetensors", "not in list"),
        ("broken.safetensors", "'broken.safetensors' cannot be read"),
        ("nested.safetensors", "it is not what was written"),
    ]:
        prompt["carried"]["inputs"]["file"] = f"{file} [output]"
        with pytest.raises(PromptFailed, match=words):
            comfy_server.post(prompt)
    assert comfy_server.post(graph(warmup=0.0, seed=63))["status"]["status_str"] == "success"


def test_five_samplers_of_a_prompt_write_one_pattern(comfy_server):
    prompt = graph(warmup=0.0, seed=64)
    prompt["keep"] = node(
        "AdaSpaSavePattern", model=["adaspa", 0], adaspa=["adaspa", 1], name="five"
    )
    prompt["sampler"]["inputs"]["model"] = ["keep", 0]
    for number in range(4):
        inputs = {**prompt["sampler"]["inputs"], "seed": 65 + number}
        prompt[f"sampler {number}"] = node("KSampler", **inputs)
        prompt[f"file {number}"] = node(
            "SaveLatent", samples=[f"sampler {number}", 0], filename_prefix=f"latent{number}"
        )
    comfy_server.post(prompt)
    folder = comfy_server.base_directory / "output/adaspa"
    assert [path.name for path in folder.glob("five*")] == ["five.safetensors"]
    # another prompt with the node's result from ComfyUI's cache
    prompt["sampler 0"]["inputs"]["seed"] = 70
    comfy_server.post(prompt)
    assert len(list(folder.glob("five*"))) == 2


def test_both_experts_on_a_server(comfy_server):
    prompt = graph()
    loader, settings = prompt["loader"], dict(prompt["adaspa"]["inputs"])
    del settings["model"]
    settings["warmup"] = 0.0
    prompt["adaspa"] = node(
        "AdaSpaAttentionPair", model_high=["loader", 0], model_low=["low", 0], **settings
    )
    prompt["low"] = {**loader}
    first = prompt.pop("sampler")["inputs"]
    del first["seed"], first["denoise"]
    steps = {"noise_seed": 71, "add_noise": "enable", "start_at_step": 0, "end_at_step": 2}
    prompt["high"] = node(
        "KSamplerAdvanced", **{**first, **steps, "return_with_leftover_noise": "enable"}
    )
    steps = {"noise_seed": 71, "add_noise": "disable", "start_at_step": 2, "end_at_step": 4}
    more = {"latent_image": ["high", 0], "model": ["adaspa", 1]}
    prompt["sampler"] = node(
        "KSamplerAdvanced", **{**first, **steps, **more, "return_with_leftover_noise": "disable"}
    )
    prompt["report"]["inputs"]["adaspa"] = ["adaspa", 2]
    entry = comfy_server.post(prompt)
    lines = text_of(entry, "report").split("\n")
    assert lines[1].startswith("288 tokens, steps 1 search, 2 sparse")
    assert any(line.startswith("Pattern of the high noise expert: ") for line in lines)
    assert len(entry["outputs"]["report"]["adaspa"]) == 2


def test_the_server_serves_a_help_page_for_every_node(comfy_server):
    from tests.web.test_web import WEB, fetch

    def inputs_of(name):
        order = comfy_server.object_info()[name]["input_order"]
        return {*order.get("required", []), *order.get("optional", [])}

    names = [name for name in comfy_server.object_info() if name.startswith("AdaSpa")]
    names = [name for name in names if "HostTest" not in name]
    pages = {page.stem for page in (WEB / "docs").glob("*.md")}
    # that node is listed only where Raylight is installed
    assert set(names) == pages - {"AdaSpaRaylight"}
    for name in names:
        text = fetch(comfy_server, f"/extensions/adaspa/docs/{name}.md")
        assert text == (WEB / "docs" / f"{name}.md").read_text(encoding="utf-8")
        own = inputs_of(name)
        if name == "AdaSpaAttentionPair":
            # its page names the page of the settings that both have
            assert "*AdaSpa*" in text
            own -= inputs_of("AdaSpaAttention")
        for put in own:
            assert f"**{put}**" in text, (name, put)
