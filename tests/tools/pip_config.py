"""pip's whole configuration in the words of uv, which reads none of it by itself.

`pip config list` is pip's public account of its files (system, user, its Python) and variables.
"""

from __future__ import annotations

import ast
import os
from collections.abc import Mapping

# later ones win, as they do in pip
SECTIONS = ("global", "install", ":env:")
OPTIONS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "constraint": "--constraints",
    "trusted-host": "--allow-insecure-host",
}
VARIABLES = {
    "cert": ("SSL_CERT_FILE",),
    "client-cert": ("SSL_CLIENT_CERT",),
    "timeout": ("UV_HTTP_TIMEOUT",),
    "proxy": ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"),
}

Config = dict[str, list[str]]


def parse(listed: str, env: Mapping[str, str] = os.environ) -> Config:
    """Read what `pip config list` prints: option to its words.

    Args:
        env: pip's HTTP library takes a certificate from two more variables.
    """
    bundle = env.get("REQUESTS_CA_BUNDLE") or env.get("CURL_CA_BUNDLE")
    found: Config = {"cert": [bundle]} if bundle else {}
    for section in SECTIONS:
        for line in listed.splitlines():
            key, equals, value = line.partition("=")
            if equals and key.startswith(f"{section}."):
                name = key[len(section) + 1 :].removeprefix("default-")
                found[name] = str(ast.literal_eval(value)).split()
    return found


def says_yes(config: Config, name: str) -> bool:
    return config.get(name, ["no"])[0].lower() in ("1", "true", "t", "yes", "y", "on")


def for_uv(config: Config) -> list[str]:
    """Arguments of `uv pip install`; of all indexes the best version counts, as in pip."""
    args = ["--no-config", "--index-strategy", "unsafe-best-match"]
    args += ["--no-index"] if says_yes(config, "no-index") else []
    for name, option in OPTIONS.items():
        args += [word for value in config.get(name, ()) for word in (option, value)]
    if config.get("keyring-provider", ["auto"])[0] in ("import", "subprocess"):
        args += ["--keyring-provider", "subprocess"]
    return args


def uv_environment(config: Config, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables for uv: pip's certificate and proxy, and of its own only where its cache lies."""
    ours = {k: v for k, v in env.items() if not k.startswith("UV_") or k == "UV_CACHE_DIR"}
    # without a certificate file, newer pips trust what the system trusts
    ours["UV_SYSTEM_CERTS"] = "0" if "cert" in config else "1"
    for name, variables in VARIABLES.items():
        ours |= {variable: config[name][0] for variable in variables if config.get(name)}
    return ours
