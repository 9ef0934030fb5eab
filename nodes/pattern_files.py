"""Where patterns lie: the `adaspa` folder in ComfyUI's output and input folders, nowhere else."""

import re
import unicodedata
from pathlib import Path

import folder_paths

from ..sparse_attn.patterns.file import SUFFIX
from ..sparse_attn.sentences import UserError

FOLDER = "adaspa"
# with number and ending below what any file system allows: 143 bytes where names are encrypted
LONGEST_NAME = 100
# of devices: Windows opens these whatever their ending, and files are carried there
RESERVED = re.compile(r"CON|PRN|AUX|NUL|(COM|LPT)[0-9¹²³]", re.IGNORECASE)


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
        try:
            paths = sorted(folder.glob(f"*{SUFFIX}"))
        except OSError:
            # a folder that may not be read must not take the whole list of nodes with it
            continue
        found |= {f"{path.name} [{place}]": path for path in paths if _is_pattern(path, folder)}
    return found


def _is_pattern(path: Path, folder: Path) -> bool:
    """Whether a file lies in the folder, and under a name that a message to the browser can hold."""
    try:
        path.name.encode()
        # a link may lead out of the folder
        return path.is_file() and path.resolve().is_relative_to(folder.resolve())
    except (UnicodeError, OSError, RuntimeError):
        return False


def checked_name(name: str) -> str:
    """Return the name of a file to write, without its ending.

    Raises:
        UserError: the name would leave the folder, is none, or is none on some system.
    """
    given = name
    name = unicodedata.normalize("NFC", name).strip().removesuffix(SUFFIX).strip()
    if not re.fullmatch(r"\w[\w .()+-]*", name) or name.endswith("."):
        raise UserError(
            f"`name` must be a file name of letters, digits, spaces and . - + ( ) without a "
            f"folder and without a dot at its end, got {given[:LONGEST_NAME]!r}. Try: city_at_night."
        )
    if len(name.encode()) > LONGEST_NAME:
        raise UserError(
            f"`name` must be a file name of at most {LONGEST_NAME} bytes, got one of "
            f"{len(name.encode())}. Try a shorter one."
        )
    if RESERVED.fullmatch(name.split(".")[0].rstrip()):
        raise UserError(
            f"`name` must be a file name on every system, and Windows keeps {given!r} for a "
            f"device. Try: {name.split('.')[0].rstrip()}_1."
        )
    return name
