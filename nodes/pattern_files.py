"""Where patterns lie: the `adaspa` folder in ComfyUI's output and input folders, nowhere else."""

import re
from itertools import count
from pathlib import Path

import folder_paths

FOLDER, SUFFIX = "adaspa", ".safetensors"
LONGEST_NAME = 100


def folders() -> dict[str, Path]:
    """Folders that patterns are loaded from, by the name that follows a file in the list."""
    return {
        "output": Path(folder_paths.get_output_directory()) / FOLDER,
        "input": Path(folder_paths.get_input_directory()) / FOLDER,
    }


def listed() -> dict[str, Path]:
    """Pattern files by the name that the node lists, such as "city.safetensors [output]"."""
    found = {}
    for place, folder in folders().items():
        for path in sorted(folder.glob(f"*{SUFFIX}")):
            # a link may lead out of the folder
            if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
                found[f"{path.name} [{place}]"] = path
    return found


def checked_name(name: str) -> str:
    """Return the name of a file to write, without its ending.

    Raises:
        ValueError: the name would leave the folder, or is none.
    """
    name = name.strip().removesuffix(SUFFIX)
    if not name or len(name) > LONGEST_NAME or not re.fullmatch(r"\w[\w .()+-]*", name):
        raise ValueError(
            f"`name` must be a file name of letters, digits, spaces and . - + ( ) without a "
            f"folder, got {name[:LONGEST_NAME]!r}. Try: city_at_night."
        )
    return name


def free_path(name: str) -> Path:
    """Return a path that does not exist yet: the name, else the name with the next number."""
    folder = folders()["output"]
    folder.mkdir(parents=True, exist_ok=True)
    names = (name if n == 0 else f"{name}_{n:05}_" for n in count())
    return next(path for n in names if not (path := folder / f"{n}{SUFFIX}").exists())
