"""What m6 makes of texts with the ranks of Qwen's vocabulary, beside tiktoken and transformers' Qwen2 tokenizer."""

import base64
import json
import pathlib
import random
import subprocess
import tarfile
import unicodedata

import tiktoken
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter

ROOT = pathlib.Path(__file__).parents[3]
# The 256 bytes and some Qwen tokens.
RANKS = ROOT / "data/src/tokenizer/testdata/qwen_cut.tiktoken"
# tokenization_qwen.py.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205))]
SEED = 1
RANDOM_TEXTS = 10_000
CONVERSATIONS = 1_000
# Of the Qwen2 repository, but for a line end behind the last turn, too, as in the published tokenizers.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
)
IGNORED = -100
# What random texts are made of, beside any character: what the pattern treats apart, and what normalisation changes.
PIECES = [
    " ", "\t", "\r", "\n", "\r\n", "\u00a0", "\u0085", "\u2028", "\u3000", "\ufeff", "\u200b", "0", "7", "٣", "Ⅷ", "½", "²",
    "'s", "'LL", "'ſ", "’ve", "word", "Wort", "слово", "字", "詞語", "한국어", "한", "ไทย", "हिन्दी", "\u0301", "\u0323", "e",
    "é", "Å", "ﬁ", "豈", "!", "...", "。", "_", "<|endoftext|>", "<|im_start|>", "🙂", "👩‍👩‍👧", "👍🏽", "🇨🇳", "❤️", "1️⃣",
]


def read_ranks(path):
    """Rank of each token."""
    lines = path.read_text(encoding="ascii").splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def captions():
    """The texts in the data set of the repository."""
    for path in sorted((ROOT / "datasets/emoji").glob("*.tar")):
        with tarfile.open(path) as shard:
            for member in shard:
                if member.name.endswith(".json"):
                    yield from map(str, json.load(shard.extractfile(member)).values())


def lines(path):
    """Those of a file, or what the repository has of texts where none is named."""
    if path is None:
        yield from dict.fromkeys(captions())
    for path in [path] if path else [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        yield from path.read_text(encoding="utf-8").splitlines()


def random_texts():
    """Texts of any characters, of pieces that are treated apart, and of both, with long runs of one of them."""
    numbers = random.Random(SEED)
    any_character = lambda: chr(numbers.choice([numbers.randrange(0xD800), numbers.randrange(0xE000, 0x110000)]))
    some_piece = lambda: numbers.choice(PIECES)
    for _ in range(RANDOM_TEXTS):
        draws = numbers.choice([[any_character], [some_piece], [any_character, some_piece]])
        runs = numbers.choices([1, 2, 3, 100], [60, 20, 10, 1], k=numbers.randrange(1, 40))
        yield "".join(numbers.choice(draws)() * run for run in runs)


def conversations(texts):
    """Turns of texts that do not begin with white space, some with a system's before them."""
    numbers = random.Random(SEED)
    contents = [text for text in texts if text and not text[0].isspace()]
    for _ in range(CONVERSATIONS):
        roles = ["system"] * numbers.randrange(2) + ["user", "assistant"] * numbers.randrange(1, 4)
        yield [{"role": role, "content": numbers.choice(contents)} for role in roles]


def learned(ids, start, end, assistant):
    """Labels of a conversation's ids: those of Qwen's finetune.py."""
    labels, place = [], 0
    while place < len(ids):
        stop = ids.index(end, place)
        role = len(assistant) + 1 if ids[place + 1 :][: len(assistant)] == assistant else stop - place - 1
        labels += [start, *[IGNORED] * role, *ids[place + 1 + role : stop + 2]]
        place = stop + 2
    return labels


def encoded_by_m6(m6, ranks, texts, work, *options):
    """Ids of each text."""
    file = work / "texts.jsonl"
    file.write_text("".join(json.dumps(text) + "\n" for text in texts), encoding="utf-8")
    output = subprocess.check_output([m6, "tokenizer", "encode", ranks, file, "--json", *options])
    return [json.loads(line)["tokens"] for line in output.splitlines()]


def chats_by_m6(m6, ranks, chats, work):
    """Tokens and labels of each conversation."""
    file = work / "chats.jsonl"
    file.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    output = subprocess.check_output([m6, "tokenizer", "chat", ranks, file, "--json"])
    return [json.loads(line) for line in output.splitlines()]


def qwen2_tokenizer(ranks, special):
    """transformers' tokenizer with these ranks, and ids of special tokens."""
    converter = TikTokenConverter()
    converter.load_tiktoken_bpe = lambda _: ranks
    vocab, merges = converter.extract_vocab_merges_from_model(None)
    tokenizer = Qwen2Tokenizer(vocab=vocab | special, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    return tokenizer


def differences(texts, found, expected):
    """Texts of which other ids are made."""
    for text, own, other in zip(texts, found, expected, strict=True):
        if own != other:
            yield f"{text!r} is {own}, expected {other}"


def comparisons(m6, path, texts, work):
    """What is compared, and what differs there."""
    path = path or RANKS
    ranks = read_ranks(path)
    special = {name: max(ranks.values()) + place for place, name in enumerate(SPECIAL, 1)}
    reference = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
    qwen2 = qwen2_tokenizer(ranks, special)
    for kind, texts in [("lines", list(lines(texts))), ("random texts", list(random_texts()))]:
        found = encoded_by_m6(m6, path, texts, work)
        expected = [reference.encode_ordinary(unicodedata.normalize("NFC", text)) for text in texts]
        yield f"{len(texts)} {kind}, tiktoken", differences(texts, found, expected)
        expected = [qwen2(text, split_special_tokens=True).input_ids for text in texts]
        yield f"{len(texts)} {kind}, transformers", differences(texts, found, expected)
    found = encoded_by_m6(m6, path, texts, work, "--special")
    expected = [reference.encode(unicodedata.normalize("NFC", text), allowed_special="all") for text in texts]
    yield f"{len(texts)} random texts with special tokens, tiktoken", differences(texts, found, expected)
    # Names of special tokens in a content are text to us alone.
    plain = [text for text in texts if "<|" not in text]
    chats = list(conversations(plain))
    found = chats_by_m6(m6, path, chats, work)
    expected = [
        qwen2.apply_chat_template(chat, chat_template=CHAT_TEMPLATE, tokenize=True, return_dict=False) for chat in chats
    ]
    tokens = [chat["tokens"] for chat in found]
    yield f"{len(chats)} conversations, transformers", differences(chats, tokens, expected)
    start, end = special["<|im_start|>"], special["<|im_end|>"]
    assistant = reference.encode_ordinary("assistant")
    expected = [learned(ids, start, end, assistant) for ids in expected]
    labels = [chat["labels"] for chat in found]
    yield f"{len(chats)} conversations, labels of finetune.py", differences(chats, labels, expected)
