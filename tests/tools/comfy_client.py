"""The HTTP side of a running ComfyUI: queue a prompt, wait for it, fetch what it made."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid

from .console import ExpectedFailure, seconds

# a proxy from the environment must not see requests to this machine
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class ServerFailed(ExpectedFailure):
    """The server did not start, stopped by itself, or did not answer in time."""


class PromptFailed(Exception):
    """ComfyUI refused or aborted a prompt; `details` is what it said, `entry` the history entry."""

    def __init__(self, message: str, details=None, entry: dict | None = None):
        super().__init__(message)
        self.details = details
        self.entry = entry


class ComfyClient:
    """Speaks to the ComfyUI at `address`, http://HOST:PORT."""

    address: str

    def require_alive(self) -> None:
        """Raise ServerFailed if the server is known to be gone."""

    def request(self, path: str, body=None, timeout: float = 60) -> bytes:
        """GET `path`, or POST `body` as JSON."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, data)
        if data is not None:
            request.add_header("Content-Type", "application/json")
        with _opener.open(request, timeout=timeout) as response:
            return response.read()

    def get(self, path: str, timeout: float = 60):
        """GET `path` and parse the JSON answer."""
        return json.loads(self.request(path, timeout=timeout))

    def object_info(self) -> dict:
        """Every node the server knows, by node id."""
        return self.get("/object_info")

    def view(self, file: dict) -> bytes:
        """Fetch an output file by its entry in a history entry: filename, subfolder, type."""
        return self.request("/view?" + urllib.parse.urlencode(file))

    def interrupt(self, prompt_id: str | None = None) -> None:
        """Ask the running prompt to stop, if it is the one that is meant."""
        self.request("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def queue(self) -> dict[str, list[str]]:
        """Ids of the prompts that are "running" and "pending"."""
        found = self.get("/queue")
        return {
            kind: [entry[1] for entry in found[f"queue_{kind}"]] for kind in ("running", "pending")
        }

    def submit(
        self, prompt: dict, extra_data: dict | None = None, client_id: str | None = None
    ) -> str:  # fmt: skip
        """Queue an API-format prompt and return its id.

        Raises:
            PromptFailed: ComfyUI refused it; the message holds every node's complaint.
        """
        body = {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex}
        if extra_data:
            body["extra_data"] = extra_data
        try:
            return json.loads(self.request("/prompt", body))["prompt_id"]
        except urllib.error.HTTPError as error:
            text = error.read().decode("utf-8", "replace")
            raise PromptFailed(_refusal(text), details=_parsed(text)) from None

    def wait(self, prompt_id: str, timeout: float = 600) -> dict:
        """Return the history entry of a prompt once it has ended well.

        Raises:
            PromptFailed: a node failed, or the prompt was interrupted.
        """
        end = time.monotonic() + timeout
        pause = 0.05
        while time.monotonic() < end:
            try:
                entry = self.get(f"/history/{prompt_id}").get(prompt_id)
            except (OSError, ValueError):
                self.require_alive()
                entry = None
            if entry and entry.get("status"):
                _raise_if_failed(entry)
                return entry
            self.require_alive()
            time.sleep(pause)
            pause = min(pause * 1.5, 0.5)
        raise ServerFailed(
            f"The prompt did not end within {seconds(timeout)}; look into the server's log."
        )

    def post(self, prompt: dict, timeout: float = 600, extra_data: dict | None = None) -> dict:
        """Run an API-format prompt to its end and return its history entry."""
        return self.wait(self.submit(prompt, extra_data), timeout)


def _parsed(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return None


def _refusal(text: str) -> str:
    answer = _parsed(text)
    if not isinstance(answer, dict):
        return f"ComfyUI refused the prompt: {text[:500]}"
    error = answer.get("error")
    lines = [error.get("message", "") if isinstance(error, dict) else str(error)]
    for node, found in (answer.get("node_errors") or {}).items():
        for e in found.get("errors", []):
            lines.append(
                f"node {node} ({found.get('class_type')}): {e.get('message')}: {e.get('details')}"
            )
    return "ComfyUI refused the prompt: " + "; ".join(lines)


def _raise_if_failed(entry: dict) -> None:
    status = entry["status"]
    if status.get("status_str") == "success":
        return
    for kind, details in status.get("messages", []):
        if kind == "execution_error":
            where = f"node {details.get('node_id')} ({details.get('node_type')})"
            what = f"{details.get('exception_type')}: {details.get('exception_message')}"
            raise PromptFailed(f"{where} failed with {what.strip()}", details, entry)
        if kind == "execution_interrupted":
            raise PromptFailed("The prompt was interrupted", details, entry)
    raise PromptFailed(f"The prompt ended as {status.get('status_str')}", status, entry)
