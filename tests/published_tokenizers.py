"""The tokenizers of model families as their tokenizer.json has them, written here from the publications.

With a small vocabulary trained on a few lines each can be saved as a directory and as a GGUF file, as the
families' own are. `strings` are texts of the kinds that pre-tokenizers cut differently.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

import gguf
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

GPT2 = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
CL100K = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
QWEN = CL100K.replace("{1,3}", "")
TEKKEN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"""
    r"""|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
O200K = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)
SEED_CODER = (
    r"""(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+"""
    r"""|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


def split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)


def digits_then_gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])


def llama_cpp_default() -> pre_tokenizers.PreTokenizer:
    cuts = [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"]
    return pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(cut), behavior="isolated") for cut in cuts),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@dataclass(frozen=True)
class Family:
    pre_tokenizer: pre_tokenizers.PreTokenizer
    nfc: bool = False
    ignore_merges: bool = False
    bos: bool = False


LLAMA3 = Family(split(CL100K), ignore_merges=True, bos=True)
BYTE_LEVEL = {
    "default": Family(llama_cpp_default()),
    "gpt-2": Family(gpt2()),
    "phi-2": Family(gpt2()),
    "smollm": Family(digits_then_gpt2()),
    "starcoder": Family(digits_then_gpt2()),
    "refact": Family(digits_then_gpt2()),
    "command-r": Family(digits_then_gpt2(), nfc=True),
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": Family(split(CL100K)),
    "dbrx": Family(split(CL100K)),
    "qwen2": Family(split(QWEN), nfc=True),
    "deepseek-r1-qwen": Family(split(QWEN), nfc=True),
    "seed-coder": Family(split(SEED_CODER)),
    "tekken": Family(split(TEKKEN), ignore_merges=True, bos=True),
    "gpt-4o": Family(split(O200K)),
    "llama4": Family(split(O200K)),
}

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and they're 12345 dogs in 2024.",
    "Hello world! hello World!! HELLO  world…  don't, can't, I'LL; we've 3.14159 camelCase Title",
    "def f(x):\n    return x ** 2\n\n\tdone\r\n\n\n1. one\n\n2. two\n        deep    42\n",
    "| a | b |\n|---|---|\n|  10 |   7 |\n== != <= >= -> /* */ // https://example.org/a/b?c=d",
    "Привет мир, 日本語 テキスト, naïve café 🙂🙂 مرحبا بالعالم ١٢٣ größe",
] * 5
SPECIAL = ["<s>", "</s>", "<unk>", "<|start|>", "<｜end▁of▁turn｜>"]
WORDS = ["<think>", "größe", "đem", "日本", "two words"]
"""Added, but not special."""
LOOKED_UP = "zzzz"
"""A word of the vocabulary that no merges lead to."""


@dataclass
class Trained:
    """A family's tokenizer, with a vocabulary of its own."""

    kind: str
    backend: Tokenizer
    tokens: list[str]
    types: list[int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)

    def ids(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def directory(self, path: Path) -> Path:
        path.mkdir()
        self.backend.save(str(path / "tokenizer.json"))
        (path / "config.json").write_text('{"model_type": "llama"}')
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        return path

    def gguf(self, path: Path, **flags: bool) -> Path:
        model = "llama" if self.scores else "gpt2"
        pre = None if self.scores else self.kind
        return write_gguf(
            path, model=model, pre=pre, tokens=self.tokens, types=self.types, merges=self.merges,
            scores=self.scores, flags=flags,
        )  # fmt: skip


def train(kind: str, family: Family) -> Trained:
    """Byte-level BPE over the family's own pieces."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = family.pre_tokenizer
    if family.nfc:
        backend.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    trained = json.loads(backend.to_str())["model"]
    vocab = {**trained["vocab"], LOOKED_UP: len(trained["vocab"])}
    merges = [tuple(pair) for pair in trained["merges"]]
    backend.model = models.BPE(vocab=vocab, merges=merges, ignore_merges=family.ignore_merges)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    backend.add_tokens([AddedToken(word, special=False, normalized=False) for word in WORDS])
    if family.bos:
        bos = [("<s>", backend.token_to_id("<s>"))]
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    tokens = [*sorted(vocab, key=vocab.__getitem__), *SPECIAL, *WORDS]
    types = [1] * len(vocab) + [3] * len(SPECIAL) + [4] * len(WORDS)
    return Trained(kind, backend, tokens, types, [" ".join(pair) for pair in merges])


def train_sentencepiece() -> Trained:
    """As Llama 2's: control tokens, bytes, then pieces whose score is minus their rank."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Metaspace()
    learner.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, show_progress=False))
    trained = json.loads(learner.to_str())["model"]
    pieces = list(dict.fromkeys("".join(pair) for pair in trained["merges"]))
    letters = [token for token in trained["vocab"] if token not in pieces]
    control = ["<unk>", "<s>", "</s>"]
    tokens = [
        *control,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        *letters,
        "<|start|>",
        "<think>",
    ]
    num_pieces = len(pieces) + len(letters)
    scores = [0.0] * 259 + [-float(rank) for rank in range(num_pieces)] + [0.0, 0.0]
    types = [2, 3, 3] + [6] * 256 + [1] * num_pieces + [3, 4]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_extracted_merges(vocab, scores),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in [*control, "<|start|>"]]
    )
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return Trained("llama", backend, tokens, types, scores=scores)


