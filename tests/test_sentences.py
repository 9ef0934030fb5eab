"""The table of sentences: complete in every language, with the same values in each."""

import ast
import json
import re
from pathlib import Path

import pytest

from sparse_attn.sentences import ENGLISH, Sentence, told

ROOT = Path(__file__).resolve().parents[1]
TABLE = {
    file.stem: json.loads(
        file.read_text(encoding="utf-8").partition("export default")[2].strip().removesuffix(";")
    )
    for file in (ROOT / "web" / "sentences").glob("*.js")
}
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


def test_what_a_module_names_as_a_reason_is_a_sentence():
    """Words of a module's own would reach no other language."""
    names = []
    for folder in ("run", "host", "host/families"):
        for file in (ROOT / "sparse_attn" / folder).glob("*.py"):
            for node in ast.parse(file.read_text(encoding="utf-8")).body:
                text = getattr(node, "value", None) if isinstance(node, ast.Assign) else None
                if isinstance(text, ast.Constant) and re.search("[a-z] [a-z]", str(text.value)):
                    names.append(f"{file.name}: {text.value}")
    assert not names


def test_every_sentence_is_said_somewhere():
    files = [*ROOT.glob("sparse_attn/**/*.py"), *ROOT.glob("nodes/*.py")]
    trees = [ast.parse(x.read_text(encoding="utf-8")) for x in files if x.name != "sentences.py"]
    words = {
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    # what is behind the last _ may be known only when it is said
    assert [x for x in ENGLISH if not {x, x.rpartition("_")[0]} & words] == []


def test_a_reason_is_told_inside_of_its_line():
    why = Sentence("why_error", error="ValueError('{x}')")
    found = told(Sentence("line_note", text=why))
    assert found["text"] == "Note: an error in AdaSpa, ValueError('{x}')"
    assert found["values"]["text"]["code"] == "why_error"


def test_other_texts_are_told_as_they_are():
    assert told("somebody else's words") == {"text": "somebody else's words"}
