import pytest

from sparse_attn.patterns.file import save
from tests.patterns.example_pattern import a_pattern


@pytest.fixture
def file(tmp_path):
    return save(a_pattern(), tmp_path, "city")