def _extracted_merges(vocab: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first."""
    found = [
        (scores[token_id], token[:at], token[at:])
        for token, token_id in vocab.items()
        for at in range(1, len(token))
        if token[:at] in vocab and token[at:] in vocab
    ]
    found.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def write_gguf(
    path, *, model, pre=None, tokens, types, merges=None, scores=None, flags=None, ids=None
) -> Path:
    """A GGUF with a tokenizer and the smallest of models; `ids` are tokenizer.ggml keys."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_block_count(1)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    if pre is not None:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if merges:
        writer.add_token_merges(merges)
    if scores:
        writer.add_token_scores(scores)
    named = ids or {
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        "unknown_token_id": tokens.index("<unk>"),
    }
    for name, token_id in named.items():
        writer.add_uint32(f"tokenizer.ggml.{name}", token_id)
    for name, value in (flags or {}).items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_PIECES = [
    *[
        "0",
        "1",
        "7",
        "42",
        "123",
        "1234",
        "20240131",
        "3.14159",
        "1,000,000",
        "½",
        "²",
        "١٢٣",
        "१२",
        "Ⅷ",
        "①",
    ],
    *[
        " ",
        "  ",
        "   ",
        "        ",
        "\t",
        "\t\t",
        "\n",
        "\n\n",
        "\n\n\n",
        "\r\n",
        " \n ",
        "\u00a0",
        "\u3000",
        "\u2003",
    ],
    *[
        "hello",
        "Hello",
        "HELLO",
        "world",
        "don't",
        "I'LL",
        "we've",
        "'S",
        "zzzz",
        "zzzzz",
        "camelCase",
        "HTTPServer",
        "naïve",
        "ÉCOLE",
        "Straße",
        "ǅ",
    ],
    *["e\u0301", "a\u0308\u0323", "각", "\u1112\u1161\u11ab", "\u0928\u093f", "ﬁ", "Å", "\u212b"],
    *[
        "日本語",
        "テキスト",
        "你好，世界",
        "안녕하세요",
        "Привет",
        "мир,",
        "مرحبا",
        "بالعالم",
        "שלום",
        "สวัสดี",
        "ꙮ",
    ],
    *[
        "🙂",
        "🙂🙂",
        "👩\u200d👩\u200d👧\u200d👦",
        "🇩🇪",
        "…",
        "—",
        "“quoted”",
        "...",
        "!!",
        "?!",
        "##",
        "--",
        "==",
        "!=",
        "<=",
        "->",
        "//",
        "/*",
        "*/",
        "{}",
        "[]",
        "()",
        "`x`",
        "$5",
        "€7",
        "@me",
        "a_b",
        "x/y",
        "a|b",
        "^~",
    ],
    *[
        "def f(x):\n    return x",
        "\n\n1. one",
        "|  10 |   7 |",
        "x =  7;",
        "http://a.b/c?d=1&e=2\n",
        "\t\t}\r\n",
    ],
    *["\0", "\x01", "\x07", "\x1b[0m", "\x7f", "\x80", "\u200b", "\u200d", "\u202e", "\ufeff", "\ufffd"],
    *[
        "<s>",
        "</s>",
        "<unk>",
        "<|start|>",
        "<|start",
        "<｜end▁of▁turn｜>",
        "<think>",
        "größe",
        "đem",
        "日本",
        "two words",
    ],
    *["▁", "<0x0A>", "Ġ", "Ã©"],
]


def strings(count: int, *, seed: int = 1) -> list[str]:
    """Texts of one to eight pieces each, and now and then a few arbitrary characters."""
    chosen = random.Random(seed)
    return [_string(chosen) for _ in range(count)]


def _string(chosen: random.Random) -> str:
    pieces = chosen.choices(_PIECES, k=chosen.randint(1, 8))
    if chosen.random() < 0.15:
        pieces.append("".join(_character(chosen) for _ in range(chosen.randint(1, 6))))
    return "".join(pieces)


def _character(chosen: random.Random) -> str:
    highest = chosen.choice([0x7F, 0x24F, 0x2FFF, 0xFFFF, 0x1FFFF])
    code = chosen.randint(0, highest)
    return chr(code) if not 0xD800 <= code < 0xE000 else "x"
