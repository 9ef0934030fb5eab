"""Nodes and help in other languages: as much as English has, with the same numbers and names."""

import importlib
import json
import re
from statistics import median

import pytest

from sparse_attn.sentences import ENGLISH
from tests.tools import comfy_inprocess
from tests.web.test_web import WEB, fetch

LANGUAGES = ("zh", "ja", "ko")
LOCALES = WEB.parent / "locales"
# values of settings and names of models, which no language translates
NAMES = (
    "Balanced|Quality|Fast|Custom|pooled|none|similarity|position|auto|host|int8|fp8|bf16|128x64"
)


@pytest.fixture(scope="module")
def schemas(comfyui):
    pack = comfy_inprocess.load_pack()
    nodes = comfy_inprocess.nodes_of(pack)
    # listed only where Raylight is installed
    raylight = importlib.import_module(f"{pack.__name__}.nodes.raylight").AdaSpaRaylight
    nodes |= {"AdaSpaRaylight": raylight}
    return {name: node.GET_SCHEMA() for name, node in nodes.items()}


@pytest.fixture(params=LANGUAGES)
def language(request):
    return request.param


def translated(language) -> dict:
    return json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))


def english(schema) -> dict:
    """What a translation replaces: the same keys, in the structure that ComfyUI reads."""

    def texts(put):
        tooltip = {"tooltip": put.tooltip} if put.tooltip else {}
        return {"name": getattr(put, "id", None) or put.display_name, **tooltip}

    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {put.id: texts(put) for put in schema.inputs},
        "outputs": {str(i): texts(out) for i, out in enumerate(schema.outputs)},
    }


def leaves(tree: dict, path=()) -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, (*path, key)) if isinstance(value, dict) else {(*path, key): value}
    return found


def numbers(text: str) -> set:
    return set(re.findall(r"\d+(?:\.\d+)?", text.replace(",", "")))


def named(text: str) -> set:
    return {
        name.lower() for name in re.findall(rf"(?<![A-Za-z])(?:{NAMES})(?![A-Za-z])", text, re.I)
    }


def test_every_text_of_every_node_is_translated(schemas, language):
    ours = leaves(translated(language))
    theirs = leaves({name: english(schema) for name, schema in schemas.items()})
    assert ours.keys() == theirs.keys()
    foreign = {
        "zh": r"[\u4e00-\u9fff]",
        "ja": r"[\u3040-\u30ff\u4e00-\u9fff]",
        "ko": r"[\uac00-\ud7a3]",
    }
    for path, text in ours.items():
        if path[-1] in ("tooltip", "description"):
            assert re.search(foreign[language], text), path
            assert numbers(theirs[path]) <= numbers(text), path
            assert named(theirs[path]) == named(text), path


def test_translations_in_one_language_differ(language):
    titles = [node["display_name"] for node in translated(language).values()]
    assert len(set(titles)) == len(titles) and all("AdaSpa" in title for title in titles)
    # a search for the pack's name must go on finding the main node first
    assert translated(language)["AdaSpaAttention"]["display_name"] == "AdaSpa"


def test_server_offers_the_languages(comfy_server, language):
    offered = json.loads(fetch(comfy_server, "/i18n"))
    nodes = offered[language]["nodeDefs"]
    assert nodes.items() >= translated(language).items()


def said_in_bold(text: str) -> set:
    """Names in bold type that are the same in every language: of settings, inputs and presets."""
    return set(re.findall(r"\*\*([a-z_]+|Balanced|Quality|Fast|Paper|Custom)\*\*", text))


@pytest.mark.parametrize("page", sorted(path.stem for path in (WEB / "docs").glob("*.md")))
def test_help_says_the_same_in_every_language(page, language):
    english = (WEB / "docs" / f"{page}.md").read_text(encoding="utf-8")
    text = (WEB / "docs" / page / f"{language}.md").read_text(encoding="utf-8")
    assert text.count("\n## ") == english.count("\n## ")
    assert said_in_bold(english) - said_in_bold(text) == set()
    title = translated(language)[page]["display_name"]
    assert text.startswith(f"# {title}\n")
    shares = [re.findall(r"\d+ %|0\.\d+", x) for x in (english, text)]
    assert set(shares[0]) - set(shares[1]) <= {"0.0002"}


