"""What a Python interpreter can do, asked in a process of its own: torch, its device, ComfyUI."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

# runs in the interpreter in question, so it must not need anything from here
_SCRIPT = r"""
import json, platform, sys
import importlib.metadata as metadata
facts = {"python": platform.python_version(), "torch": None, "device": None, "gpus": []}
facts["versions"] = {}
for dist in metadata.distributions():
    name = (dist.metadata["Name"] or "").lower().replace("_", "-").replace(".", "-")
    if name:
        facts["versions"].setdefault(name, dist.version)
try:
    import torch
    facts["torch"] = torch.__version__
    facts["cuda_build"] = torch.version.cuda or getattr(torch.version, "hip", None)
    torch.ones(2).sum().item()
    if torch.cuda.is_available():
        torch.ones(2, device="cuda").sum().item()
        facts["device"] = "cuda"
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            facts["gpus"].append({
                "name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory})
    elif getattr(torch, "xpu", None) and torch.xpu.is_available():
        facts["device"] = "xpu"
    elif torch.backends.mps.is_available():
        facts["device"] = "mps"
    else:
        facts["device"] = "cpu"
except Exception as error:
    facts["error"] = type(error).__name__ + ": " + str(error).splitlines()[0]
facts["imports"] = {}
for name in sys.argv[2:]:
    try:
        if name == "torchvision":
            sys.path.append(sys.argv[1])
            import torchvision_shim
            facts["torchvision_shim"] = torchvision_shim.import_torchvision()
        else:
            __import__(name)
        facts["imports"][name] = None
    except BaseException as error:
        text = (str(error) or "failed").splitlines()[0]
        facts["imports"][name] = type(error).__name__ + ": " + text
print("FACTS" + json.dumps(facts))
"""

NOTHING = {"python": None, "torch": None, "device": None, "gpus": [], "versions": {}, "imports": {}}


def probe(
    python: str = sys.executable, imports: tuple[str, ...] = (), timeout: float = 180
) -> dict:
    """Report what `python` can do.

    Returns:
        `python`, `torch` (version or None), `cuda_build`, `device` (cuda, xpu, mps or cpu; None if
        torch does not work, and then `error`), `gpus`, `versions` of every installed project, and
        `imports`: name to error or None.
    """
    try:
        run = subprocess.run(
            [str(python), "-c", _SCRIPT, str(Path(__file__).resolve().parent), *imports],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {**NOTHING, "error": str(error)}
    for line in run.stdout.splitlines():
        if line.startswith("FACTS"):
            return json.loads(line[len("FACTS") :])
    last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    return {**NOTHING, "error": last}
