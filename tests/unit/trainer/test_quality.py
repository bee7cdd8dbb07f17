"""Quality checks on single rows: what each finds, what it leaves alone, and that none is made unless asked for."""

from __future__ import annotations

import collections
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_contract.run_config import QualityConfig
from finetune_trainer.data import quality
from finetune_trainer.data.formats import Conversation, Turn
from finetune_trainer.data.language import LANGUAGES, detect_language
from finetune_trainer.data.pii import find_pii
from finetune_trainer.errors import TrainerError

PROSE = (
    "The ferry leaves at nine and reaches the island before noon. Most visitors walk along the cliffs, eat in the"
    " harbour and take the last boat home. In winter there is one sailing a day, and it is called off when the wind"
    " comes from the north. "
)
EVERYTHING = QualityConfig(
    truncated="flag",
    repetition="flag",
    html="flag",
    special_tokens="flag",
    language="flag",
    languages=("en",),
    pii="flag",
)


def ask(answer: str, question: str = "How is it?") -> Conversation:
    return Conversation((Turn("user", question, "instruction"), Turn("assistant", answer, "output")))


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("open-code-block", "Use this:\n```python\nprint(1)\n"),
        ("open-code-block", "```\na\n```\nand\n```js\nlet b"),
        ("open-sentence", PROSE + "The hotel on the hill is open all year, and its"),
        ("open-sentence", PROSE + "The hotel on the hill is open all year,"),
        ("open-sentence", "这座岛很小。" * 40 + "岛上有一家旅馆全年开放而且每天早上都有"),
    ],
)
def test_a_truncated_answer_is_found(rule, text):
    found = quality.find_truncation(text)
    assert found is not None
    assert found[0] == rule
    assert text[slice(*found[1])] in text


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROSE + "\n\nThe hotel on the hill",
        "Oslo",
        "a town in the north of the country by the sea",
        PROSE + "\n1. All quiet on the western front of the old war",
        PROSE + "\n- walk along the cliffs and the harbour in one day",
        PROSE + "\n| the | last | row | of | a | table | here |",
        PROSE + "\n\n# Where to stay on the island when it rains",
        PROSE + "\n\nKind regards,",
        PROSE + "\n\n```\nprint(1)\n```",
        PROSE + "The area is 3 * 4 = 12 and the volume of it is 24",
        PROSE + "See https://island.org/ferries",
        "",
        "   ",
    ],
)
def test_a_finished_answer_is_not_truncated(text):
    assert quality.find_truncation(text) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("same-character", "Yes" + "s" * 60),
        ("same-line", "Start.\n" + "The answer is not known yet.\n\n" * 6),
        ("same-words", "I like the sea and the ships. " * 20),
        ("same-words", "Intro that is fine. " + "so it goes on and on " * 30),
        ("same-words", "我喜欢大海。" * 40),
    ],
)
def test_a_text_that_repeats_itself_is_found(rule, text):
    found = quality.find_repetition(text)
    assert found is not None
    assert found[0] == rule


@pytest.mark.parametrize(
    "text",
    [
        PROSE * 2,
        "-" * 200,
        "=" * 80 + "\n" + PROSE,
        "1" + "0" * 39,
        "Row, row, row your boat gently down the stream. " * 4,
        "```\n" + "print('the same line')\n" * 40 + "```",
        "| a | b |\n" + "| the same row | the same row |\n" * 9,
        "ha ha ha ha ha ha ha ha ha",
        "",
    ],
)
def test_ordinary_texts_do_not_repeat_themselves(text):
    assert quality.find_repetition(text) is None


@pytest.mark.parametrize(
    ("rule", "text", "hit"),
    [
        ("html-tag", "First.<br>Second.", "<br>"),
        ("html-tag", 'Look <a href="/x">here</a>.', '<a href="/x">'),
        ("html-tag", "<DIV class=answer>Yes</DIV>", "<DIV class=answer>"),
        ("html-entity", "Tom &amp; Ana", "&amp;"),
        ("html-entity", "It&#39;s late", "&#39;"),
    ],
)
def test_remains_of_html_are_found(rule, text, hit):
    assert quality.find_html(text) == (rule, (text.index(hit), text.index(hit) + len(hit)))


