"""`models`: what there is on this machine to talk to; knows how that is shown, not how it is found out."""

from __future__ import annotations

import json

from localmoe.cli.command import AsJson, app


@app.command()
def models(as_json: AsJson = False) -> None:
    """List the models on this machine, those of other programs' caches among them.

    Looked at are the current folder, models/ in it, the user's models folder ($LOCALMOE_MODELS) and the caches of
    Hugging Face, ollama, LM Studio and llama.cpp, in place. Wherever MODEL is asked for, a name from this list will do.
    """
    from localmoe.discovery.catalogue import Catalogue, record
    from localmoe.discovery.places import models_folder
    from localmoe.memory import available_nbytes
    from localmoe.repl.render import Screen

    screen, catalogue = Screen(), Catalogue()
    with screen.progress("looking for models") as bar:
        header, rows, remarks = catalogue.rows(screen.width, bar)
    if as_json:
        free = available_nbytes()
        print(json.dumps([record(d, catalogue.title(d.found), free) for d in catalogue.described()], indent=2))
        return
    screen.rows(rows, header)
    for remark in remarks:
        screen.notice(remark)
    if not rows:
        screen.notice(f"no models found; put GGUF files or Hugging Face folders into {models_folder()}")
