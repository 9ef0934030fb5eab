"""Questions to the package index that pip has no command for; runs under the Python whose pip asks.

    python pip_index.py fetch PROJECT VERSION FOLDER    download a source distribution, unbuilt
    python pip_index.py look_up REQUIREMENT...          what would be installed, and its needs
    python pip_index.py download_size REQUIREMENT       with the large packages it needs

`pip download` would run a source package's build, and `pip install --dry-run` downloads gigabytes
only to name them. This uses pip's own finder and session, so that index, proxy and certificate
settings apply. They are not a public interface: callers must do without an answer.
"""

from __future__ import annotations

import json
import sys
import zipfile
from email.parser import HeaderParser
from pathlib import Path
from urllib.parse import unquote

from pip._internal.commands import create_command
from pip._internal.network.lazy_wheel import HTTPRangeRequestUnsupported, dist_from_wheel_url
from pip._vendor.packaging.requirements import Requirement

ANSWER = "ANSWER"
# torch's other needs are small
LARGE = ("nvidia-", "cuda-", "triton")


class Index:
    """The package index as this pip is configured to see it."""

    def __init__(self, command, *, any_python: bool = False):
        options, _ = command.parse_args(["--no-deps", "anything"])
        self.session = command.get_default_session(options)
        self.finder = command._build_package_finder(
            options=options, session=self.session, ignore_requires_python=any_python
        )

    def best(self, requirement: Requirement):
        """The file pip would install, or None."""
        return self.finder.find_best_candidate(
            requirement.name, requirement.specifier
        ).best_candidate

    def versions(self, project: str) -> list[str]:
        found = {c.version for c in self.finder.find_all_candidates(project)}
        return [str(v) for v in sorted(found, reverse=True)]

    def num_bytes(self, link) -> int | None:
        if link.is_file:
            return Path(link.file_path).stat().st_size
        response = self.session.head(link.url_without_fragment, allow_redirects=True)
        length = response.headers.get("Content-Length")
        return int(length) if response.ok and length else None

    def requires(self, name: str, link) -> list[str] | None:
        """The needs a wheel declares; None if only a download would tell."""
        if link.is_file:
            with zipfile.ZipFile(link.file_path) as wheel:
                file = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
                text = wheel.read(file).decode()
            return HeaderParser().parsestr(text).get_all("Requires-Dist", [])
        metadata = link.metadata_link()
        if metadata is not None:
            response = self.session.get(metadata.url_without_fragment)
            response.raise_for_status()
            return HeaderParser().parsestr(response.text).get_all("Requires-Dist", [])
        try:
            # reads only the end of the wheel
            dist = dist_from_wheel_url(name, link.url_without_fragment, self.session)
        except HTTPRangeRequestUnsupported:
            return None
        return dist.metadata.get_all("Requires-Dist", [])

    def download(self, requirement: Requirement, seen: set[str]) -> int | None:
        """Bytes of a file and of the large ones it needs; None if one is unknown."""
        candidate = self.best(requirement)
        if candidate is None:
            return None
        total = self.num_bytes(candidate.link)
        # the libraries need only each other
        leaf = requirement.name.startswith(("nvidia-", "triton"))
        for text in () if leaf else self.requires(requirement.name, candidate.link) or ():
            need = Requirement(text)
            if not need.name.startswith(LARGE) or total is None:
                continue
            extras = requirement.extras or {""}
            if need.marker and not any(need.marker.evaluate({"extra": e}) for e in extras):
                continue
            # the same project may be asked for with other extras
            key = f"{need.name}{sorted(need.extras)}"
            if key not in seen:
                seen.add(key)
                more = self.download(need, seen)
                total = None if more is None else total + more
        return total


def answer(value) -> None:
    # pip prints warnings beside it
    sys.stdout.write(ANSWER + json.dumps(value) + "\n")


def look_up(texts: list[str]) -> None:
    command = create_command("download")
    with command.main_context():
        index = Index(command)
        items = []
        for text in texts:
            requirement = Requirement(text)
            candidate = index.best(requirement)
            if candidate is None:
                items.append(None)
                continue
            items.append(
                {
                    "name": requirement.name,
                    "version": str(candidate.version),
                    "requires": index.requires(requirement.name, candidate.link),
                }
            )
        versions = index.versions(Requirement(texts[0]).name)
    answer({"items": items, "versions": versions})


def download_size(text: str) -> None:
    command = create_command("download")
    with command.main_context():
        answer(Index(command).download(Requirement(text), set()))


def fetch(project: str, version: str, folder: str) -> None:
    command = create_command("download")
    with command.main_context():
        index = Index(command, any_python=True)
        for candidate in index.finder.find_all_candidates(project):
            link = candidate.link
            if str(candidate.version) == version and not link.is_wheel:
                response = index.session.get(link.url_without_fragment, stream=True)
                response.raise_for_status()
                with open(Path(folder, unquote(link.filename)), "wb") as file:
                    for chunk in response.iter_content(1 << 16):
                        file.write(chunk)
                return
    raise SystemExit(f"No matching distribution found for {project}=={version}")


if __name__ == "__main__":
    if sys.argv[1] == "fetch":
        fetch(*sys.argv[2:])
    elif sys.argv[1] == "look_up":
        look_up(sys.argv[2:])
    else:
        download_size(sys.argv[2])