@pytest.mark.parametrize(
    "text",
    [
        "Use `<br>` for a line break.",
        "```html\n<div>x</div>\n```",
        "| a<br>b | c |",
        "if a < b and c > d then e",
        "std::vector<int> numbers; &numbers",
        "AT&T and R&D",
        "List<String> names",
        "x <- 3",
    ],
)
def test_code_and_comparisons_are_not_html(text):
    assert quality.find_html(text) is None


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ("chatml-token", "Fine.<|im_end|>"),
        ("chatml-token", "<|endoftext|>"),
        ("chatml-token", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
        ("llama-token", "[INST] Hello [/INST]"),
        ("llama-token", "<<SYS>> be kind"),
        ("gemma-token", "Yes<end_of_turn>"),
        ("sentence-token", "Yes.</s>"),
        ("sentence-token", "<s> Yes."),
        ("sentence-token", "an <unk> word"),
        ("template-label", "Yes.\n### Response:\nNo."),
    ],
)
def test_a_leaked_special_token_is_found(rule, text):
    found = quality.find_special_token(text)
    assert found is not None
    assert found[0] == rule


@pytest.mark.parametrize(
    "text",
    [
        "<s>struck through</s> and more",
        "a <b and c> d",
        "|> is a pipe, <| is another",
        "### Responses of the readers: a summary",
        "[INSTALL] done",
        "1 << 3",
        "arr[INDEX]",
    ],
)
def test_what_resembles_a_special_token_is_left_alone(text):
    assert quality.find_special_token(text) is None


@pytest.mark.parametrize(
    ("kind", "text", "hit"),
    [
        ("email", "write to ada.king+lab@uni-koeln.de today", "ada.king+lab@uni-koeln.de"),
        ("email", "a@b then c_d@mail.ru.", "c_d@mail.ru"),
        ("email", "me: x.y@gmail.com", "x.y@gmail.com"),
        ("phone", "call +49 30 901820-10 now", "+49 30 901820-10"),
        ("phone", "call (212) 736-5000.", "(212) 736-5000"),
        ("phone", "fax 212-736-5000", "212-736-5000"),
        ("iban", "to DE89 3704 0044 0532 0130 00, thanks", "DE89 3704 0044 0532 0130 00"),
        ("iban", "GB82WEST12345698765432", "GB82WEST12345698765432"),
        ("credit-card", "card 4539 1488 0343 6467 exp", "4539 1488 0343 6467"),
        ("credit-card", "378282246310005", "378282246310005"),
        ("ip-address", "from 91.198.174.192 at noon", "91.198.174.192"),
        ("ip-address", "from 2a00:1450:4001:82a::200e", "2a00:1450:4001:82a::200e"),
    ],
)
def test_personal_data_is_found(kind, text, hit):
    start = text.index(hit)
    assert list(find_pii(text, [kind])) == [(kind, (start, start + len(hit)))]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("email", "jane@example.com, bob@test, x@yourdomain.com"),
        ("email", "@property and user@host"),
        ("email", "a@" * 50),
        ("phone", "+1 and 12-34-56, 1+2 3 4, pi is 3.14159265358979"),
        ("phone", "in films it is 212-555-0123"),
        ("phone", "2024-01-02 10:00:00"),
        ("iban", "DE89 3704 0044 0532 0130 01"),
        ("iban", "AB12 CDEF 3456 7890"),
        ("credit-card", "4539 1488 0343 6468"),
        ("credit-card", "order 1234567890123456"),
        ("credit-card", "9999999999999999"),
        ("ip-address", "192.168.0.1, 127.0.0.1, 203.0.113.7, 8.8.8.8, ::1, 2001:db8::1"),
        ("ip-address", "version 91.1.2.3 and v91.1.2.3"),
        ("ip-address", "12:34:56, 300.1.1.1, std::dead, section 1.2.3.4.5"),
    ],
)
def test_examples_and_other_numbers_are_not_personal(kind, text):
    assert list(find_pii(text, [kind])) == []


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", PROSE),
        ("de", "Die Fähre legt um neun ab und ist vor Mittag auf der Insel. Im Winter fährt sie nur einmal am Tag."),
        ("fr", "Le bateau part à neuf heures et arrive sur l'île avant midi. En hiver, il n'y en a qu'un par jour."),
        ("es", "El barco sale a las nueve y llega a la isla antes del mediodía. En invierno hay uno al día."),
        ("pt", "O barco sai às nove e chega à ilha antes do meio-dia. No inverno há uma viagem por dia e não mais."),
        ("it", "Il traghetto parte alle nove e arriva sull'isola prima di mezzogiorno. Non ci sono altre corse."),
        ("nl", "De boot vertrekt om negen uur en is voor de middag op het eiland. In de winter gaat er een per dag."),
        ("ru", "Паром отходит в девять и приходит на остров до полудня."),
        ("zh", "渡轮九点出发。中午以前到达小岛。"),
        ("ja", "フェリーは九時に出て、昼前に島に着きます。"),
        ("ko", "배는 아홉 시에 떠나 정오 전에 섬에 도착합니다."),
        ("ar", "تغادر العبارة في التاسعة وتصل إلى الجزيرة قبل الظهر."),
    ],
)
def test_the_language_of_prose_is_told(language, text):
    assert detect_language(text) == language


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Oslo",
        "42",
        "```\n" + PROSE + "\n```",
        "SELECT a, b FROM c WHERE d = 1",
        "Ana, Li, Tom, Kim, Max, Zoe",
        "The boat is on the sea and it is not at the quay. Паром отходит в девять",
        "para que no se o de a; para que no se o de a; que de o a",
    ],
)
def test_what_is_no_prose_has_no_language(text):
    assert detect_language(text) == ""


