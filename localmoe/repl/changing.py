"""Another model or another template in mid-conversation: the old one goes on until the new one can; knows no input."""

from __future__ import annotations

from localmoe.errors import SettingError
from localmoe.interrupt import Uninterrupted
from localmoe.memory import readable_size
from localmoe.repl.keyboard import silent_keyboard
from localmoe.repl.models import OpenedModel, OpenModels
from localmoe.repl.talk import Interrupt, Talk
from localmoe.session import Session
from localmoe.template import Template
from localmoe.template_fit import open_template

OWN = "own"


def change_model(talk: Talk, name: str) -> None:
    """Go on with another model, which reads the conversation. Whatever is wrong with it is raised, and the old one goes
    on."""
    from localmoe.discovery.names import resolve  # late: no chat begins with this

    models = models_of(talk)
    path = resolve(name)
    with silent_keyboard(), Interrupt.watched():
        found = models.open(path)
    if found is models.current:
        raise SettingError(f"{found.name} is the model that answers")
    session = talk.session.with_model(found, _template_for(talk.session, found), models.kept(found))
    talk.check(session)
    with Uninterrupted():
        talk.go_on_with(session)
        models.take(found)
    facts = f"{found.architecture} · {readable_size(found.nbytes)} · context {found.context}"
    talk.screen.notice(f"({found.name} answers from now on: {facts})")
    talk.read_again()


def reopen(talk: Talk) -> None:
    """The same model opened anew, as after its file changed; the old one goes on where that fails."""
    models = models_of(talk)
    with silent_keyboard(), Interrupt.watched():
        found = models.reopen()
    try:
        named = talk.session.given_template
        template = open_template(found.tokenizer, named) if named else None
        session = talk.session.with_model(found, template, models.kept(found))
        talk.check(session)
    except BaseException:
        models.close_one(found)
        raise
    with Uninterrupted():
        talk.go_on_with(session)
        models.replace(found)
    talk.screen.notice(f"({found.name} opened anew)")


def change_template(talk: Talk, name: str) -> None:
    """Go on with another template; `own` is the model's. TemplateError and SettingError leave the old one."""
    model = talk.session.model
    if name == OWN and not model.has_template:
        raise SettingError(f"{model.name} has no chat template of its own")
    template = None if name == OWN else open_template(model.tokenizer, name)
    session = talk.session.with_model(model, template, talk.session.engine.kept)
    talk.check(session)
    talk.go_on_with(session)
    talk.screen.notice(f"(template: {talk.session.template.name})")
    talk.read_again()


def models_of(talk: Talk) -> OpenModels:
    if talk.models is None:
        raise SettingError("no other model can be opened here")
    return talk.models


def _template_for(session: Session, model: OpenedModel) -> Template | None:
    """None for the model's own; where it has none, the one that was asked for by name."""
    named = session.given_template
    return open_template(model.tokenizer, named) if named and not model.has_template else None
