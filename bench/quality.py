"""How far the CPU's logits lie from the same file's in float32 (numpy), on real text: perplexity, divergence, best
token; beside llama.cpp's, on the same tokens.

    python bench/quality.py MODEL.gguf TEXT [--context 128] [--chunks 20] [--kv f32 f16] [--threads 2]
        [--against LLAMA_PERPLEXITY]

A chunk is what llama-perplexity makes of one: `--context` tokens of the text, BOS in place of the first if the model
wants one, the second half scored. KL is the mean of KL(reference || other) over the scored positions, in nats; the
reference keeps its cache in float32 in every row. With --against all logits, the reference's too, are rounded as
llama-perplexity saves its own: to 16 bits, nothing below the best by more than 16 nats. "ours less theirs" is the mean
of the paired differences of KL and its standard error, with chunks as the independent units. On a busy machine take
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
import numpy.typing as npt

import localmoe
from localmoe.formats import KV_FORMATS
from localmoe.kernels.program import Floats
from localmoe.notebook import LoadedModel

Doubles = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int32]
CHARACTERS = 16  # of the text for each token that is wanted: more than any vocabulary needs
LOWEST = 16  # nats below the best logit; llama-perplexity saves nothing lower
STEPS = ("prefill", "decode")


@dataclass(frozen=True)
class Score:
    """What the scored positions of every chunk say, each (chunks, positions)."""

    surprise: Doubles
    divergence: Doubles
    agrees: npt.NDArray[np.bool_]

    def __str__(self) -> str:
        perplexity, nats = np.exp(self.surprise.mean()), self.divergence.mean()
        return f"perplexity {perplexity:9.4f}  KL {nats:9.3e}  same best token {100 * self.agrees.mean():6.2f} %"

    def less(self, other: Score) -> str:
        """Mean and standard error of this KL less another one's."""
        paired = (self.divergence - other.divergence).mean(axis=1)
        error = paired.std(ddof=1) / paired.size**0.5
        return f"ours less theirs {paired.mean():+.2e} ± {error:.1e}"


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


def log_softmax(logits: npt.NDArray[np.floating]) -> Doubles:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    found: Doubles = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def as_saved(logits: Floats) -> Floats:
    """Logits (rows, V) rounded as llama-perplexity's log_softmax does (tools/perplexity/perplexity.cpp)."""
    best = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), best - LOWEST)
    scale = np.maximum((best - lowest) / 65535, np.finfo(np.float32).tiny)
    found: Floats = np.rint(np.maximum(logits - lowest, 0) / scale) * scale + lowest
    return found


def score(right: Iterable[Floats], found: Iterable[Floats], tokens: Ids) -> Score:
    """Logits (rows, V) of each chunk against the reference's. `tokens` (chunks, context) are the text's."""
    rows = []
    for p_logits, q_logits, ids in zip(right, found, tokens, strict=True):
        p, q = log_softmax(p_logits), log_softmax(q_logits)
        following = ids[-len(q) :]
        surprise = -q[np.arange(len(q)), following]
        rows.append((surprise, (np.exp(p) * (p - q)).sum(axis=1), p.argmax(axis=1) == q.argmax(axis=1)))
    return Score(*(np.stack(column) for column in zip(*rows, strict=True)))


def run_chunks(model: LoadedModel, tokens: Ids, step: str) -> Iterator[Floats]:
    """Logits (rows, V) of the scored positions of each chunk: from the middle to the last but one."""
    half = tokens.shape[1] // 2
    for ids in tokens:
        ids = ids.tolist()
        if model.tokenizer.add_bos:
            ids[0] = model.tokenizer.bos
        if step == "prefill":
            logits = model.forward(ids, 0, all_logits=True)
        else:
            logits = np.concatenate([model.forward([id], position) for position, id in enumerate(ids)])
        yield logits[half:-1]


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


def read_saved(path: Path) -> tuple[Ids, Iterator[Floats]]:
    """Tokens (chunks, context) and an iterator of the chunks' log probabilities (rows, V) from --save-all-logits.

    The file: "_logits_", context, V and chunks as int32, the tokens, then rows of scale and lowest value (float32) and
    V 16-bit steps, filled up to an even number.
    """
    data = np.fromfile(path, np.uint8)
    if data[:8].tobytes() != b"_logits_":
        raise SystemExit(f"{path}: it begins with {data[:8].tobytes()!r}; _logits_ is wanted")
    context, vocabulary, chunks = (int(number) for number in data[8:20].view(np.int32))
    end = 20 + 4 * chunks * context
    tokens = data[20:end].view(np.int32).reshape(chunks, context)
    saved = data[end:].view(np.uint16).reshape(chunks, context - 1 - context // 2, -1)

    def values() -> Iterator[Floats]:
        for rows in saved:
            head = np.ascontiguousarray(rows[:, :4]).view(np.float32)
            yield rows[:, 4 : 4 + vocabulary] * head[:, :1] + head[:, 1:]

    return tokens, values()


def compare(ours: dict[tuple[str, str], Score], judge: Callable[[PeerSetting], Score], kvs: list[str]) -> None:
    """A line for each way to run llama.cpp, below ours. Its flash attention is tried where it is the default."""
    for kv, step in product(kvs, STEPS):
        own = ours[kv, step]
        print(f"{kv:4} {step:8} {'localmoe':21} {own}")
        for flash, repack in product([False, True] if kv == "f16" else [False], [False, True]):
            setting = PeerSetting(kv, step, repack, flash)
            theirs = judge(setting)
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
    rounded = as_saved if flags.against else lambda logits: logits
    with tempfile.TemporaryDirectory() as folder:
        saved, passage = Path(folder, "saved"), Path(folder, "text")
        passage.write_text(text)
        if flags.against:
            run_peer(flags, passage, PeerSetting("f32", "prefill", repack=True, flash_attention=False), saved)
            tokens = read_saved(saved)[0].copy()
            same = tokens.size <= own_ids.size and (tokens.reshape(-1) == own_ids[: tokens.size]).all()
            print(f"llama.cpp's tokens, which {'are ours too' if same else 'are not ours'}")
        right = [logits.copy() for logits in run_chunks(reference, tokens, "prefill")]
        print(f"{flags.model.name}: {len(tokens)} chunks, {sum(map(len, right))} positions scored")
        right_rounded = [rounded(logits) for logits in right]
        print(f"reference: {score(right, right_rounded, tokens)}" + " (of rounding alone)" * bool(flags.against))
        ours = {}
        for kv in flags.kv:
            model = opened("cpu", kv)
            for step in STEPS:
                ours[kv, step] = score(right_rounded, map(rounded, run_chunks(model, tokens, step)), tokens)
            model.close()
        if not flags.against:
            for (kv, step), own in ours.items():
                print(f"{kv:4} {step:8} {own}")
            return

        def judge(setting: PeerSetting) -> Score:
            saved.unlink()
            run_peer(flags, passage, setting, saved)
            return score(right_rounded, read_saved(saved)[1], tokens)

        compare(ours, judge, flags.kv)


if __name__ == "__main__":
    main()
