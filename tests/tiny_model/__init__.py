"""Test-only ComfyUI nodes that turn words into conditioning and tiny latents into frames."""


async def comfy_entrypoint():
    from .nodes import TinyModelExtension

    return TinyModelExtension()
