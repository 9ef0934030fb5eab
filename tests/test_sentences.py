"""The table of sentences: complete in every language, with the same values in each."""

import json
import re
from pathlib import Path

import pytest

from sparse_attn.sentences import ENGLISH

FILE = Path(__file__).resolve().parents[1] / "web" / "sentences.js"
TABLE = json.loads(
    FILE.read_text(encoding="utf-8").partition("SENTENCES =")[2].strip().removesuffix(";")
)
SAID = {**TABLE["en"], **ENGLISH}


@pytest.mark.parametrize("language", ["zh", "ja", "ko"])
def test_every_sentence_is_there_with_its_values(language):
    words = TABLE[language]
    assert words.keys() == SAID.keys()
    for code, text in words.items():
        values = [sorted(re.findall(r"\{(\w+)\}", x)) for x in (text, SAID[code])]
        assert values[0] == values[1], code
        assert text == text.strip() and text != SAID[code], code


def test_no_sentence_of_the_server_is_written_twice():
    assert set(TABLE) == {"en", "zh", "ja", "ko"}
    assert not TABLE["en"].keys() & ENGLISH.keys()
