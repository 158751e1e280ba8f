"""Cut the windows that every side calibrates on and is evaluated with.

usage: python benchmarks/peers/windows.py MODEL CALIBRATION.txt EVALUATION.txt TARGET.safetensors
           [--samples 32] [--length 512] [--evaluation-length 1024] [--evaluation-windows 40]

Both texts are tokenised as docs/perplexity.md says. Calibration windows are spread evenly over the text.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer


def windows(tokenizer: object, file: Path, length: int) -> Tensor:
    """Non-overlapping windows of the text, the tail dropped: (windows, length) int64."""
    ids = tokenizer(file.read_text(encoding="utf-8"), verbose=False).input_ids  # type: ignore[operator]
    stream = torch.tensor(ids)
    return stream[: len(stream) // length * length].view(-1, length)


def main() -> None:
    options = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("model", "calibration", "evaluation", "target"):
        options.add_argument(name, type=Path)
    options.add_argument("--samples", type=int, default=32)
    options.add_argument("--length", type=int, default=512)
    options.add_argument("--evaluation-length", type=int, default=1024)
    options.add_argument("--evaluation-windows", type=int, default=40, help="0: all")
    given = options.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    calibration = windows(tokenizer, given.calibration, given.length)
    evaluation = windows(tokenizer, given.evaluation, given.evaluation_length)
    if len(calibration) < given.samples:
        raise SystemExit(
            f"{given.calibration} has {len(calibration)} windows, {given.samples} were asked for"
        )
    chosen = torch.arange(given.samples) * len(calibration) // given.samples
    evaluation = evaluation[: given.evaluation_windows or None]
    given.target.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"calibration": calibration[chosen].clone(), "evaluation": evaluation.clone()}
    save_file(tensors, given.target)
    print(f"{given.target}: " + ", ".join(f"{name} {tuple(t.shape)}" for name, t in tensors.items()))


if __name__ == "__main__":
    main()
