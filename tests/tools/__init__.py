"""Set-up and commands behind `run.py`, and helpers that run a real ComfyUI for tests and the demo."""
