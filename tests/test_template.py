"""Claims about chat templates: the text of jinja2 itself, errors with a line, bounds that hostile templates meet."""

from __future__ import annotations

import json
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from localmoe.errors import TemplateError
from localmoe.template import NAMED, Template, choices, named_source, reasoning_markers

NOW = datetime(2026, 1, 2, 3, 4, 5)
HELLO = [{"role": "user", "content": "Hello"}]
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [*HELLO, {"role": "assistant", "content": "Hi there"}, {"role": "user", "content": "Who are you?"}]


def render(source: str, **variables: Any) -> str:
    return Template(source, name="test", bos="<s>", eos="</s>").render(variables.pop("messages", HELLO), **variables)


# golden data


def test_every_golden_rendering_is_equal_and_raises_where_jinja2_raises(conformance: Path) -> None:
    golden = json.loads((conformance / "templates" / "golden_jinja2.json").read_text())
    wrong, rendered, raised = [], 0, 0
    for path, results in golden["results"].items():
        template = Template((conformance / path).read_text(), name=path, bos="<BOS>", eos="<EOS>")
        for case, expected in results.items():
            if case == "parse_error":  # recorded without the generation tag, which we have: the next test
                continue
            try:
                output = template.render(strftime_now=NOW.strftime, **golden["cases"][case])
                rendered += 1
            except TemplateError:
                output = None
                raised += 1
            if output != expected.get("output"):
                wrong.append((path, case))
    assert wrong == []
    assert (rendered, raised) == (380, 16)


def test_the_real_template_with_generation_blocks_renders(conformance: Path) -> None:
    source = (conformance / "templates" / "llama.cpp" / "LFM2.5-8B-A1B.jinja").read_text()
    assert "{%- generation" in source
    text = Template(source, name="lfm", bos="<s>").render(TALK)
    assert text.startswith("<s><|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\nHi there<|im_end|>")


def test_every_jinja2_case_of_llama_cpp_is_equal(conformance: Path) -> None:
    cases = json.loads((conformance / "templates" / "llama.cpp-expected.json").read_text())
    equal = [case for case in cases if case["jinja2_equal"]]
    assert len(equal) == 15
    for case in equal:
        template = Template(case["template"], name=case["name"], bos=case["bos_token"], eos=case["eos_token"])
        output = template.render(case["messages"], add_generation_prompt=case["add_generation_prompt"])
        assert output == case["expected"], case["name"]


# Name of ours; the real template (a file, or a name in llama.cpp's or ollama's list); whether it takes a system turn.
REAL = [
    ("chatml", "teknium/OpenHermes-2.5-Mistral-7B", True),
    ("deepseek", "tokenizers/deepseek-r1/tokenizer_config.json", True),
    ("gemma", "templates/llama.cpp/google-gemma-2-2b-it.jinja", False),
    ("llama2", "llama2-chat", True),
    ("llama3", "Llama-3", True),
    ("deepseek-r1", "templates/llama.cpp/deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja", True),
    ("deepseek-v2", "DeepSeek-V2", True),
    ("glm4", "ChatGLM4", True),
    ("granite", "ibm-granite/granite-3.0-8b-instruct", True),
    ("mistral-v3", "templates/mistral-common/v3_spm.jinja", False),
    (
        "mistral-v3-tekken",
        "Mistral-Nemo-Instruct-2407 (mistralai 'v3-tekken' template; modified to have system prompt at start)",
        False,
    ),
    ("mistral-v7-tekken", "templates/mistral-common/v7.jinja", True),
    ("phi3", "Phi-3-vision", True),
    ("vicuna", "eachadea/vicuna-13b-1.1", True),
    ("zephyr", "zephyr", True),
]


def real_source(conformance: Path, real: str) -> str:
    if real.endswith(".jinja"):
        return (conformance / real).read_text()
    if real.endswith(".json"):
        return str(json.loads((conformance / real).read_text())["chat_template"])
    cases = json.loads((conformance / "templates" / "llama.cpp-expected.json").read_text())
    lines = (conformance / "templates" / "ollama-rendered" / "templates.jsonl").read_text().splitlines()
    listed = [pair for line in lines for pair in json.loads(line).items()]
    return str({**dict(reversed(listed)), **{case["name"]: case["template"] for case in cases}}[real])