QUOTED = {"en": '"([^"]+)"', "zh": "“([^”]+)”", "ja": "「([^」]+)」", "ko": '"([^"]+)"'}


@pytest.mark.parametrize("page", sorted(path.stem for path in (WEB / "docs").glob("*.md")))
def test_help_quotes_what_a_node_says_in_its_language(page, language):
    """What the reader looks for is what the node has said."""

    def parts(text, tongue):
        found = re.findall(rf"\*\*{QUOTED[tongue]}\*\*", text)
        # what a backend is called is the same in every language
        return [[x.strip(" .") for x in re.split(r"\.\.\.|plain torch", y)] for y in found]

    def says(sentence, quote):
        return all(part.lower() in sentence.lower() for part in quote)

    english = parts((WEB / "docs" / f"{page}.md").read_text("utf-8"), "en")
    ours = sentences_in(language)
    for quote in parts((WEB / "docs" / page / f"{language}.md").read_text("utf-8"), language):
        codes = [code for code, sentence in ENGLISH.items() if says(sentence, quote)]
        assert not codes, f"{quote} is English, and the node says {ours[codes[0]]!r}"
        # errors of ComfyUI's queue and warnings have no translation
        assert quote in english or any(says(text, quote) for text in ours.values()), quote


def sentences_in(language: str) -> dict:
    text = (WEB / "sentences" / f"{language}.js").read_text(encoding="utf-8")
    return dict(re.findall(r'"(\w+)": "((?:[^"\\]|\\.)*)"', text))


KOREAN = [
    LOCALES / "ko" / "nodeDefs.json",
    WEB / "sentences" / "ko.js",
    *sorted((WEB / "docs").glob("*/ko.md")),
]
# words that end in a consonant, and in a vowel, and the particles that only follow the other;
# behind an l stands the particle of direction that follows a vowel
WRONG = (
    r"(?:스텝|모델|토큰|블록|패턴|프레임|설정|프리셋)(?:는|가|를|와)"
    r"|(?:스텝|토큰|블록|패턴|프레임|설정|프리셋)로|모델으로"
    r"|(?:비디오|노드|샘플러|전문가|헤드|레이어|메모리|워크플로)(?:은|이|을|과|으로)"
) + r"(?![가-힣])"


@pytest.mark.parametrize("file", KOREAN, ids=lambda path: path.parent.name)
def test_korean_particles_fit_their_words(file):
    assert not re.findall(WRONG, file.read_text(encoding="utf-8"))


def test_a_pattern_has_one_name_in_chinese():
    texts = [(WEB / "sentences" / "zh.js").read_text(encoding="utf-8")]
    texts += [path.read_text(encoding="utf-8") for path in (WEB / "docs").glob("*/zh.md")]
    assert not any("模式" in text for text in texts)


def test_help_of_several_gpus_reckons_with_what_was_measured():
    file = WEB.parent / "tests" / "bench" / "results" / "ulysses_h200.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]

    def ms(gpus, kind, dense, model="hunyuan"):
        # a dense step is the same in every setting
        return median(
            row["ms"] for row in rows
            if (row["model"], row["gpus"], row["kind"]) == (model, gpus, kind)
            and (dense or (row["precision"], row["density"]) == ("bf16", 0.2))
        )  # fmt: skip

    figures = [
        f"{ms(gpus, kind, kind == 'step dense', model):.0f}"
        for model in ("hunyuan", "wan")
        for kind in ("step dense", "step search", "step sparse")
        for gpus in (1, 2)
    ]
    for kind, attention in (("step dense", "dense"), ("step sparse", "sparse")):
        one, two = (ms(gpus, kind, kind == "step dense") for gpus in (1, 2))
        square = ms(1, attention, kind == "step dense")
        for length in (0.5, 2):
            alone = (one - square) * length + square * length**2
            shared = alone / 2 + (two - one / 2) * length
            figures.append(f"{alone / shared:.2f}")
    pages = [WEB / "docs" / "AdaSpaRaylight.md", *(WEB / "docs" / "AdaSpaRaylight").glob("*.md")]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert len(pages) == 4 and all(figure in text for figure in figures), (page, figures)
