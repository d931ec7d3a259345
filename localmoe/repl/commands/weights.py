"""Commands about the weights: how they are loaded, which experts are chosen, what memory holds."""

from __future__ import annotations

from localmoe.errors import LocalMoeError, SettingError
from localmoe.experts.loading import MODES
from localmoe.repl.commands.table import command
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.residency import HOW_TO_COUNT, changed, loading_rows, memory_rows, runs_because
from localmoe.repl.talk import Interrupt, Talk

BESIDE_MAP = 10  # lines of the screen: the prompt, what was typed, and the figures below the map, which may be wrapped


@command(
    "lazy",
    help="show or change how weights are loaded; the conversation stays",
    usage="[off|mmap|slots [SIZE]|auto]",
    complete=lambda talk, typed: MODES,
)
def lazy(talk: Talk, argument: str) -> None:
    model = talk.model
    if not argument:
        talk.screen.rows(loading_rows(model))
        return
    asked, before = changed(model.loading, argument), model.residency_mode
    try:
        with silent_keyboard(), Interrupt.watched(), talk.screen.progress("changing how weights are loaded") as bar:
            model.change_loading(asked, bar)
    except LocalMoeError as error:
        talk.screen.error(str(error))
        talk.screen.notice(f"({before} goes on)")
    except KeyboardInterrupt:
        talk.screen.notice(f"(stopped: {model.residency_mode} goes on)")
    else:
        talk.screen.notice(f"(loading {runs_because(model)}; was {before})")


@command("experts", help="which experts are chosen: a heat map, the busiest, the idle, load balance and entropy")
def experts(talk: Talk, argument: str) -> None:
    from localmoe.experts.heatmap import facts, rows  # numpy, which /help and the manual need not load

    model, screen = talk.model, talk.screen
    uses = model.uses()
    if uses is None:
        raise SettingError(HOW_TO_COUNT)
    blocks = model.expert_blocks
    for line in rows(uses, screen.width, screen.lines_beside(BESIDE_MAP), plain=screen.is_ascii, blocks=blocks):
        screen.line(line)
    screen.rows(facts(uses, blocks))


@command("memory", help="what is where: weights, experts, KV cache, and what is free")
def memory(talk: Talk, argument: str) -> None:
    talk.screen.rows(memory_rows(talk.model))