@pytest.mark.parametrize(("name", "real", "system"), REAL)
def test_a_named_template_writes_what_the_models_own_writes(
    conformance: Path, name: str, real: str, system: bool
) -> None:
    eos = "<\uff5cend\u2581of\u2581sentence\uff5c>" if name.startswith("deepseek") else "</s>"
    ours = Template(NAMED[name], name=name, bos="<s>", eos=eos)
    theirs = Template(real_source(conformance, real), name=real, bos="<s>", eos=eos)
    for messages in [HELLO, TALK, *([[SYSTEM, *HELLO], [SYSTEM, *TALK]] if system else [])]:
        assert ours.render(messages) == theirs.render(messages)


# Forms of which no real template is at hand, from their documentation (model cards, llama.cpp's llama-chat.cpp).
DOCUMENTED = {
    "llama4": "<s><|header_start|>system<|header_end|>\n\nBe brief.<|eot|><|header_start|>user<|header_end|>\n\n"
    "Hello<|eot|><|header_start|>assistant<|header_end|>\n\n",
    "phi4": "<|im_start|>system<|im_sep|>Be brief.<|im_end|><|im_start|>user<|im_sep|>Hello<|im_end|>"
    "<|im_start|>assistant<|im_sep|>",
    "phi4-mini": "<|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>",
    "mistral-v1": "<s>[INST] Be brief.\n\nHello [/INST]",
    "mistral-v7": "<s>[SYSTEM_PROMPT] Be brief.[/SYSTEM_PROMPT][INST] Hello[/INST]",
    "gpt-oss": "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
    "Knowledge cutoff: 2024-06\n\nReasoning: medium\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>"
    "<|start|>developer<|message|># Instructions\n\nBe brief.\n\n<|end|><|start|>user<|message|>Hello<|end|>"
    "<|start|>assistant",
}


@pytest.mark.parametrize("name", sorted(DOCUMENTED))
def test_a_named_template_writes_what_is_documented(name: str) -> None:
    assert Template(NAMED[name], name=name, bos="<s>", eos="</s>").render([SYSTEM, *HELLO]) == DOCUMENTED[name]


def test_gpt_oss_keeps_the_final_message_of_an_answer_alone() -> None:
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi there"
    turns = [HELLO[0], {"role": "assistant", "content": said}, TALK[-1]]
    template = Template(NAMED["gpt-oss"], name="gpt-oss")
    assert template.render(turns) == template.render(TALK)
    assert "<|start|>assistant<|channel|>final<|message|>Hi there<|end|>" in template.render(TALK)


def test_an_if_without_else_renders_in_a_template_whose_name_has_an_apostrophe() -> None:
    """jinja2 writes the name into the code of what such an if gives; Gemma 4's real template has some."""
    assert Template("{{ 'yes' if messages }}{{ 'no' if not messages }}", name="the model's own").render(HELLO) == "yes"


# templates by name


@pytest.mark.parametrize("name", sorted(NAMED))
def test_every_named_template_carries_system_history_and_question(name: str) -> None:
    text = Template(NAMED[name], name=name, bos="<s>", eos="</s>").render([SYSTEM, *TALK])
    places = [text.index(part) for part in ("Be brief.", "Hello", "Hi there", "Who are you?")]
    assert places == sorted(places)
    assert text.count("<s>") == (2 if name == "llama2" else text.startswith("<s>"))


def test_the_names_are_those_promised() -> None:
    named = (
        "alpaca chatml command-r deepseek deepseek-r1 deepseek-v2 gemma glm4 gpt-oss granite llama2 llama3 llama4 "
        "mistral-v1 mistral-v3 mistral-v3-tekken mistral-v7 mistral-v7-tekken phi3 phi4 phi4-mini vicuna zephyr"
    ).split()
    assert sorted(NAMED) == named
    assert choices() == sorted([*named, *"cohere deepseek-v3 glm harmony mistral phi qwen".split()])
    assert named_source("qwen") == NAMED["chatml"] and named_source("none") is None


