"""The commands of run.py."""

from __future__ import annotations

import argparse
import errno
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from . import browser, comfyui_source, environment, pins, torch_build
from .comfy_server import ComfyServer
from .console import ExpectedFailure, say, seconds, size
from .probe import probe

HELP = """\
AdaSpa for ComfyUI: set-up and commands. Each command prepares what it needs by itself the first
time, into the hidden folder .adaspa, and reuses it afterwards.

commands
  demo      make the same short video twice, dense and with AdaSpa, and compare
  serve     start ComfyUI with the pack, a tiny video model and the workflows; open it in a browser
  doctor    show GPU and versions, which backend would serve and why, and check its results
  bench     measure attention on this machine's GPU in less than four minutes, and print a line
            to paste into an issue (on a CPU: the plain backend against torch); arguments go to the
            longer contest, tests/bench/bench_attention.py
              --tune  try other tiles on this card, keep the fastest, and let the pack use them
  test      run all checks, those that concern ComfyUI on {oldest} too; further arguments go to
            pytest, which then runs once
              --long  run the tests marked long instead, and write down what they gave
              --gpu   run the kernels' tests on this machine's GPU, and no others

options
  --python PATH       prepare and run with another Python (3.10 to 3.13)
  --comfyui VERSION   demo, serve, test: a pinned ComfyUI instead ({versions})
  --port N            serve: port (8188)
  --listen ADDRESS    serve: address to listen on (127.0.0.1; 0.0.0.0 lets other machines in)

environment variables
  COMFYUI_PATH        your own ComfyUI; without it, the ComfyUI whose custom_nodes holds this
                      folder is used, else one from the package index
  ADASPA_HOME         where prepared things go instead of .adaspa
  ADASPA_PYTHON       same as --python
  ADASPA_TORCH        the torch to install, as for pip (torch==2.9.1, a wheel), instead of {torch}
"""


class Terminated(KeyboardInterrupt):
    """We were told to end, by something else than Ctrl-C."""


def _terminate(signum, frame) -> None:
    raise Terminated


def end_cleanly() -> None:
    """Let a request to terminate stop what we started, too."""
    signal.signal(signal.SIGTERM, _terminate)


def run_in(env: environment.Environment, args: list[str], more: dict | None = None) -> int:
    """Run the prepared Python with `args`, and return its exit code."""
    variables = {**env.variables(), **(more or {})}
    return call([env.python, *args], variables)


def call(command: list[str], env: dict | None = None) -> int:
    """Run a program with our input and output; wait for it, also while it handles Ctrl-C."""
    process = subprocess.Popen(command, cwd=environment.ROOT, env=env)
    try:
        return process.wait()
    except KeyboardInterrupt as stop:
        # the terminal sent Ctrl-C to the program too; nobody else told it to terminate
        if isinstance(stop, Terminated):
            process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise


def prepared(options, level: str) -> environment.Environment:
    """The environment for a command, with the ComfyUI version that was asked for."""
    variables = dict(os.environ)
    wanted = getattr(options, "comfyui", None)
    if wanted:
        if wanted not in pins.COMFYUI:
            known = ", ".join(pins.COMFYUI)
            raise ExpectedFailure(f"There is no pinned ComfyUI {wanted}; choose one of {known}.")
        variables.pop("COMFYUI_PATH", None)
    env = environment.prepare(level, options.root, variables)
    if wanted:
        env = environment.with_comfyui(env, wanted)
    if env.comfyui:
        say(f"ComfyUI {comfyui_source.version_of(Path(env.comfyui))} in {env.comfyui}")
    say(f"torch {env.torch} on {env.device}, {env.python}")
    return env


# demo, bench


def script(path: str) -> str:
    file = environment.ROOT / path
    if not file.is_file():
        raise ExpectedFailure(f"{path} is missing; get a complete copy of the project.")
    return str(file)


def demo(options, extra: list[str]) -> int:
    env = prepared(options, "comfyui")
    return run_in(env, [script("tests/demo/run_demo.py"), *extra])


def bench(options, extra: list[str]) -> int:
    tune = "--tune" in extra
    own = "tests/bench/tune_tiles.py" if tune else "tests/bench/bench_card.py"
    if tune or not extra:
        # a card's owner measures what ComfyUI runs with, and installs nothing
        facts = probe(sys.executable)
        if facts["device"] == "cuda":
            return call([sys.executable, script(own), *extra])
    env = prepared(options, "kernels")
    if tune or env.device == "cuda":
        file = own if tune or not extra else "tests/bench/bench_attention.py"
        return run_in(env, [script(file), *extra])
    say(
        "The kernel benchmark needs an NVIDIA GPU that torch can use; here is the comparison of the"
        " plain backend with torch on the CPU instead."
    )
    return run_in(env, [script("tests/bench/bench_eager.py"), *extra])


# test


