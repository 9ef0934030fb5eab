import pytest

from tests.host.identity.truth import Truth


@pytest.fixture
def truth(monkeypatch):
    return Truth(monkeypatch)
