import pytest


@pytest.fixture
def bare_comfyui(tmp_path):
    """A folder with what makes a ComfyUI recognisable."""
    root = tmp_path / "ComfyUI"
    (root / "comfy").mkdir(parents=True)
    (root / "comfy" / "sd.py").touch()
    (root / "main.py").touch()
    (root / "custom_nodes").mkdir()
    (root / "comfyui_version.py").write_text('# written by a tool\n__version__ = "0.30.0"\n')
    return root
