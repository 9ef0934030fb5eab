"""Socket types of this pack."""

from comfy_api.latest import io

# carries a `RunHandle`
AdaSpaRun = io.Custom("ADASPA")
