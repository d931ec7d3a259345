"""Memory: what a chat with a full context takes beside the pages of files, and what `localmoe inspect` predicts.

    python bench/memory.py MODEL.gguf... [--context 1024] [--threads 2] [--kv f16]

A chat at a terminal of its own gets a system prompt that fills the context but for some tokens, then a short message,
and answers until the context is full. Its anonymous memory (RssAnon, Linux) is read every 10 ms. A first start
compiles kernels, a few of which may take Numba into the process: a short chat goes ahead, unmeasured.
"""

from __future__ import annotations

import argparse
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path
from select import select

from localmoe.formats import KV_FORMATS
from localmoe.inspection import needed
from localmoe.loader.locate import open_source
from localmoe.network import Network
from localmoe.tokenizer import Tokenizer

COMMAND = "from localmoe.cli import main; main()"
AT_THE_PROMPT = b"\x1b[?2004h"  # prompt_toolkit turns on bracketed paste for each line that it reads
SECONDS = 0.01
REST = 128  # tokens of the context for the template, the message and the answer
LONGEST = 120_000  # characters of one argument of a command, on Linux


def anonymous_nbytes(process: int) -> int:
    """Bytes in memory that no file stands behind; 0 once the process has ended."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon:"))


def filling_text(model: Path, tokens: int) -> str:
    """Words that make at most so many tokens of the model."""
    tokenizer = Tokenizer.from_gguf(open_source(model).metadata)
    words = [str(7919 * i % 10007) for i in range(tokens)]
    fitting, beyond = 0, len(words) + 1
    while beyond - fitting > 1:
        middle = (fitting + beyond) // 2
        enough = len(tokenizer.encode_prompt(" ".join(words[:middle]))) <= tokens
        fitting, beyond = (middle, beyond) if enough else (fitting, middle)
    return " ".join(words[:fitting])[:LONGEST]


def chat(arguments: list[str], state: str) -> tuple[int, str]:
    """(the most bytes of anonymous memory, all that was written) of a chat that answers one message."""
    ours, theirs = pty.openpty()
    where = {**os.environ, "XDG_STATE_HOME": state, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    command = [sys.executable, "-c", COMMAND, "chat", *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=where)
    os.close(theirs)
    written, sent, most = b"", 0, 0
    while process.poll() is None:
        most = max(most, anonymous_nbytes(process.pid))
        if select([ours], [], [], SECONDS)[0]:
            try:
                written += os.read(ours, 65536)
            except OSError:  # the other end is closed
                process.wait()
        if written.count(AT_THE_PROMPT) > sent:
            sent += 1
            os.write(ours, b"hello\r" if sent == 1 else b"\x04")  # Ctrl+D
    os.close(ours)
    text = written.decode(errors="replace")
    if process.returncode or sent < 2:
        sys.exit(f"the chat failed: {text[-500:]}")
    return most, text


def report(model: Path, asked: int | None, threads: int, kv: str) -> str:
    network = Network(open_source(model))
    context = asked or min(network.trained_context, 1024)
    arguments = [str(model), "--context", str(context), "--threads", str(threads), "--kv", kv, "--temperature", "0"]
    if not network.source.metadata.get("tokenizer.chat_template"):
        arguments += ["--template", "chatml"]
    with tempfile.TemporaryDirectory() as state:
        chat([*arguments, "--max-tokens", "1"], state)
        filling = ["--max-tokens", "0", "--system", filling_text(model, context - REST)]
        most, written = chat([*arguments, *filling], state)
    wanted = needed(network, context, kv)
    parts = [wanted.cache, wanted.working, wanted.vocabulary, wanted.python]
    sizes = " + ".join(f"{nbytes / 1e6:.1f}" for nbytes in parts)
    remark = "" if f"context of {context} tokens is full" in written else " (the answer ended before the context)"
    figures = f"{wanted.nbytes / 1e6:9.1f} {most / 1e6:9.1f} {most / wanted.nbytes:6.3f}"
    return f"{model.name:24} {context:6d} {figures}   {sizes}{remark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--context", type=int, help="tokens; by default 1024, or those of the model if fewer")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv", default="f16", choices=list(KV_FORMATS))
    flags = parser.parse_args()
    print("MB                      context predicted      peak  ratio   cache + working + vocabulary + Python")
    for model in flags.models:
        print(report(model, flags.context, flags.threads, flags.kv), flush=True)


if __name__ == "__main__":
    main()