def test_reasoning_markers_are_those_the_template_uses() -> None:
    assert reasoning_markers("{{ content.split('</think>')[-1] }}") == ("<think>", "</think>")
    assert reasoning_markers("[THINK]{{ x }}[/THINK]") == ("[THINK]", "[/THINK]")
    harmony = "<|channel|>analysis<|message|>{{ x }}<|end|>"
    assert reasoning_markers(harmony) == ("<|channel|>analysis<|message|>", "<|end|>")
    assert reasoning_markers(NAMED["phi3"]) is None


# the dialect of Hugging Face


def test_tojson_keeps_characters_and_takes_json_dumps_options() -> None:
    assert render("{{ x | tojson }}", x={"b": "<\u00e9>", "a": [1, None]}) == '{"b": "<\u00e9>", "a": [1, null]}'
    assert render("{{ x | tojson(indent=2) }}", x={"a": 1}) == '{\n  "a": 1\n}'
    assert render("{{ x | tojson(separators=(',', ':'), sort_keys=True) }}", x={"b": 1, "a": 2}) == '{"a":2,"b":1}'


def test_blocks_take_their_line_with_them_and_loops_can_be_left() -> None:
    lines = [
        "  {% for n in range(9) %}",
        "  {% if n == 1 %}{% continue %}{% endif %}",
        "{% if n > 2 %}{% break %}{% endif %}",
    ]
    source = "\n".join([*lines, "{{ n }}", "  {% endfor %}", ""])
    assert render(source) == "0\n2\n"


def test_bos_eos_and_the_callers_variables_are_seen() -> None:
    assert render("{{ bos_token }}{{ x }}{{ eos_token }}{{ y is defined }}", x=1) == "<s>1</s>False"
    assert render("{{ add_generation_prompt }}", add_generation_prompt=False) == "False"
    assert render("{{ strftime_now('%Y') }}") == datetime.now().strftime("%Y")
    assert render("{{ strftime_now('%Y') }}", strftime_now=NOW.strftime) == "2026"


def test_a_generation_block_is_what_it_encloses() -> None:
    source = "{% for m in messages %}{% generation %}{{ m.content ~ loop.index }}{% endgeneration %}{% endfor %}"
    assert render(source) == "Hello1"


def test_loop_variables_work_as_in_jinja2() -> None:
    source = "{% for a, b in x.items() %}{{ loop.index }}/{{ loop.length }}{{ a }}{{ b }}{{ loop.last }} {% endfor %}"
    assert render(source, x={"p": 1, "q": 2}) == "1/2p1False 2/2q2True "


def test_one_template_renders_twice_alike() -> None:
    template = Template(NAMED["chatml"], name="chatml")
    assert template.render(TALK) == template.render(TALK)


# errors


def test_a_syntax_error_names_template_and_line() -> None:
    with pytest.raises(TemplateError, match=r"template broken, line 3: Unexpected end of template"):
        Template("a\nb\n{% if x %}", name="broken")


def test_an_error_while_rendering_names_template_and_line() -> None:
    with pytest.raises(TemplateError, match=r"^template test, line 2: no system please$"):
        render("{{ 1 }}\n{{ raise_exception('no system please') }}")
    with pytest.raises(TemplateError, match=r"^template test, line 3: UndefinedError: 'x' is undefined$"):
        render("a\nb\n{{ x.y }}")


def test_an_error_is_one_short_printable_line() -> None:
    with pytest.raises(TemplateError) as caught:
        render("{{ raise_exception('a\nb\x1b[2J' ~ 'x' * 100000) }}")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