def test(options, extra: list[str]) -> int:
    if not (environment.ROOT / "tests" / "repository").is_dir():
        raise ExpectedFailure("The registry's copy of the pack has no tests; get the repository.")
    if options.gpu:
        return test_on_gpu(options, extra)
    started = time.monotonic()
    env = prepared(options, "comfyui")
    node = [script("tests/tools/node_programs.py")]
    results = []

    def part(name: str, run) -> None:
        say(f"\n== {name}")
        begin = time.monotonic()
        outcome = run()
        results.append((name, outcome, time.monotonic() - begin))

    part("ruff", lambda: run_in(env, ["-m", "ruff", "check"]))
    part("format", lambda: run_in(env, ["-m", "ruff", "format", "--check"]))
    if extra or options.long:
        chosen = ["--long", *extra] if options.long else extra
        part("pytest", lambda: _pytest(env, chosen))
    else:
        part("pyright", lambda: run_in(env, [*node, "types"]))
        part("pytest", lambda: _pytest(env, side_by_side(env)))
    if runs_oldest(options, extra):
        oldest = environment.with_comfyui(env, pins.OLDEST_COMFYUI)
        part(
            f"ComfyUI {pins.OLDEST_COMFYUI}",
            lambda: _pytest(
                oldest, [*side_by_side(env), "-p", "no:cacheprovider", *ONCE, *host_tests()]
            ),
        )
    part("web tests", lambda: run_in(env, [*node, "web"]))
    say("\n== summary")
    for name, outcome, took in results:
        said = f"FAILED (exit code {outcome})" if outcome else "passed"
        say(f"{name:<14} {said:<26} {seconds(took)}")
    failed = [name for name, outcome, _ in results if outcome]
    left_out = "" if browser.chromium() else f"; browser tests did not run: {browser.MISSING}"
    say(
        f"{'FAILED: ' + ', '.join(failed) if failed else 'All passed'} in"
        f" {seconds(time.monotonic() - started)}{left_out}"
    )
    return 1 if failed else 0


def _pytest(env: environment.Environment, args: list[str]) -> int:
    more = {} if env.device == "cuda" else {"TRITON_INTERPRET": "1"}
    return run_in(env, ["-m", "pytest", *args], more)


def side_by_side(env: environment.Environment) -> list[str]:
    """Arguments that let pytest use several cores: a file at a time, in the order of collection."""
    # processes would share the GPU's memory, and each needs about 2 GB of the machine's
    workers = 1 if env.device == "cuda" else min(4, os.cpu_count() or 1)
    if workers == 1:
        return []
    return ["-n", str(workers), "--dist", "loadfile", "--no-loadscope-reorder"]


def test_on_gpu(options, extra: list[str]) -> int:
    """The kernels' own tests, compiled and run on this machine's GPU."""
    env = prepared(options, "kernels")
    if env.device != "cuda":
        raise ExpectedFailure(
            "--gpu needs an NVIDIA GPU that torch can use, and there is none; leave it out to run"
            " the kernels in Triton's interpreter."
        )
    os.environ.pop("TRITON_INTERPRET", None)
    return run_in(env, ["-m", "pytest", *(extra or ["tests/backends", "tests/orders"])])


def runs_oldest(options, extra: list[str]) -> bool:
    """Whether `test` also runs on the oldest ComfyUI: only where no ComfyUI and no test is named."""
    own = comfyui_source.locate(options.root, os.environ)
    return not (options.comfyui or options.long or extra or own)


# what depends on the version of ComfyUI
HOST_TESTS = ("host", "nodes", "web")
ONCE = ("-m", "not any_comfyui")


def host_tests() -> list[str]:
    tests = environment.ROOT / "tests"
    return sorted(str(file) for name in HOST_TESTS for file in (tests / name).rglob("test_*.py"))


# serve


def serve(options, extra: list[str]) -> int:
    env = prepared(options, "comfyui")
    os.environ.update(ADASPA_DEVICE=env.device, ADASPA_HOME=env.home)
    tiny = environment.ROOT / "tests" / "tiny_model"
    base = Path(env.home) / "serve"
    assert env.comfyui
    server = ComfyServer(
        env.comfyui,
        base,
        extra_custom_nodes=[("adaspa_tiny_model", tiny)] if (tiny / "__init__.py").exists() else [],
        model_files=sorted(tiny.glob("*.safetensors.xz")),
        port=options.port,
        listen=options.listen,
        args=extra,
        python=env.python,
    )
    _offer_workflows(tiny / "workflows", base / "user" / "default" / "workflows")
    say("Starting ComfyUI ...")
    with server:
        say(f"ComfyUI is up after {seconds(server.started_in)}: {server.address}")
        say(f"Its log is {server.log_path}")
        for graph in sorted(tiny.glob("workflows/*.json")):
            say(f"To try it without any model: Workflows in the sidebar, {graph.stem}, Run")
        say(f"Put your own models into {base / 'models'}")
        say("Stop it with Ctrl-C.")
        try:
            while server.is_alive():
                time.sleep(0.5)
        except KeyboardInterrupt:
            say("\nStopping ComfyUI ...")
            return 0
    raise ExpectedFailure(f"ComfyUI stopped by itself; see why in {server.log_path}.")


