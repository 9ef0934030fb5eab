"""Fetches one file from the package index as it is, through pip's configuration.

pip and uv have no command for that: of a source archive, both run the build to learn its metadata.
An index's page of a project is a public format (PEP 503): links whose texts are file names.
"""

from __future__ import annotations

import base64
import hashlib
import html
import os
import re
import shutil
import ssl
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

from .pip_config import Config, says_yes


def sha256_of(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def default_index(pip_help: str) -> list[str]:
    """The index that pip uses where none is configured, out of `pip download --help`."""
    return re.findall(r"(?s)--index-url <url>.*?\(default\s+(\S+?)\)", pip_help)[:1]


def fetch(config: Config, pip_help: str, project: str, file: Path) -> None:
    """Download the file of a project that is called as `file` is, from the first place that has it.

    Raises:
        OSError: none has it, or none can be reached: what the first one answered.
    """
    for folder in map(Path, config.get("find-links", ())):
        if (folder / file.name).is_file():
            shutil.copyfile(folder / file.name, file)
            return
    indexes = config.get("index-url") or default_index(pip_help)
    indexes = [] if says_yes(config, "no-index") else indexes + config.get("extra-index-url", [])
    errors = []
    for index in indexes:
        # an index in a folder has a file where a server has a page
        page = f"{index.rstrip('/')}/{project}/{'index.html' * index.startswith('file:')}"
        try:
            with _open(config, page, index) as answer:
                text, base = answer.read().decode("utf-8", "replace"), answer.url
            links = map(html.unescape, re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)""", text))
            named = [x for x in links if unquote(urlsplit(x).path).split("/")[-1] == file.name]
            if not named:
                continue
            partial = file.with_name(f"{file.name}.partial")
            with (
                _open(config, urljoin(base, named[0]), index) as answer,
                open(partial, "wb") as out,
            ):
                shutil.copyfileobj(answer, out)
            os.replace(partial, file)
            return
        except OSError as error:
            errors.append(error)
    raise errors[0] if errors else FileNotFoundError(f"no package index of pip's has {file.name}")


def _open(config: Config, url: str, index: str):
    """Open a URL; the name and password in an index's URL go to that host alone."""
    parts, login = urlsplit(url), urlsplit(index)
    bare = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    request = urllib.request.Request(bare.geturl())
    if login.username and login.hostname == parts.hostname:
        words = f"{unquote(login.username)}:{unquote(login.password or '')}".encode()
        basic = f"Basic {base64.b64encode(words).decode()}"
        request.add_unredirected_header("Authorization", basic)
    context = ssl.create_default_context(cafile=config.get("cert", [None])[0])
    handlers: list = [urllib.request.HTTPSHandler(context=context)]
    for proxy in config.get("proxy", ()):
        handlers.append(urllib.request.ProxyHandler({"http": proxy, "https": proxy}))
    return urllib.request.build_opener(*handlers).open(request, timeout=60)
