"""The nodes: each builds a config or reads a run, and nothing else."""

from comfy_api.latest import ComfyExtension

from .attention import AdaSpaAttention
from .attention_pair import AdaSpaAttentionPair
from .compare import AdaSpaCompare
from .forecast import AdaSpaForecast
from .load_pattern import AdaSpaLoadPattern
from .raylight import AdaSpaRaylight, is_installed
from .report import AdaSpaReport
from .save_pattern import AdaSpaSavePattern


class AdaSpaExtension(ComfyExtension):
    async def get_node_list(self):
        several_gpus = [AdaSpaRaylight] if is_installed() else []
        return [
            AdaSpaAttention,
            AdaSpaAttentionPair,
            AdaSpaReport,
            AdaSpaCompare,
            AdaSpaSavePattern,
            AdaSpaLoadPattern,
            AdaSpaForecast,
            *several_gpus,
        ]
