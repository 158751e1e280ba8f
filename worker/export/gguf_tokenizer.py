"""The tokenizer of a checkpoint in GGUF's terms, read from tokenizer.json and tokenizer_config.json.

Two kinds exist in the Llama family: sentencepiece-like BPE with byte fallback ("llama"), and byte-level BPE
("gpt2"), for which llama.cpp splits text by a rule that the file names. A rule it has no name for is refused:
it would tokenize otherwise than the model was trained, without a word.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from worker.errors import ExportError

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
_ROLES = {"bos": "bos_token", "eos": "eos_token", "unk": "unk_token", "pad": "pad_token"}


@dataclass(frozen=True)
class Vocabulary:
    """`model`: "llama" or "gpt2". `pre`: llama.cpp's name of the splitting rule. Lists are by token id."""

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    chat_template: str | None


def read_vocabulary(source: Path, size: int) -> Vocabulary:
    """Read the tokenizer of `source`, padded with unused tokens to `size`, the rows of the embedding.

    Raises: ExportError where GGUF cannot say what the tokenizer does.
    """
    file = source / "tokenizer.json"
    if not file.is_file():
        raise ExportError(
            "GGUF holds the tokenizer, and the checkpoint has no tokenizer.json to take it from"
        )
    content = json.loads(file.read_text(encoding="utf-8"))
    settings_file = source / "tokenizer_config.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8")) if settings_file.is_file() else {}
    model = content["model"]
    if model.get("type") != "BPE":
        raise ExportError(f"GGUF export knows BPE tokenizers, and tokenizer.json is {model.get('type')}")
    kind, pre = ("llama", "default") if model.get("byte_fallback") else ("gpt2", _rule(content))
    by_id = {number: token for token, number in model["vocab"].items()}
    added = {entry["id"]: entry for entry in content.get("added_tokens", [])}
    by_id.update({number: entry["content"] for number, entry in added.items()})
    if by_id and max(by_id) >= size:
        raise ExportError(f"the tokenizer has token {max(by_id)}, the embedding only {size} rows")
    tokens = [by_id.get(number, f"[PAD{number}]") for number in range(size)]
    unknown = model.get("unk_token")
    types = [_type(number, tokens[number], number in by_id, added, unknown, kind) for number in range(size)]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    special = _special(settings, {token: number for number, token in by_id.items()})
    return Vocabulary(
        kind, pre, tokens, types, merges, special, _adds_bos(content, settings), _template(source, settings)
    )


def write_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    """Put it under llama.cpp's keys."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        writer.add_token_scores(_scores(vocabulary))
    writer.add_token_merges(vocabulary.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for role, number in vocabulary.special.items():
        add[role](number)
    writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.chat_template:
        writer.add_chat_template(vocabulary.chat_template)


def _rule(content: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises ExportError if it has none that we know."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if (
        kinds == ["Digits", "ByteLevel"]
        and steps[0].get("individual_digits")
        and steps[1].get("use_regex", True)
    ):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        name = _SPLITS.get(steps[0].get("pattern", {}).get("Regex", ""))
        if name is not None:
            return name
    raise ExportError(
        f"the tokenizer splits text by {kinds}, a rule that GGUF has no name for; use another format"
    )


def _type(
    number: int, token: str, known: bool, added: dict[int, dict[str, Any]], unknown: str | None, kind: str
) -> int:
    if not known:
        return int(TokenType.UNUSED)
    if token == unknown:
        return int(TokenType.UNKNOWN)
    if number in added:
        return int(TokenType.CONTROL if added[number].get("special") else TokenType.USER_DEFINED)
    if kind == "llama" and len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return int(TokenType.BYTE)
    return int(TokenType.NORMAL)


def _scores(vocabulary: Vocabulary) -> list[float]:
    """llama.cpp joins the pair of highest score first: minus the rank of a token's first merge."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(vocabulary.merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    never = len(vocabulary.merges)
    return [-float(ranks.get(token, never)) for token in vocabulary.tokens]


def _special(settings: dict[str, Any], ids: dict[str, int]) -> dict[str, int]:
    found = {}
    for role, key in _ROLES.items():
        token = settings.get(key)
        text = token.get("content") if isinstance(token, dict) else token
        if text in ids:
            found[role] = ids[text]
    return found


def _adds_bos(content: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether encoding puts the first special token before a text."""
    if "add_bos_token" in settings:
        return bool(settings["add_bos_token"])
    processor = content.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    singles = [step["single"] for step in steps if step.get("type") == "TemplateProcessing"]
    return any(single and "SpecialToken" in single[0] for single in singles)


def _template(source: Path, settings: dict[str, Any]) -> str | None:
    file = source / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = settings.get("chat_template")
    return template if isinstance(template, str) else None
