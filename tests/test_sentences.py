"""The table of sentences: complete in every language, with the same values in each."""

import ast
import json
import re
from pathlib import Path

import pytest

from sparse_attn.sentences import ENGLISH, PLAIN, Sentence, recognised, told

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


def written() -> tuple[set[str], set[str]]:
    """Strings of the pack's code, {} for what fills them, and those that modules name as a reason."""
    texts, reasons = set(), set()
    for file in sorted(ROOT.glob("sparse_attn/**/*.py")):
        if file.name == "sentences.py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.add(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "{}" for x in node.values]
                texts.add(re.sub(r"(\{\})+", "{}", "".join(parts)))
        for node in tree.body if file.parent.name in ("run", "host", "families") else ():
            text = getattr(node, "value", None) if isinstance(node, ast.Assign) else None
            if isinstance(text, ast.Constant) and re.search("[a-z] [a-z]", str(text.value)):
                reasons.add(text.value)
    return texts, reasons


def test_plain_texts_are_those_of_the_code():
    texts, reasons = written()
    for code, words in PLAIN.items():
        assert re.sub(r"(\{\w+\})+", "{}", words) in texts, code
    assert len(reasons) > 20
    assert [text for text in reasons if recognised(text) is None] == []


@pytest.mark.parametrize(
    "text, code, inner",
    [
        ("Kept dense: 8 calls, not seen, unknown why", "line_kept", "why_not_seen"),
        ("Note: an error in AdaSpa, ValueError('{x}')", "line_note", "why_error"),
    ],
)
def test_a_plain_text_is_told_with_the_reason_inside_of_it(text, code, inner):
    found = told(text)
    assert found["text"] == text and found["code"] == code
    assert inner in [value.get("code") for value in found["values"].values()]
    said = told(Sentence("all_dense", why="unknown why"))
    assert said["values"]["why"]["code"] == "why_unknown"


def test_other_texts_are_told_as_they_are():
    assert told("somebody else's words") == {"text": "somebody else's words"}