def _offer_workflows(source: Path, target: Path) -> None:
    """Put workflows of the tiny model where ComfyUI's sidebar lists them; keep changed ones."""
    for file in source.glob("*.json") if source.is_dir() else ():
        target.mkdir(parents=True, exist_ok=True)
        if not (target / file.name).exists():
            shutil.copyfile(file, target / file.name)


# doctor

_REPORT = """
import sys, warnings
# a torch without NumPy warns on import, and nothing here needs NumPy
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
sys.path[:0] = [{root!r}]
from sparse_attn.backends import doctor
said = doctor.report({user!r})
if isinstance(said, str):
    print(said)
sys.exit(1 if said is False else 0)
"""


def doctor(options, extra: list[str]) -> int:
    facts = probe(sys.executable)
    python = sys.executable
    if facts["device"] is None:
        env = environment.prepare("torch", options.root)
        python = env.python
        facts = probe(python)
    for name, value in [
        *_description(facts, python, options.root),
        *_placeholder(environment.ROOT),
    ]:
        say(f"{name:<10} {value}")
    say()
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    try:
        own = comfyui_source.locate(options.root, os.environ)
    except ExpectedFailure:
        own = None
    code = _REPORT.format(root=str(environment.ROOT), user=str(own / "user") if own else None)
    return call([python, "-c", code], variables)


def _description(facts: dict, python: str, root: Path) -> list[tuple[str, str]]:
    versions = facts["versions"]
    rows = [
        ("system", f"{platform.system()} {platform.release()} {platform.machine()}"),
        ("python", f"{facts['python']} ({python})"),
        ("torch", f"{facts['torch']} on {facts['device']}"),
        ("triton", versions.get("triton") or versions.get("triton-windows") or "not installed"),
    ]
    for gpu in facts["gpus"]:
        major, minor = gpu["capability"]
        rows.append(("gpu", f"{gpu['name']}, {size(gpu['memory'])}, sm_{major}{minor}"))
    if not facts["gpus"]:
        nvidia = torch_build.has_nvidia_gpu()
        seen = "an NVIDIA GPU is there, but this torch does not reach it" if nvidia else "none"
        rows.append(("gpu", seen if facts["device"] in ("cpu", None) else facts["device"]))
    rows.append(("driver", _driver()))
    try:
        own = comfyui_source.locate(root, os.environ)
    except ExpectedFailure as failure:
        rows.append(("comfyui", str(failure)))
        return rows
    if own:
        rows.append(("comfyui", f"{comfyui_source.version_of(own)} in {own}"))
    else:
        rows.append(("comfyui", f"none of yours found; run.py would use {pins.DEFAULT_COMFYUI}"))
    return rows


def _placeholder(pack: Path) -> list[tuple[str, str]]:
    """What the publisher of the pack has still to fill in."""
    files = ("pyproject.toml", "README.md")
    named = [name for name in files if "/OWNER/" in (pack / name).read_text("utf-8")]
    if not named:
        return []
    return [("address", f"OWNER in {' and '.join(named)} stands for the account that publishes it")]


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "no NVIDIA driver found"
    query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        run = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "nvidia-smi does not answer"
    return run.stdout.strip().splitlines()[0] if run.stdout.strip() else "nvidia-smi lists no GPU"


# entry

COMMANDS = {"demo": demo, "test": test, "serve": serve, "bench": bench, "doctor": doctor}


def _port(text: str) -> int:
    if not 0 < int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is no port; choose one from 1 to 65535")
    return int(text)


def _parse(argv: list[str]):
    parser = argparse.ArgumentParser(prog="run.py", add_help=False, allow_abbrev=False)
    parser.add_argument("--comfyui")
    if argv[0] == "serve":
        parser.add_argument("--port", type=_port, default=8188)
        parser.add_argument("--listen", default="127.0.0.1")
    if argv[0] == "test":
        parser.add_argument("--long", action="store_true")
        parser.add_argument("--gpu", action="store_true")
    return parser.parse_known_args(argv[1:])


def _help() -> str:
    versions = ", ".join(pins.COMFYUI)
    return HELP.format(versions=versions, oldest=pins.OLDEST_COMFYUI, torch=pins.TORCH)


def main(argv: list[str], root: Path) -> int:
    """Run one command; an expected failure is one sentence, not a traceback."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        say(_help())
        return 0 if argv else 2
    if argv[0] not in COMMANDS:
        say(f"There is no command {argv[0]}; choose one of {', '.join(COMMANDS)}.")
        return 2
    if argv[0] in ("serve", "doctor") and {"-h", "--help"} & set(argv[1:]):
        say(_help())
        return 0
    options, extra = _parse(argv)
    if extra and argv[0] == "doctor":
        say(f"doctor knows no {' '.join(extra)}; see --help.")
        return 2
    options.root = root
    try:
        return COMMANDS[argv[0]](options, extra)
    except ExpectedFailure as failure:
        say(f"\n{failure}")
        return 1
    except KeyboardInterrupt:
        say("\nStopped.")
        return 130
    except OSError as error:
        if error.errno == errno.ENOSPC:
            say("\nThe disk is full; free some space and start again, it goes on where it stopped.")
            return 1
        raise
