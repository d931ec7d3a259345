"""What is wrong with a chat template for a vocabulary, found by rendering and tokenising short conversations as a
session would; knows no model, prints nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

from localmoe.endings import StoppingEncoder, endings
from localmoe.errors import LocalMoeError, TemplateError
from localmoe.loader.source import listed
from localmoe.loader.source import shown as quoted
from localmoe.template import NAMED, Template, reasoning_markers
from localmoe.template_fit import fitting, single_token
from localmoe.turns import ANSWER, NEXT, QUESTION, SYSTEM, Renders, Turns, spoken, turns_of

Severity = Literal["error", "warning", "note"]
# What templates write for a token: <|im_end|>, <｜User｜>, </s>, <start_of_turn>, [INST].
TOKEN_LIKE = re.compile(
    r"<\|[^|<>\s]{1,80}\|>|<\uff5c[^\uff5c<>]{1,80}\uff5c>|</?s>|<[a-z]{1,20}_of_[a-z]{1,20}>|\[/?[A-Z][A-Z_]{2,40}\]"
)
PLAIN_BRACKETS = re.compile(
    r"\[/?INST\]"
)  # text in Llama 2 and the first Mistral, whose vocabularies have no such token
THOUGHT = "Xqthought"
# Where the vocabulary does not tell a family, its architecture may.
BY_ARCHITECTURE: Mapping[str, tuple[str, ...]] = {
    "cohere2": ("command-r",), "command-r": ("command-r",), "gemma2": ("gemma",), "gemma3": ("gemma",),
    "gpt-oss": ("gpt-oss",), "granite": ("granite",), "granitemoe": ("granite",), "llama4": ("llama4",),
    "phi3": ("phi3", "phi4-mini", "phi4"), "qwen2": ("chatml",), "qwen2moe": ("chatml",), "qwen3": ("chatml",),
    "qwen3moe": ("chatml",),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Finding:
    """One line about what was found, and one about what to do; "error": answers cannot be right, "warning": they may
    get worse, or cost time, "note": good to know."""

    severity: Severity
    text: str
    advice: str = ""


class ExaminedTokenizer(StoppingEncoder, Protocol):
    """What is asked of a tokenizer."""

    @property
    def bos(self) -> int | None: ...
    @property
    def eos(self) -> int | None: ...
    def encode_prompt(self, rendered: str) -> list[int]: ...


class ExaminedTemplate(Renders, Protocol):
    """What is asked of a template."""

    @property
    def source(self) -> str: ...


class ShownToken(NamedTuple):
    """A token of a prompt; `special`: a control token, which is no part of the text."""

    id: int
    text: str
    special: bool


def shown(
    tokenizer: ExaminedTokenizer, template: ExaminedTemplate, messages: Sequence[Mapping[str, Any]]
) -> list[ShownToken]:
    """The tokens that a model would get for `messages`. Raises TemplateError, TokenizerError."""
    ids = tokenizer.encode_prompt(template.render(messages, add_generation_prompt=True))
    return [ShownToken(id, tokenizer.token(id), tokenizer.is_special(id)) for id in ids]


def examine(
    tokenizer: ExaminedTokenizer, template: ExaminedTemplate, own: str | None = None, architecture: str = ""
) -> list[Finding]:
    """Findings, the worst first. `own` is the source of the template in the file, where another one is examined."""
    patient = Patient(tokenizer, template, own, architecture)
    found: list[Finding] = []
    try:
        if patient.hopeless:
            return [patient.hopeless]
        for check in CHECKS:
            found.extend(check(patient))
    except LocalMoeError as error:  # it renders now and then, or what the vocabulary cannot carry
        found.append(Finding("error", f"cannot be examined: {error}", "choose another template"))
    return sorted(found, key=lambda finding: ("error", "warning", "note").index(finding.severity))


@dataclass(frozen=True)
class Patient:
    """A vocabulary with a template."""

    tokenizer: ExaminedTokenizer
    template: ExaminedTemplate
    own: str | None
    architecture: str

    @cached_property
    def hopeless(self) -> Finding | None:
        """Why nothing else can be examined."""
        for messages, what in (
            (spoken("user", QUESTION), "a single question"),
            (spoken("user", QUESTION, "assistant", ANSWER, "user", NEXT), "a question, an answer and another question"),
        ):
            text = self.render(messages)
            if isinstance(text, TemplateError):
                return Finding(
                    "error", f"cannot render {what}: {text}", "choose another template, by name or from a file"
                )
            if missing := [m["role"] for m in messages if m["content"] not in text]:
                return Finding("error", f"leaves out what the {missing[0]} says", "choose another template")
        try:
            _ = self.turns
        except TemplateError as error:
            return Finding("error", f"cannot be used for a conversation: {error}", "choose another template")
        return None

    @cached_property
    def turns(self) -> Turns:
        return turns_of(self.template)

    @cached_property
    def question(self) -> str:
        """A single question, rendered."""
        return self.template.render(spoken("user", QUESTION), add_generation_prompt=True)

    @cached_property
    def conversation(self) -> str:
        """Rendered, with a system message where the template takes one."""
        messages = spoken("user", QUESTION, "assistant", ANSWER, "user", NEXT)
        text = self.render([*spoken("system", SYSTEM), *messages])
        return text if isinstance(text, str) else self.template.render(messages, add_generation_prompt=True)

    @cached_property
    def families(self) -> tuple[str, ...]:
        """Names of the templates that models with this vocabulary, or of this architecture, are known to use."""
        return fitting(self.tokenizer) or BY_ARCHITECTURE.get(self.architecture, ())

    def named(self, name: str) -> Template:
        bos, eos = ("" if id is None else self.tokenizer.token(id) for id in (self.tokenizer.bos, self.tokenizer.eos))
        return Template(NAMED[name], name=name, bos=bos, eos=eos)

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str | TemplateError:
        try:
            return self.template.render(messages, add_generation_prompt=True)
        except TemplateError as error:
            return error


def beginning(patient: Patient) -> Iterator[Finding]:
    """BOS once, and where models of this kind were trained with it."""
    tokenizer, bos = patient.tokenizer, patient.tokenizer.bos
    if bos is None:
        return
    ids, name = tokenizer.encode(patient.question, bos=False), quoted(tokenizer.token(bos))
    leading = next((n for n, id in enumerate(ids) if id != bos), len(ids))
    by_file = tokenizer.encode("a")[:1] == [bos]
    if leading > 1:
        yield Finding("warning", f"begins with {name} {leading} times", "it is kept once here; other programs keep all")
    elif leading and by_file:
        yield Finding("note", f"{name} is asked for by the file and written by the template", "it is kept once")
    elif not leading and not by_file and any("bos_token" in NAMED[family] for family in patient.families):
        known = patient.families[0]
        yield Finding(
            "warning", f"no prompt begins with {name}, though models that talk as {known} are trained with it",
            f"try --template {known}",
        )  # fmt: skip
    if bos in ids[leading:] and bos not in tokenizer.stop:
        yield Finding("note", f"{name} stands inside a single question too", "few models are trained so")


def markers(patient: Patient) -> Iterator[Finding]:
    """What looks like a token, and is none in this vocabulary."""
    written = dict.fromkeys(TOKEN_LIKE.findall(patient.conversation))
    split = [marker for marker in written if single_token(patient.tokenizer, marker) is None]
    end = patient.turns.marker
    if end and end not in split and single_token(patient.tokenizer, end) is None:
        split.append(end)
    others = [marker for marker in split if marker != end and not PLAIN_BRACKETS.fullmatch(marker)]
    if end in split:
        pieces = len(patient.tokenizer.encode(end, bos=False))
        yield Finding(
            "error", f"{quoted(end)}, which ends an answer, is no token of this vocabulary but {pieces} pieces of text",
            _other(patient) + "; its text is watched for",
        )  # fmt: skip
    if others:
        text = f"no tokens of this vocabulary, but text in pieces: {listed([quoted(marker) for marker in others])}"
        yield Finding("warning", text, f"some models are trained so (Zephyr); if this one is not: {_other(patient)}")


def ending(patient: Patient) -> Iterator[Finding]:
    """What stops the model."""
    tokenizer, turns = patient.tokenizer, patient.turns
    found = endings(tokenizer, patient.template)
    if added := found.tokens - tokenizer.stop:
        names = listed([quoted(tokenizer.token(id)) for id in added])
        text = f"{names} ends an answer, and is not among the ends that the file names"
        yield Finding("warning", text, "localmoe stops there; other programs may run on")
    elif not turns.marker and found.texts:
        text = f"an answer ends without a token, by the text {quoted(found.texts[0])}"
        yield Finding("note", text, "it is watched for; an answer that holds it ends there")
    elif not turns.marker:
        yield Finding("warning", "writes nothing between an answer and the next question", _other(patient))


def system_message(patient: Patient) -> Iterator[Finding]:
    """Dropped, refused, or put into the question."""
    text = patient.render([*spoken("system", SYSTEM), *spoken("user", QUESTION)])
    if isinstance(text, TemplateError):
        yield Finding("warning", f"refuses a system message: {text}", "say in the first question what it should know")
    elif SYSTEM not in text:
        yield Finding("warning", "drops the system message", "say in the first question what it should know")
    else:
        alone, before = patient.question.partition(QUESTION)[0], text.partition(SYSTEM)[0]
        bos = patient.tokenizer.bos
        opening = alone.removeprefix("" if bos is None else patient.tokenizer.token(bos)).strip()
        if opening and before.startswith(alone.rstrip()):
            yield Finding("note", "puts the system message into the first question", "these models know no other place")


def roles(patient: Patient) -> Iterator[Finding]:
    """Conversations that a user can bring about, and that it refuses or loses something of."""
    tried = {
        "two questions in a row": spoken("user", QUESTION, "user", NEXT),
        "an answer before any question": spoken("assistant", ANSWER, "user", NEXT),
        "a system message later on": spoken("user", QUESTION, "assistant", ANSWER, "system", SYSTEM, "user", NEXT),
        "the result of a tool": spoken("user", QUESTION, "assistant", ANSWER, "tool", NEXT),
    }
    texts = {what: patient.render(messages) for what, messages in tried.items()}
    refused = {what: text for what, text in texts.items() if isinstance(text, TemplateError)}
    lossy = [
        what
        for what, text in texts.items()
        if isinstance(text, str) and any(message["content"] not in text for message in tried[what])
    ]
    if refused:
        yield Finding("note", f"refuses {', '.join(refused)}: {next(iter(refused.values()))}")
    if lossy:
        yield Finding("note", f"leaves something out of {', '.join(lossy)}")


def invitation(patient: Patient) -> Iterator[Finding]:
    """Where the model is to speak."""
    end = patient.turns.end
    if not end:
        yield Finding("warning", "does not begin an answer: the model may go on with the question", _other(patient))
    elif end[-1] in " \t":
        text = "the prompt ends with a space, which most vocabularies would have put into the next word"
        yield Finding("warning", text, "take the space from the end of the template")


def spaces(patient: Patient) -> Iterator[Finding]:
    """A space that the template writes behind a token, and the vocabulary once more."""
    tokenizer, text = patient.tokenizer, patient.conversation
    for marker in dict.fromkeys(TOKEN_LIKE.findall(text)):
        if single_token(tokenizer, marker) is None or not re.search(re.escape(marker) + " [^ ]", text):
            continue
        if tokenizer.token(tokenizer.encode(marker + "a", bos=False)[-1]).startswith(" "):
            advice = "--template mistral writes it once" if "INST" in marker else "a template without it writes it once"
            yield Finding("note", f"the space behind {quoted(marker)} is written twice, by the vocabulary too", advice)
            return


def history(patient: Patient) -> Iterator[Finding]:
    """Whether what was read stays as it was when the conversation goes on."""
    asked = patient.question
    turn = spoken("user", QUESTION, "assistant", ANSWER, "user", NEXT)
    later = patient.template.render(turn, add_generation_prompt=True)
    # Some vocabularies have their models begin with a space, which the template may expect or write itself.
    spaced = patient.render([turn[0], {**turn[1], "content": f" {ANSWER}"}, turn[2]])
    kept = isinstance(spaced, str) and spaced.startswith(f"{asked} {ANSWER}")
    if not kept and not later.startswith(asked + ANSWER):
        same = next((n for n, (a, b) in enumerate(zip(asked + ANSWER, later, strict=False)) if a != b), len(asked))
        far = same < asked.index(QUESTION) + len(QUESTION)
        what = "the whole conversation is" if far else "the last answer is"
        text = f"rewrites what was said when the conversation goes on: {what} read again before each answer"
        yield Finding("warning" if far else "note", text)
        return
    reasons = reasoning_markers(patient.template.source)
    if reasons is None:
        return
    turn[1]["content"] = f"{reasons[0]}\n{THOUGHT}\n{reasons[1]}\n\n{ANSWER}"
    told = patient.render(turn)
    if isinstance(told, str) and THOUGHT not in told:
        yield Finding("note", "leaves out the reasoning of earlier answers: the last answer is read again each time")


def reasoning(patient: Patient) -> Iterator[Finding]:
    """The markers of reasoning."""
    for marker in reasoning_markers(patient.template.source) or ():
        tokens = TOKEN_LIKE.findall(marker)
        if marker not in patient.template.source or len(tokens) > 1:  # made of several tokens by design
            continue
        if single_token(patient.tokenizer, marker) is None:
            pieces = len(patient.tokenizer.encode(marker, bos=False))
            yield Finding("note", f"{quoted(marker)} is {pieces} pieces of text in this vocabulary, not a token")


def date(patient: Patient) -> Iterator[Finding]:
    """What makes a prompt of today differ from one of tomorrow."""
    if "strftime_now" in patient.template.source:
        text = "writes today's date: a conversation of yesterday is read again from there"
        yield Finding("note", text)


def likeness(patient: Patient) -> Iterator[Finding]:
    """Beside what models with this vocabulary are known to use, and beside the file's own template."""
    known = {name: turns_of(patient.named(name)) for name in patient.families}
    if known and not any(_same(patient.turns, turns) for turns in known.values()):
        name, theirs = next(iter(known.items()))
        yield Finding(
            "note", f"differs from {name}, for which this vocabulary was made: {_difference(patient.turns, theirs)}"
        )
    if patient.own is not None and patient.own != patient.template.source:
        bos, eos = (
            "" if id is None else patient.tokenizer.token(id) for id in (patient.tokenizer.bos, patient.tokenizer.eos)
        )
        try:
            theirs = turns_of(Template(patient.own, name="the model's own", bos=bos, eos=eos))
        except LocalMoeError as error:
            yield Finding("note", f"the model's own template cannot be used: {error}")
            return
        if not _same(patient.turns, theirs):
            text = f"differs from the model's own template: {_difference(patient.turns, theirs)}"
            yield Finding("note", text, "--template left out takes the model's own")


CHECKS: tuple[Callable[[Patient], Iterator[Finding]], ...] = (
    beginning, markers, ending, invitation, system_message, roles, spaces, history, reasoning, date, likeness,
)  # fmt: skip


def _same(one: Turns, other: Turns) -> bool:
    """What stands around the turns; in front of the first there may be a default system message."""
    return (one.between, one.behind, one.end) == (other.between, other.behind, other.end)


def _difference(one: Turns, other: Turns) -> str:
    parts = {"before an answer": "between", "behind an answer": "behind", "where the next one begins": "end"}
    for where, part in parts.items():
        ours, theirs = getattr(one, part), getattr(other, part)
        if ours != theirs:
            return f"{where} it writes {quoted(ours)}, not {quoted(theirs)}"
    return ""


def _other(patient: Patient) -> str:
    return f"try --template {patient.families[0]}" if patient.families else "choose a template of this model's family"
