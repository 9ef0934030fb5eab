"""The nodes: each builds a config or reads a run, and nothing else."""

from comfy_api.latest import ComfyExtension

from .attention import AdaSpaAttention
from .report import AdaSpaReport


class AdaSpaExtension(ComfyExtension):
    async def get_node_list(self):
        return [AdaSpaAttention, AdaSpaReport]
