"""A real ComfyUI server, headless, with our pack linked in and nothing of the user's touched.

Used as:

    with ComfyServer(comfyui_path, base_directory, extra_custom_nodes=[folder]) as server:
        entry = server.post(prompt)
        entry["outputs"]
"""

from __future__ import annotations

import lzma
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from .comfy_client import ComfyClient, PromptFailed, ServerFailed
from .console import seconds
from .lock import Held
from .mounts import link_or_copy, link_pack

__all__ = ["ComfyServer", "PromptFailed", "ServerFailed", "free_port", "port_is_free"]

ROOT = Path(__file__).resolve().parents[2]
MAIN = Path(__file__).resolve().with_name("comfy_main.py")
FOLDERS = (
    "custom_nodes",
    "input",
    "models/diffusion_models",
    "output",
    "temp",
    "user",
)
CPU_ARGUMENTS = ("--cpu", "--use-pytorch-cross-attention")


def free_port() -> int:
    """Return a port nobody listens on right now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def port_is_free(port: int, listen: str = "127.0.0.1") -> bool:
    """Say whether a server could listen on `port`."""
    with socket.socket() as s:
        if os.name != "nt":
            # a port whose last connections are only lingering can be listened on
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((listen.split(",")[0], port))
        except OSError:
            return False
    return True


class ComfyServer(ComfyClient):
    """Starts ComfyUI on entering, and ends it with all its processes on leaving.

    Args:
        comfyui_path: the folder that holds ComfyUI's `main.py`.
        base_directory: where models, inputs, outputs and user files of this server live.
        extra_custom_nodes: node folders, or (name, folder) to mount one under another name.
        model_files: files for `models/diffusion_models`, or (path below `models`, file). Those that
            end with .xz are unpacked, and lose that ending.
        port: None takes a free one.
        args: more arguments for ComfyUI's `main.py`.
        cpu: None looks whether torch sees an accelerator.
        pack: the folder of the pack that it loads.
        end_with_parent: stop when this process dies; never needed on Windows.
    """

    def __init__(
        self,
        comfyui_path,
        base_directory,
        extra_custom_nodes: Iterable = (),
        model_files: Iterable = (),
        port: int | None = None,
        args: Iterable[str] = (),
        *,
        listen: str = "127.0.0.1",
        cpu: bool | None = None,
        python: str = sys.executable,
        timeout: float = 240,
        pack: Path = ROOT,
        env: dict[str, str] | None = None,
    ):
        self.comfyui_path = Path(comfyui_path).resolve()
        self.base_directory = Path(base_directory).resolve()
        self.extra_custom_nodes = list(extra_custom_nodes)
        self.model_files = list(model_files)
        self.port = port
        self.args = list(args)
        self.listen = listen
        self.cpu = cpu
        self.python = str(python)
        self.timeout = timeout
        self.pack = pack
        self.env = env or {}
        self.process: subprocess.Popen | None = None
        self.started_in = 0.0
        self._lock: Held | None = None

    # set-up

    @property
    def log_path(self) -> Path:
        return self.base_directory / "server.log"

    @property
    def log(self) -> str:
        """Everything the server printed so far."""
        try:
            return self.log_path.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return ""

    def prepare(self) -> None:
        """Lay out the base directory: folders, the pack, extra nodes, model files."""
        for name in FOLDERS:
            (self.base_directory / name).mkdir(parents=True, exist_ok=True)
        custom_nodes = self.base_directory / "custom_nodes"
        link_pack(custom_nodes, self.pack)
        for item in self.extra_custom_nodes:
            name, folder = item if isinstance(item, tuple) else (Path(item).name, item)
            folder = Path(folder).resolve()
            if not folder.exists():
                raise ServerFailed(f"The node folder {folder} does not exist; check its path.")
            link_or_copy(folder, custom_nodes / name)
        for item in self.model_files:
            below, file = (
                item if isinstance(item, tuple) else (f"diffusion_models/{Path(item).name}", item)
            )
            file = Path(file).resolve()
            if not file.is_file():
                raise ServerFailed(f"The model file {file} does not exist; check its path.")
            place = self.base_directory / "models" / below
            if file.suffix == ".xz":
                place = place.with_suffix("")
                # not through a link that an earlier server left
                place.unlink(missing_ok=True)
                with lzma.open(file) as packed, place.open("wb") as whole:
                    shutil.copyfileobj(packed, whole)
            else:
                link_or_copy(file, place)

    def _sees_only_cpu(self) -> bool:
        device = os.environ.get("ADASPA_DEVICE")
        if device is None:
            from .probe import probe

            device = probe(self.python)["device"]
        return device == "cpu"

    def _command(self) -> list[str]:
        cpu = self._sees_only_cpu() if self.cpu is None else self.cpu
        database = (self.base_directory / "user" / "comfyui.db").as_posix()
        return [
            self.python,
            "-u",
            str(MAIN),
            str(self.comfyui_path),
            *("--listen", self.listen, "--port", str(self.port)),
            *("--base-directory", str(self.base_directory)),
            *("--database-url", f"sqlite:///{database}"),
            *("--disable-auto-launch", "--disable-api-nodes"),
            *(CPU_ARGUMENTS if cpu else ()),
            *self.args,
        ]

    def _environment(self) -> dict[str, str]:
        env = {**os.environ, **self.env}
        # our root on the path would hide ComfyUI's nodes.py behind our nodes folder
        paths = env.get("PYTHONPATH", "").split(os.pathsep)
        ours = {ROOT, ROOT / "tests"}
        env["PYTHONPATH"] = os.pathsep.join(p for p in paths if p and Path(p).resolve() not in ours)
        env["PYTHONIOENCODING"] = "utf-8"
        env["PYTHONUNBUFFERED"] = "1"
        if os.name != "nt":
            env["ADASPA_END_WITH_PARENT"] = "1"
        return env

    # life

    def start(self) -> ComfyServer:
        """Start the server and return once it answers."""
        if not (self.comfyui_path / "main.py").is_file():
            raise ServerFailed(
                f"There is no ComfyUI in {self.comfyui_path}; set COMFYUI_PATH to the folder"
                " that holds its main.py."
            )
        if self.port is None:
            self.port = free_port()
        elif not port_is_free(self.port, self.listen):
            raise ServerFailed(f"Port {self.port} is in use; choose another one with --port.")
        host = self.listen.split(",")[0]
        host = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        self.address = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._lock = Held(self.base_directory / "server.lock")
        if not self._lock.acquire():
            self._lock.release()
            raise ServerFailed(
                f"Another ComfyUI already runs on {self.base_directory}; stop that one first."
            )
        started = time.monotonic()
        try:
            self.prepare()
            self._launch()
            self._wait_until_up(started)
        except BaseException:
            self.stop()
            raise
        self.started_in = time.monotonic() - started
        return self

    def _launch(self) -> None:
        on_windows = os.name == "nt"
        with open(self.log_path, "wb") as log:
            self.process = subprocess.Popen(
                self._command(),
                cwd=self.comfyui_path,
                env=self._environment(),
                stdin=subprocess.DEVNULL if on_windows else subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),
                start_new_session=not on_windows,
            )

    def _wait_until_up(self, started: float) -> None:
        while time.monotonic() - started < self.timeout:
            self.require_alive()
            try:
                argv = self.get("/system_stats", timeout=5)["system"].get("argv")
            except (OSError, ValueError, KeyError):
                time.sleep(0.2)
                continue
            if argv and str(self.base_directory) not in argv:
                raise ServerFailed(
                    f"Another ComfyUI answers on port {self.port}; choose another one with --port."
                )
            return
        raise ServerFailed(
            f"ComfyUI did not answer within {seconds(self.timeout)}; its log is {self.log_path}."
        )

    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def require_alive(self) -> None:
        if self.process is None:
            raise ServerFailed("The server is not running; call start() first.")
        code = self.process.poll()
        if code is not None:
            last = "\n".join(self.log.strip().splitlines()[-15:])
            raise ServerFailed(
                f"ComfyUI stopped with exit code {code}; its log is {self.log_path} and ends:\n"
                f"{last}"
            )

    def stop(self) -> None:
        """End the server and every process it started."""
        process, self.process = self.process, None
        if process is not None:
            self._end(process)
        if self._lock:
            self._lock.release()

    def _end(self, process: subprocess.Popen) -> None:
        if os.name == "nt":
            subprocess.run(
                ["taskkill", "/T", "/F", "/PID", str(process.pid)], capture_output=True, check=False
            )
        else:
            # ComfyUI ends in an orderly way on SIGINT; what is left after that is killed
            for sig, patience in ((signal.SIGINT, 5), (signal.SIGKILL, 10)):
                try:
                    os.killpg(process.pid, sig)
                except (ProcessLookupError, PermissionError):
                    break
                try:
                    process.wait(patience)
                except subprocess.TimeoutExpired:
                    continue
        process.wait()
        if process.stdin:
            process.stdin.close()

    def __enter__(self) -> ComfyServer:
        return self.start()

    def __exit__(self, *exc) -> None:
        self.stop()