ESCAPES = [
    "{{ ''.__class__.__mro__ }}",
    "{{ x.append(1) }}",
    "{{ cycler.__init__.__globals__ }}",
    "{{ messages.clear() }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_does_not_let_out_nor_change_what_it_was_given(source: str) -> None:
    given = [1]
    with pytest.raises(TemplateError):
        render(source, x=given)
    assert given == [1]


def test_a_format_does_not_reach_what_attributes_do_not() -> None:
    assert render("{{ '{0.__class__}{1}'.format(1, 'x') }}") == "x"


GROW = "{% set ns = namespace(x=START) %}{% for i in range(99) %}{% set ns.x = STEP %}{% endfor %}{{ ns.x }}"


def grow(start: str, step: str) -> str:
    return GROW.replace("START", start).replace("STEP", step)


HOSTILE = {
    "a loop over a billion": "{% for i in range(10**9) %}{% for j in range(10**9) %}{% endfor %}{% endfor %}",
    "empty loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "endless macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "branching macro": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "recursive loop": "{% for x in [[1]] recursive %}{{ loop([[1], [1], [1]]) }}{% endfor %}",
    "string times": "{{ 'a' * 10**9 }}",
    "times string": "{{ 10**9 * 'a' }}",
    "list times": "{{ [0] * 10**9 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "percent width": "{{ '%999999999d' % 1 }}",
    "percent star": "{{ '%*d' % (10**9, 1) }}",
    "percent precision": "{{ '%.999999999f' % 1 }}",
    "format filter": "{{ '%999999999d' | format(1) }}",
    "brace width": "{{ '{:999999999}'.format(1) }}",
    "brace in brace": "{{ '{:{w}}'.format(1, w=10**9) }}",
    "format_map": "{{ '{a:999999999}'.format_map({'a': 1}) }}",
    "center method": "{{ 'a'.center(10**9) }}",
    "center filter": "{{ 'a' | center(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ ('\t' * 99999).expandtabs(10**6) }}",
    "to_bytes": "{{ (5).to_bytes(10**10, 'big') }}",
    "indent": "{{ ('\n' * 99999) | indent(99999) }}",
    "tojson": "{{ range(99999) | list | tojson(indent=99999) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "sum of lists": "{{ ([[1] * 2000] * 2000) | sum(start=[]) | length }}",
    "lazy pieces": "{{ range(99999) | map('center', 9999) | join }}",
    "join": "{{ range(99999) | map('string') | join('x' * 99999) }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "strftime": "{{ strftime_now('%999999999d') }}",
    "doubling by ~": grow("'a'", "ns.x ~ ns.x"),
    "doubling by +": grow("'a'", "ns.x + ns.x"),
    "doubling by %": grow("'a'", "'%s%s' % (ns.x, ns.x)"),
    "doubling by format": grow("'a'", "'{0}{0}'.format(ns.x)"),
    "squaring by replace": grow("'aa'", "ns.x.replace('a', ns.x)"),
    "squaring by the replace filter": grow("'aa'", "ns.x | replace('a', ns.x)"),
    "squaring by join": grow("'aa'", "ns.x.join(ns.x)"),
    "shared lists": grow("[1]", "[ns.x, ns.x]"),
    "shared tuples": grow("(1,)", "(ns.x, ns.x)"),
    "shared dicts": grow("{'a': 1}", "{'a': ns.x, 'b': ns.x}"),
    "shared views": grow("{'a': 1}", "dict(a=ns.x.items(), b=ns.x.items())"),
    "doubling by set": "{% set ns = namespace(x='a') %}{% for i in range(99) %}"
    "{% set ns.x %}{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "hidden output": "{% set x %}{% for a in range(99999) %}" + "x" * 50000 + "{% endfor %}{% endset %}",
    "much output": "{% for a in range(99999) %}" + "x" * 50000 + "{% endfor %}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long source": "{{ a }}" * 20000,
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_stopped_within_its_time(name: str) -> None:
    start = time.monotonic()
    with pytest.raises(TemplateError):
        render(HOSTILE[name])
    assert time.monotonic() - start < 4  # 2 seconds by the template's clock; the machine may be busy


def test_bounds_leave_room_for_a_long_conversation() -> None:
    turns = [{"role": role, "content": "word " * 400} for _ in range(200) for role in ("user", "assistant")]
    assert len(Template(NAMED["chatml"], name="chatml").render(turns)) > 800_000
