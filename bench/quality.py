"""How far the CPU's logits lie from the same file's in float32 (numpy), on real text: perplexity, divergence, best
token; beside llama.cpp's, on the same tokens.

    python bench/quality.py MODEL.gguf TEXT [--context 128] [--chunks 20] [--kv f32 f16] [--threads 2]
        [--against LLAMA_PERPLEXITY]

A chunk is what llama-perplexity makes of one: `--context` tokens of the text, BOS in place of the first if the model
wants one, the second half scored. KL is the mean of KL(reference || other) over the scored positions, in nats; the
reference keeps its cache in float32 in every row. All logits, the reference's too, are rounded as llama-perplexity
saves its own: to 16 bits, nothing below the best by more than 16 nats. "ours less theirs" is the mean of the paired
differences of KL and its standard error, with chunks as the independent units. For one device, cache and step
`localmoe perplexity --kl-base` says more. On a busy machine take
`--threads 1`: our bits do not depend on it, and llama.cpp's threads wait for each other by turning.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np

import localmoe
from localmoe.evaluation.perplexity import scores_of
from localmoe.evaluation.saved_logits import Rows, SavedLogits, rounded
from localmoe.evaluation.statistics import Estimate, Scores
from localmoe.evaluation.windows import Ids
from localmoe.formats import KV_FORMATS
from localmoe.notebook import LoadedModel

CHARACTERS = 16  # of the text for each token that is wanted: more than any vocabulary needs
STEPS = ("prefill", "decode")


@dataclass(frozen=True)
class Judged:
    """The scores of every chunk beside the reference."""

    chunks: list[Scores]

    def __str__(self) -> str:
        found = Scores.joined(self.chunks)
        perplexity, nats = found.perplexity().value, found.mean_divergence().value
        return f"perplexity {perplexity:9.4f}  KL {nats:9.3e}  same best token {100 * found.agreement().value:6.2f} %"

    def less(self, other: Judged) -> str:
        """Mean and standard error of this KL less another one's, with chunks as the independent units."""
        means = [np.array([chunk.divergence.mean() for chunk in judged.chunks]) for judged in (self, other)]
        paired = Estimate.mean(means[0] - means[1])
        return f"ours less theirs {paired.value:+.2e} ± {paired.error:.1e}"


@dataclass(frozen=True)
class PeerSetting:
    """One way to run llama-perplexity. A batch of one token is its decoding step."""

    kv: str
    step: str
    repack: bool
    flash_attention: bool

    @property
    def name(self) -> str:
        return f"llama.cpp{' repacked' if self.repack else ''}{' fa' if self.flash_attention else ''}"

    def flags(self, context: int) -> list[str]:
        batch = str(context if self.step == "prefill" else 1)
        words = ["-c", str(context), "-b", batch, "-ub", batch, "-ctk", self.kv, "-ctv", self.kv]
        return [*words, "-fa", "on" if self.flash_attention else "off", "--repack" if self.repack else "--no-repack"]


def judge(right: Iterable[Rows], found: Iterable[Rows], tokens: Ids) -> Judged:
    """What is kept of each chunk's logits against the reference's. `tokens` (chunks, context) are the text's."""
    rows = zip(right, found, tokens, strict=True)
    return Judged([scores_of(kept.values(), ids[-len(kept) :], base) for base, kept, ids in rows])


def run_chunks(model: LoadedModel, tokens: Ids, step: str) -> Iterator[Rows]:
    """What is kept of the logits of each chunk's scored positions: from the middle to the last but one."""
    half = tokens.shape[1] // 2
    for ids in tokens:
        ids = ids.tolist()
        if model.tokenizer.add_bos:
            ids[0] = model.tokenizer.bos
        if step == "prefill":
            logits = model.forward(ids, 0, all_logits=True)
        else:
            logits = np.concatenate([model.forward([id], position) for position, id in enumerate(ids)])
        yield rounded(logits[half:-1])


def run_peer(flags: argparse.Namespace, text: Path, setting: PeerSetting, out: Path) -> None:
    """llama-perplexity writes its logits to `out`. Ends with its last lines where it fails."""
    words = [
        str(flags.against),
        "-m",
        str(flags.model),
        "-f",
        str(text),
        "-t",
        str(flags.threads),
        "--save-all-logits",
        str(out),
    ]
    words += ["--chunks", str(flags.chunks), *setting.flags(flags.context)]
    ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if ended.returncode or not out.is_file() or out.stat().st_size < 20:
        last = "\n".join((ended.stdout + ended.stderr).strip().splitlines()[-3:])
        raise SystemExit(f"{flags.against}: it ended with status {ended.returncode}: {last}")


def compare(ours: dict[tuple[str, str], Judged], judged: Callable[[PeerSetting], Judged], kvs: list[str]) -> None:
    """A line for each way to run llama.cpp, below ours. Its flash attention is tried where it is the default."""
    for kv, step in product(kvs, STEPS):
        own = ours[kv, step]
        print(f"{kv:4} {step:8} {'localmoe':21} {own}")
        for flash, repack in product([False, True] if kv == "f16" else [False], [False, True]):
            setting = PeerSetting(kv, step, repack, flash)
            theirs = judged(setting)
            print(f"{kv:4} {step:8} {setting.name:21} {theirs}  {own.less(theirs)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=20)
    parser.add_argument("--kv", nargs="+", default=["f32", "f16"], choices=list(KV_FORMATS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--against", type=Path, metavar="LLAMA_PERPLEXITY")
    flags = parser.parse_args()

    def opened(device: str, kv: str) -> LoadedModel:
        return localmoe.load(flags.model, device, flags.threads, context=flags.context, kv_format=kv)

    text = flags.text.read_text()[: CHARACTERS * flags.chunks * flags.context]
    reference = opened("reference", "f32")
    own_ids = np.array(reference.tokenizer.encode(text, special=False)[: flags.chunks * flags.context], np.int32)
    tokens = own_ids[: own_ids.size // flags.context * flags.context].reshape(-1, flags.context)
    with tempfile.TemporaryDirectory() as folder:
        saved, passage = Path(folder, "saved"), Path(folder, "text")
        passage.write_text(text)
        if flags.against:
            run_peer(flags, passage, PeerSetting("f32", "prefill", repack=True, flash_attention=False), saved)
            head = SavedLogits(saved)
            tokens = head.tokens.reshape(head.chunks, head.context).copy()
            same = tokens.size <= own_ids.size and (tokens.reshape(-1) == own_ids[: tokens.size]).all()
            print(f"llama.cpp's tokens, which {'are ours too' if same else 'are not ours'}")
        right = list(run_chunks(reference, tokens, "prefill"))
        print(f"{flags.model.name}: {len(tokens)} chunks, {sum(map(len, right))} positions scored")
        ours = {}
        for kv in flags.kv:
            model = opened("cpu", kv)
            for step in STEPS:
                ours[kv, step] = judge(right, run_chunks(model, tokens, step), tokens)
            model.close()
        if not flags.against:
            for (kv, step), own in ours.items():
                print(f"{kv:4} {step:8} {own}")
            return

        def judged(setting: PeerSetting) -> Judged:
            saved.unlink()
            run_peer(flags, passage, setting, saved)
            theirs = SavedLogits(saved)
            return judge(right, map(theirs.chunk, range(theirs.chunks)), tokens)

        compare(ours, judged, flags.kv)


if __name__ == "__main__":
    main()
