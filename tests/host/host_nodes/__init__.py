"""Nodes that only tests use: conditioning without a text encoder, and another pack's attention."""


async def comfy_entrypoint():
    from .nodes import HostTestExtension

    return HostTestExtension()
