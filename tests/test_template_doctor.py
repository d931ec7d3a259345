"""Claims about the template doctor: no false alarm on real templates, and each thing that can be wrong is named."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vocabularies import byte_tokenizer, fitting_tokenizer

from localmoe.endings import endings
from localmoe.errors import TemplateError
from localmoe.loader.locate import bundled, open_source
from localmoe.template import NAMED, Template
from localmoe.template_doctor import Finding, ShownToken, examine, shown
from localmoe.tokenizer import Tokenizer

# Of which templates are made that nobody would write.
PIECES = [
    "{% for m in messages %}",
    "{% endfor %}",
    "{{ m.content }}",
    "{{ m.role }}",
    "{{ messages[-1].content }}",
    "\ud800",
    "<|im_start|>",
    "<|im_end|>",
    "{% if m.role == 'user' %}",
    "{% endif %}",
    "{{ m.nothing.more }}",
    "[INST]",
    " ",
    "\n",
    "{{ raise_exception('x') }}",
    "{% if add_generation_prompt %}",
    "{{ bos_token }}",
    "</think>",
    "{{ 1 / 0 }}",
    "\x00",
    "{{ messages | length }}",
    "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
]
HELLO = [{"role": "user", "content": "Hello"}]
TALK = [*HELLO, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Bye"}]
CHATML = ["<|im_start|>", "<|im_end|>"]
# Real templates that need variables which their models' own programs give them.
UNUSABLE = {"fireworks-ai-llama-3-firefunction-v2.jinja", "ai-sage/GigaChat-20B-A3B-instruct"}


def template(source: str, tokenizer: Tokenizer | None = None) -> Template:
    bos, eos = (
        ("<BOS>", "<EOS>") if tokenizer is None else (name_of(tokenizer, id) for id in (tokenizer.bos, tokenizer.eos))
    )
    return Template(source, name="t", bos=bos, eos=eos)


def name_of(tokenizer: Tokenizer, id: int | None) -> str:
    return "" if id is None else tokenizer.token(id)


def found(tokenizer: Tokenizer, source: str, own: str | None = None, architecture: str = "") -> list[Finding]:
    return examine(tokenizer, template(source, tokenizer), own, architecture)


def texts(findings: list[Finding], severity: str = "") -> str:
    return "\n".join(finding.text for finding in findings if finding.severity.startswith(severity))


# real templates


def real_templates(conformance: Path) -> list[tuple[str, str]]:
    folder = conformance / "templates"
    sources = [(path.name, path.read_text()) for path in sorted(folder.glob("*/*.jinja"))]
    cases = json.loads((folder / "llama.cpp-expected.json").read_text())
    sources += [(case["name"], case["template"]) for case in cases]
    for line in (folder / "ollama-rendered" / "templates.jsonl").read_text().splitlines():
        sources += json.loads(line).items()
    return sources


def test_no_real_template_is_called_wrong_with_a_vocabulary_that_has_its_tokens(conformance: Path) -> None:
    sources = real_templates(conformance)
    assert len(sources) > 90
    alarmed = {}
    for name, source in sources:
        real = template(source)
        try:
            text = real.render(TALK)
        except TemplateError:
            text = ""
        errors = [
            finding.text for finding in examine(fitting_tokenizer(source, text), real) if finding.severity == "error"
        ]
        if errors:
            alarmed[name] = errors
    assert set(alarmed) == UNUSABLE, alarmed
    assert all("is undefined" in text for (text,) in alarmed.values())


def test_real_vocabularies_with_their_own_templates(conformance: Path, tmp_path: Path) -> None:
    folder = conformance / "tokenizers"
    (tmp_path / "tokenizer.json").write_bytes(
        gzip.decompress((folder / "deepseek-r1" / "tokenizer.json.gz").read_bytes())
    )
    (tmp_path / "tokenizer_config.json").write_bytes((folder / "deepseek-r1" / "tokenizer_config.json").read_bytes())
    for place in (folder / "qwen2", tmp_path):
        source = json.loads((place / "tokenizer_config.json").read_text())["chat_template"]
        assert {finding.severity for finding in found(Tokenizer.from_folder(place), source)} == {"note"}
    qwen = Tokenizer.from_folder(folder / "qwen2")
    for name in ("Qwen-Qwen2.5-7B-Instruct", "Qwen-QwQ-32B", "Qwen-Qwen3-0.6B", "Qwen3-Coder"):
        source = (conformance / "templates" / "llama.cpp" / f"{name}.jinja").read_text()
        assert {finding.severity for finding in found(qwen, source)} <= {"note"}, name
    llama = Tokenizer.from_folder(folder / "llama2-spm")
    for name in ("llama2", "mistral-v1", "alpaca", "vicuna"):
        assert {finding.severity for finding in found(llama, NAMED[name])} <= {"note"}, name


def test_the_bundled_model_is_well() -> None:
    metadata = open_source(bundled()).metadata
    source = metadata["tokenizer.chat_template"]
    assert {finding.severity for finding in found(Tokenizer.from_gguf(metadata), source)} <= {"note"}


@pytest.mark.parametrize("name", sorted(NAMED))
def test_a_named_template_is_well_with_a_vocabulary_that_has_its_tokens(name: str) -> None:
    more = "<|user|><|assistant|><|system|><|end|><|im_end|><|return|><|USER_TOKEN|><|SYSTEM_TOKEN|><|CHATBOT_TOKEN|>"
    findings = found(fitting_tokenizer(NAMED[name], more), NAMED[name])
    assert texts(findings, "error") == ""
    known = {"llama4", "glm4", "phi4-mini"}  # whose files name such ends themselves, which a made-up one does not
    assert all("among the ends" in text for text in texts(findings, "warning").splitlines()) or name in known


# what can be wrong


def test_a_template_that_cannot_be_used() -> None:
    tokenizer = byte_tokenizer(CHATML)
    (broken,) = found(tokenizer, "{{ raise_exception('not today') }}")
    assert (broken.severity, "cannot render a single question: template t, line 1: not today" in broken.text) == (
        "error",
        True,
    )
    (silent,) = found(tokenizer, "{{ messages[0].role }}")
    assert (silent.severity, silent.text) == ("error", "leaves out what the user says")
    (mute,) = found(tokenizer, "{% for m in messages if m.role == 'user' %}<|im_start|>{{ m.content }}{% endfor %}")
    assert (mute.severity, mute.text) == ("error", "leaves out what the assistant says")
    (turned,) = found(tokenizer, "{% for m in messages | reverse %}{{ m.content }}{% endfor %}")
    assert turned.severity == "error" and "another order" in turned.text


def test_bos_twice_from_both_and_missing() -> None:
    source = NAMED["llama3"]
    names = ["<BOS>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    both = byte_tokenizer(names, bos="<BOS>", add_bos_token=True)
    assert "'<BOS>' is asked for by the file and written by the template" in texts(found(both, source), "note")
    one = byte_tokenizer(names, bos="<BOS>")
    assert "BOS" not in texts(found(one, source))
    assert "begins with '<BOS>' 2 times" in texts(found(one, "<BOS>" + source), "warning")
    none = source.replace("{{ bos_token }}", "")
    assert "no prompt begins with '<BOS>', though models that talk as llama3" in texts(found(one, none), "warning")
    assert "BOS" not in texts(found(both, none))
    inside = source.replace("assistant", "<BOS>assistant")
    assert "'<BOS>' stands inside a single question" in texts(found(one, inside), "note")


def test_tokens_that_are_text_in_this_vocabulary() -> None:
    findings = found(byte_tokenizer(["<EOS>"], eos="<EOS>"), NAMED["chatml"])
    assert "'<|im_end|>', which ends an answer, is no token of this vocabulary but 10 pieces" in texts(
        findings, "error"
    )
    assert "no tokens of this vocabulary, but text in pieces: '<|im_start|>'" in texts(findings, "warning")
    zephyr = found(byte_tokenizer(["<EOS>"], eos="<EOS>"), NAMED["zephyr"])
    assert texts(zephyr, "error") == "" and "'<|system|>', '<|user|>', '<|assistant|>'" in texts(zephyr, "warning")


def test_an_end_that_the_file_does_not_name() -> None:
    names = ["<|header_start|>", "<|header_end|>", "<|eot|>", "<|end_of_text|>"]
    findings = found(byte_tokenizer(names, eos="<|end_of_text|>"), NAMED["llama4"])
    assert "'<|eot|>' ends an answer, and is not among the ends" in texts(findings, "warning")
    assert "among the ends" not in texts(found(byte_tokenizer(names, eos="<|eot|>"), NAMED["llama4"]))


def test_no_end_at_all_and_an_end_in_words() -> None:
    tokenizer = byte_tokenizer([])
    plain = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "nothing between an answer and the next question" in texts(found(tokenizer, plain), "warning")
    assert "does not begin an answer" in texts(found(tokenizer, plain), "warning")
    assert "without a token, by the text '\\nUSER:'" in texts(found(tokenizer, NAMED["vicuna"]), "note")


def test_a_system_message_that_is_dropped_refused_or_folded() -> None:
    tokenizer = byte_tokenizer([*CHATML, "<start_of_turn>", "<end_of_turn>", "<BOS>"], bos="<BOS>")
    head = "{% for m in messages %}{% if m.role == 'system' %}"
    rest = (
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}<|im_start|>assistant\n"
    )
    assert "drops the system message" in texts(found(tokenizer, head + rest), "warning")
    refusing = head + "{{ raise_exception('no system') }}" + rest
    assert "refuses a system message: template t, line 1: no system" in texts(found(tokenizer, refusing), "warning")
    assert "puts the system message into the first question" in texts(found(tokenizer, NAMED["gemma"]), "note")
    assert "system" not in texts(found(tokenizer, NAMED["chatml"]))
    bare = "{{ bos_token }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    assert "first question" not in texts(found(tokenizer, bare))


def test_roles_that_are_refused_are_told_together() -> None:
    strict = (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('in turn') }}"
    )
    strict += "{% endif %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}<|im_start|>"
    refused = [line for line in texts(found(byte_tokenizer(CHATML), strict), "note").splitlines() if "refuses" in line]
    assert refused == [
        "refuses two questions in a row, an answer before any question, a system message later on, "
        "the result of a tool: template t, line 1: in turn"
    ]


def test_a_prompt_that_ends_with_a_space() -> None:
    spaced = NAMED["chatml"].replace("assistant\n'", "assistant '")
    assert "the prompt ends with a space" in texts(found(byte_tokenizer(CHATML), spaced), "warning")
    assert "space" not in texts(found(byte_tokenizer(CHATML), NAMED["chatml"]))


def test_a_space_that_vocabulary_and_template_both_write(conformance: Path, tmp_path: Path) -> None:
    model = conformance / "tokenizers" / "mistral" / "mistral_instruct_tokenizer_240323.model.v3"
    (tmp_path / "tokenizer.model").write_bytes(model.read_bytes())
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert "the space behind '[INST]' is written twice" in texts(found(tokenizer, NAMED["mistral-v3"]), "note")
    assert "twice" not in texts(found(tokenizer, NAMED["mistral-v3-tekken"]))


def test_history_that_is_rewritten() -> None:
    tokenizer = byte_tokenizer([*CHATML, "<think>", "</think>"])
    assert "read again" not in texts(found(tokenizer, NAMED["chatml"]))
    opened = NAMED["chatml"].replace("assistant\n'", "assistant\n<think>\n'")
    assert "rewrites what was said when the conversation goes on: the last answer is" in texts(
        found(tokenizer, opened), "note"
    )
    counted = "{{ messages | length }}" + NAMED["chatml"]
    assert "the whole conversation is read again before each answer" in texts(found(tokenizer, counted), "warning")
    cut = NAMED["chatml"].replace("message.content ~", "message.content.split('</think>')[-1] ~")
    assert "leaves out the reasoning of earlier answers" in texts(found(tokenizer, cut), "note")


def test_answers_that_begin_with_a_space_may_be_kept() -> None:
    """`ASSISTANT:` is followed by a space that the model says itself, and that the template writes once."""
    assert "read again" not in texts(found(byte_tokenizer(["<EOS>"], eos="<EOS>"), NAMED["vicuna"]))


def test_reasoning_in_pieces() -> None:
    source = (
        NAMED["chatml"].replace("message.content ~", "message.content.split('</think>')[-1] ~ '' ~") + "{# <think> #}"
    )
    assert "'</think>' is 8 pieces of text" in texts(found(byte_tokenizer(CHATML), source), "note")
    assert "pieces" not in texts(found(byte_tokenizer([*CHATML, "<think>", "</think>"]), source))


def test_a_date_and_what_differs_from_the_family_or_the_files_own() -> None:
    tokenizer = byte_tokenizer(CHATML)
    dated = "{{ strftime_now('%d') }}" + NAMED["chatml"]
    assert "writes today's date" in texts(found(tokenizer, dated), "note")
    assert "differs" not in texts(found(tokenizer, dated))
    other = NAMED["chatml"].replace("\n' }}", " ' }}")
    differing = "differs from chatml, for which this vocabulary was made: before an answer it writes"
    assert differing in texts(found(tokenizer, other), "note")
    assert "differs from the model's own template" in texts(found(tokenizer, other, own=NAMED["chatml"]), "note")
    assert "the model's own" not in texts(found(tokenizer, NAMED["chatml"], own=NAMED["chatml"]))
    assert "own template cannot be used" in texts(found(tokenizer, NAMED["chatml"], own="{% if %}"), "note")


def test_an_architecture_tells_where_the_vocabulary_does_not() -> None:
    tokenizer = byte_tokenizer(["<EOS>"], eos="<EOS>")
    assert "differs from gemma" in texts(found(tokenizer, NAMED["alpaca"], architecture="gemma2"))
    assert "differs" not in texts(found(tokenizer, NAMED["alpaca"], architecture="llama"))


def test_the_worst_comes_first() -> None:
    severities = [f.severity for f in found(byte_tokenizer(["<EOS>"], eos="<EOS>"), NAMED["llama3"], NAMED["chatml"])]
    assert severities == sorted(severities, key=("error", "warning", "note").index) and severities[0] == "error"


def test_what_a_template_says_stays_on_its_line() -> None:
    source = NAMED["chatml"].replace("<|im_end|>", "\x1b[2J\n")
    for finding in found(byte_tokenizer(CHATML), source):
        assert finding.text.isprintable()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_no_template_makes_it_raise(source: str) -> None:
    tokenizer = byte_tokenizer(CHATML)
    try:
        made = template(source)
    except TemplateError:
        return
    assert all(isinstance(finding, Finding) for finding in examine(tokenizer, made, source + "x", "gemma2"))
    assert tokenizer.stop <= endings(tokenizer, made).tokens


# the prompt with its tokens


def test_a_prompt_is_shown_with_its_tokens() -> None:
    tokenizer = byte_tokenizer(CHATML)
    tokens = shown(tokenizer, template(NAMED["chatml"]), [{"role": "user", "content": "é"}])
    assert tokens[0] == ShownToken(256, "<|im_start|>", True)
    assert [token.text for token in tokens if not token.special][:7] == [*"user", "\n", "<0xC3>", "<0xA9>"]
    assert [token.id for token in tokens if token.special] == [256, 257, 256]
