"""Train the bundled model `bundled/opt-tiny` on the train split of `bundled/pydoc`.

usage: python scripts/train_opt_tiny.py [--target FOLDER] [--cpu-minutes 20]

The architecture is OPT (Zhang et al. 2022, arXiv:2205.01068) at 3.7 million parameters: layer norm before
attention and MLP, ReLU, learned positions, tied embeddings, a bias everywhere, `</s>` before each text. The
tokenizer is a byte-level BPE of 2048 pieces trained on the same split. Forwards run in bfloat16 (autocast),
weights and AdamW in float32, all on one thread. The schedule spans a budget of processor time, so a faster
machine makes a better model; `metrics.json` says what the committed one got. A processor without bfloat16
products is about four times slower.

With glibc, MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 saves a third.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer, processors
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from quantry.bundled import bundled_text

TARGET = Path(__file__).parent.parent / "quantry" / "bundled" / "opt-tiny"
CONTEXT = 256  # positions
VOCABULARY = 2048
BATCH = 8  # windows a step
LEARNING_RATE = 1.5e-3
WARMUP = 200  # steps
START = "</s>"
STARTED_WINDOWS = 0.25  # share of the train windows that begin with </s>, as a prompt does


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE with OPT's conventions: ids 0-3 as there, `</s>` put before every text."""
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [text], vocab_size=VOCABULARY, special_tokens=["<s>", "<pad>", START, "<unk>"], show_progress=False
    )
    bpe._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A {START} $B", special_tokens=[(START, bpe.token_to_id(START))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer,
        bos_token=START,
        eos_token=START,
        unk_token=START,
        pad_token="<pad>",
        model_max_length=CONTEXT,
    )


def tokens(tokenizer: PreTrainedTokenizerFast, text: str) -> Tensor:
    """The text as one string, special tokens as the tokenizer adds them: (tokens,) int64."""
    return torch.tensor(tokenizer(text, verbose=False).input_ids)


def new_model(tokenizer: PreTrainedTokenizerFast) -> OPTForCausalLM:
    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        ffn_dim=1024,
        word_embed_proj_dim=256,
        max_position_embeddings=CONTEXT,
        dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="eager",  # at this size faster than the fused kernel on a processor
    )
    return OPTForCausalLM(config)


def batch(stream: Tensor, start_id: int, random: torch.Generator) -> Tensor:
    """Windows from anywhere in the stream, (BATCH, CONTEXT); some begin with the start token."""
    offsets = torch.randint(0, len(stream) - CONTEXT, (BATCH,), generator=random)
    windows = torch.stack([stream[offset : offset + CONTEXT] for offset in offsets])
    windows[torch.rand(BATCH, generator=random) < STARTED_WINDOWS, 0] = start_id
    return windows


@torch.no_grad()
def perplexity(model: OPTForCausalLM, stream: Tensor, windows: int | None = None) -> float:
    """exp of the mean NLL over non-overlapping windows, the tail dropped; see docs/perplexity.md."""
    model.eval()
    rows = stream[: len(stream) // CONTEXT * CONTEXT].view(-1, CONTEXT)[:windows]
    total = 0.0
    for row in rows:
        logits = model(input_ids=row[None]).logits[0, :-1].float()
        total += cross_entropy(logits, row[1:], reduction="sum").item()
    model.train()
    return math.exp(total / (len(rows) * (CONTEXT - 1)))


def train(model: OPTForCausalLM, stream: Tensor, held_out: Tensor, start_id: int, cpu_minutes: float) -> int:
    """Train in place until the processor time is used up; return the number of steps."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98), fused=True)
    random = torch.Generator().manual_seed(1)
    begin, step = time.process_time(), 0
    model.train()
    while (part := (time.process_time() - begin) / (60 * cpu_minutes)) < 1:
        rate = LEARNING_RATE * min(1.0, (step + 1) / WARMUP) * (0.5 + 0.5 * math.cos(math.pi * part))
        for group in optimizer.param_groups:
            group["lr"] = rate
        x = batch(stream, start_id, random)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=x, use_cache=False).logits
        loss = cross_entropy(logits[:, :-1].float().flatten(0, 1), x[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 400 == 0:
            held = perplexity(model, held_out, windows=24)
            print(
                f"step {step}  {part:.0%}  loss {loss.item():.3f}  held-out (24 windows) {held:.3f}",
                flush=True,
            )
    return step


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options.add_argument("--target", type=Path, default=TARGET)
    options.add_argument("--cpu-minutes", type=float, default=20.0, help="processor time of the training")
    arguments = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    text, test_text = bundled_text("bundled/pydoc", "train"), bundled_text("bundled/pydoc", "test")
    tokenizer = train_tokenizer(text)
    stream, held_out = tokens(tokenizer, text), tokens(tokenizer, test_text)
    model = new_model(tokenizer)
    print(
        f"{model.num_parameters():,} parameters, {len(stream):,} train and {len(held_out):,} held-out tokens"
    )
    steps = train(model, stream, held_out, tokenizer.bos_token_id, arguments.cpu_minutes)

    model.half().save_pretrained(arguments.target)
    tokenizer.save_pretrained(arguments.target)
    model.float()  # the stored weights, computed with in float32
    held = perplexity(model, held_out)
    metrics = {
        "perplexity": held,
        "bits_per_byte": math.log2(held) * len(held_out) / len(test_text.encode()),
        "dataset": "bundled/pydoc, split test",
        "convention": "docs/perplexity.md",
        "window": CONTEXT,
        "windows": len(held_out) // CONTEXT,
        "train_perplexity_first_64_windows": perplexity(model, stream, windows=64),
        "parameters": model.num_parameters(),
        "train_tokens": len(stream),
        "steps": steps,
        "tokens_seen": steps * BATCH * CONTEXT,
        "cpu_minutes": arguments.cpu_minutes,
    }
    (arguments.target / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    main()