def test_short_answers_have_their_language_or_none():
    folder = pathlib.Path(__file__).parents[2] / "data" / "filter"
    told = collections.Counter(
        (path.stem, detect_language(json.loads(line)["output"]))
        for path in folder.glob("*.jsonl")
        for line in path.read_text(encoding="utf-8").splitlines()
    )
    assert {language for wanted, language in told if language != wanted} == {""}
    assert sum(count for (_, language), count in told.items() if language) > 0.75 * told.total()


def test_an_answer_in_another_language_than_expected_is_found():
    checks = quality.make_checks(QualityConfig(language="remove-row", languages=("en", "de")))
    (found,) = checks.check(ask("Паром отходит в девять и приходит на остров до полудня."))
    assert (found.rule, found.category, found.language, found.action) == (
        *("wrong-language", "language", "ru"),
        "remove-row",
    )
    assert not checks.check(ask(PROSE))


def test_html_that_was_asked_for_is_left_alone():
    checks = quality.make_checks(QualityConfig(html="flag"))
    answer = "<div>Hello</div>"
    assert checks.check(ask(answer))
    assert not checks.check(ask(answer, "Write the HTML of a greeting."))


def test_tokens_and_personal_data_are_looked_for_in_every_text():
    checks = quality.make_checks(QualityConfig(special_tokens="remove-row", pii="flag", pii_kinds=("email",)))
    user = Turn("user", "Fix this <|im_end|>", "instruction", "mail ada@uni-koeln.de", "input")
    found = checks.check(Conversation((user, Turn("assistant", "Done.", "output"))))
    assert [(one.rule, one.field, one.action) for one in found] == [
        ("chatml-token", "instruction", "remove-row"),
        ("pii-email", "input", "flag"),
    ]


def test_no_check_is_made_unless_it_is_asked_for():
    answer = "<br>" + "s" * 60 + "<|im_end|> ada@uni-koeln.de\n```"
    assert quality.make_checks(QualityConfig()).check(ask(answer)) == ()


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (QualityConfig(html="remove-sentence"), "quality.html"),
        (QualityConfig(language="flag"), "quality.language.expected"),
        (QualityConfig(language="flag", languages=("xx",)), "quality.language.expected"),
        (QualityConfig(pii="flag", pii_kinds=("shoe-size",)), "quality.pii.kinds"),
    ],
)
def test_settings_that_mean_nothing_are_refused(config, field):
    with pytest.raises(TrainerError, match=field):
        quality.make_checks(config)


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=200) | st.text("`~<>|[/s] \n@.+-0123:;,a", max_size=200))
def test_any_text_can_be_checked_and_spans_lie_in_it(text):
    for finding in quality.make_checks(EVERYTHING).check(ask(text)):
        start, end = finding.span
        assert 0 <= start <= end <= len(text)
        assert finding.language in ("", *LANGUAGES)
