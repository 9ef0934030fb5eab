"""AdaSpa: adaptive block-sparse attention for ComfyUI's video models."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    # imported here so that pytest, which imports this file, needs no ComfyUI
    from .nodes import AdaSpaExtension

    return AdaSpaExtension()
