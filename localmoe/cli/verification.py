"""`perplexity` and `verify`: how good a model's numbers are; knows how results are shown, not how they are found."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from localmoe.cli.command import AsJson, DeviceName, KeyValueFormat, ModelArgument, Threads, app, opened
from localmoe.cli.loading import with_loading_flags
from localmoe.experts.loading import read_loading

if TYPE_CHECKING:
    from localmoe.evaluation.perplexity import Request
    from localmoe.evaluation.summary import Outcome
    from localmoe.evaluation.transformers_model import StreamedModel
    from localmoe.evaluation.verification import Verification
    from localmoe.model import Model
    from localmoe.repl.render import Screen


@app.command()
@with_loading_flags
def perplexity(
    model: ModelArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A text; logits that were saved have theirs with them.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", "-c", min=1, help="Tokens of a chunk (512, or the base's).")
    ] = None,
    chunks: Annotated[int | None, typer.Option(min=1, help="Chunks to score; by default all.")] = None,
    stride: Annotated[
        int,
        typer.Option(min=0, help="Chunks overlap and begin so many tokens apart; these are scored. 0: side by side."),
    ] = 0,
    kl_base: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Save logits here; where the file exists, compare with those in it."),
    ] = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    kv: KeyValueFormat = "f16",
    as_json: AsJson = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Say how well a model predicts a text, and how far its logits lie from another one's.

    Chunks, scored tokens and the file of --kl-base are those of llama-perplexity, so that figures can be compared.
    """
    from localmoe.evaluation.perplexity import read_request
    from localmoe.repl.render import Screen

    screen = Screen()
    asked = read_request(file, context=context, stride=stride, chunks=chunks, kl_base=kl_base)
    how = {"context": asked.context, "threads": threads, "device": device, "kv_format": kv}
    with opened(screen, model, lazy=read_loading(**loading), **how) as found:
        score_text(screen, found, asked, as_json)


def score_text(screen: Screen, model: Model, asked: Request, as_json: bool) -> None:
    """Estimates as chunks come, then the whole; what there is of them after Ctrl+C, which goes on up."""
    from localmoe.evaluation import summary
    from localmoe.evaluation.perplexity import run
    from localmoe.evaluation.statistics import Estimate, Scores

    windows = asked.windows(model.tokenizer)
    if not as_json:
        for line in summary.headline(model.name, asked, windows, model.network.config.vocabulary):
            screen.notice(line)
        if model.context > model.trained_context:
            screen.notice(
                f"(the model was trained on {model.trained_context} tokens: beyond them its answers get worse)"
            )
    parts: list[Scores] = []
    estimates: list[Estimate] = []
    start = perf_counter()
    try:
        with screen.progress(f"chunks of {windows.context}") as bar:
            bar(f"chunks of {windows.context}", 0, windows.count)
            for chunk in run(model, asked, windows):
                parts = [Scores.joined([*parts, chunk.scores])]
                estimates.append(parts[0].perplexity())
                bar(f"PPL {summary.written(estimates[-1], 4)}", len(estimates), windows.count)
                if not as_json and summary.is_told(len(estimates)):
                    bar.beside(partial(screen.line, summary.running(len(estimates), parts[0])))
    finally:
        if parts:
            show(screen, summary.Outcome(windows, parts[0], estimates, perf_counter() - start), asked, model, as_json)


def show(screen: Screen, outcome: Outcome, asked: Request, model: Model, as_json: bool) -> None:
    from localmoe.evaluation import summary

    if as_json:
        print(json.dumps(outcome.record(asked, str(model.path)), indent=2, ensure_ascii=False))
        return
    if outcome.scores.has_base:
        screen.line()
        screen.rows(summary.figures(outcome.scores))
        screen.line()
        screen.rows(summary.quantile_rows(outcome.scores), ("quantile", "KL divergence", "Δp"))
        screen.line()
    screen.line(outcome.final())


@app.command()
def verify(
    model: ModelArgument,
    folder: Annotated[
        Path | None, typer.Argument(metavar="FOLDER", help="The Hugging Face folder that a GGUF file was made from.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A text instead of the one that comes along.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, max=4096, help="Tokens of the text that are compared.")] = 128,
    generate: Annotated[int, typer.Option("-n", "--generate", min=0, help="Tokens of greedy text.")] = 16,
    tolerance: Annotated[
        float | None, typer.Option(min=0, help="Largest error; by default 1e-4, more where weights are quantised.")
    ] = None,
    threads: Threads = None,
    device: DeviceName = "cpu",
    kv: KeyValueFormat = "f32",
    as_json: AsJson = False,
) -> None:
    """Compare a model with transformers: logits, every layer, the experts chosen, greedy text.

    transformers (the extra `oracle`) runs the folder in float32, one layer in memory at a time. Errors are root mean
    squares of differences, as parts of its values. Exit status 1: an error is beyond the tolerance.
    """
    from localmoe.evaluation.transformers_model import StreamedModel, load_transformers
    from localmoe.evaluation.verification import passage_ids, reference_folder
    from localmoe.evaluation.verification import verify as compare
    from localmoe.evaluation.windows import read_text
    from localmoe.repl.render import Screen

    screen = Screen()
    right = reference_folder(model, folder)
    passage = read_text(text) if text else None
    load_transformers()
    with opened(screen, model, context=tokens + generate, threads=threads, device=device, kv_format=kv) as found:
        ids, is_text = passage_ids(found, passage, tokens)
        with screen.progress("comparing") as bar:
            oracle = StreamedModel(right, bar)
            result = compare(found, oracle, ids, generate, tolerance, bar)
        if as_json:
            versions = {"model": str(model), "folder": str(right), "transformers": oracle.version}
            print(json.dumps(versions | result.record(), indent=2, ensure_ascii=False))
        else:
            show_verification(screen, found, oracle, result, is_text)
    if not result.passed:
        raise typer.Exit(1)


def show_verification(screen: Screen, model: Model, oracle: StreamedModel, result: Verification, is_text: bool) -> None:
    from localmoe.evaluation import findings

    kind = "tokens of text" if is_text else "random tokens (there is no tokenizer)"
    screen.notice(f"{model.name} beside transformers {oracle.version}: {result.tokens} {kind}")
    columns = len(findings.HEADER) if findings.has_routers(result) else 2
    screen.rows([row[:columns] for row in findings.layer_rows(result)], findings.HEADER[:columns])
    screen.line()
    decode = model.tokenizer.decode if is_text else None
    screen.rows([*findings.logit_rows(result), *findings.greedy_rows(result, decode)])
    screen.line()
    screen.line(findings.verdict(result), "" if result.passed else "bold red")
