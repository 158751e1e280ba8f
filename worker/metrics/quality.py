"""How good the networks are: figures by metric and stream, once the streams have left the last block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from worker.calibration.streams import Stream
from worker.errors import NonFiniteError
from worker.models.causal_lm import CausalLM
from worker.models.network import Network
from worker.progress import Progress

HEAD_TOKENS = 256  # positions whose logits exist at once


class Judge(Protocol):
    """From the evaluation streams, by name, to figures by metric and stream."""

    def __call__(self, streams: Mapping[str, Stream], progress: Progress) -> dict[str, dict[str, float]]: ...


@contextmanager
def full_precision(model: Network, wanted: bool) -> Iterator[None]:
    """What is not quantized as the checkpoint has it, if wanted; else as the artifact stores it."""
    model.use_kept(as_stored=not wanted)
    try:
        yield
    finally:
        model.use_kept(as_stored=True)


@dataclass(frozen=True)
class PerplexityJudge:
    """Perplexity of a language model's streams; see docs/perplexity.md."""

    model: CausalLM

    def __call__(self, streams: Mapping[str, Stream], progress: Progress) -> dict[str, dict[str, float]]:
        total = sum(len(stream.tokens) for stream in streams.values())
        values: dict[str, float] = {}
        passed = 0
        for name, stream in streams.items():

            def tell(done: int, before: int = passed) -> None:
                progress.advance(before + done, total)

            with full_precision(self.model, name == "fp"):
                values[name] = perplexity(self.model, stream, tell)
            passed += len(stream.tokens)
        return {"perplexity": values}


@dataclass(frozen=True)
class ClassifierJudge:
    """top1, top5 and kl of classifiers whose streams hold logits (images, classes).

    kl: mean over images of KL(float || network) of the class probabilities, in nats; needs the float stream.
    """

    labels: Tensor
    metrics: tuple[str, ...]

    def __call__(self, streams: Mapping[str, Stream], progress: Progress) -> dict[str, dict[str, float]]:
        logits = {name: stream.hidden.float().cpu() for name, stream in streams.items()}
        return classifier_figures(logits, self.labels, self.metrics)


def classifier_figures(
    logits: Mapping[str, Tensor], labels: Tensor, metrics: Sequence[str]
) -> dict[str, dict[str, float]]:
    """Figures by metric and network, from the logits (images, classes) of each. Raises NonFiniteError."""
    for name, values in logits.items():
        if not torch.isfinite(values).all():
            raise NonFiniteError(f"the {name} network's logits hold NaN or infinity")
    found: dict[str, dict[str, float]] = {}
    for metric in metrics:
        if metric == "kl":
            if "fp" in logits:
                found["kl"] = {name: divergence(logits["fp"], values) for name, values in logits.items()}
            continue
        top = int(metric.removeprefix("top"))
        if top < next(iter(logits.values())).shape[1]:
            found[metric] = {name: accuracy(values, labels, top) for name, values in logits.items()}
    return found


def accuracy(logits: Tensor, labels: Tensor, top: int) -> float:
    """Share of the images whose label is among the `top` largest logits."""
    best = logits.topk(top, dim=1).indices
    return float((best == labels.unsqueeze(1)).any(1).double().mean())


def divergence(reference: Tensor, logits: Tensor) -> float:
    """Mean KL(reference || logits) in nats over images, for logits (images, classes)."""
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@torch.no_grad()
def perplexity(model: CausalLM, stream: Stream, tell: Callable[[int], None]) -> float:
    """exp(mean negative log-likelihood) over the length - 1 predictions of every window, summed in float64.

    `stream` has left the last block. `tell` hears how many windows are done.
    Raises: NonFiniteError if the likelihood is not finite.
    """
    total, count = 0.0, 0
    for number, (window, states) in enumerate(zip(stream.tokens, stream.hidden, strict=True), 1):
        for low in range(0, len(window) - 1, HEAD_TOKENS):
            high = min(low + HEAD_TOKENS, len(window) - 1)
            logits = model.head(window[None, low:high], states[None, low:high])[0].float()
            targets = window[low + 1 : high + 1].to(logits.device)
            total += float(cross_entropy(logits, targets, reduction="sum"))
            count += high - low
        if number % 8 == 0 or number == len(stream.tokens):
            tell(number)
    if not math.isfinite(total):
        raise NonFiniteError("the model's log-likelihood is NaN or infinite")
    return math.exp(min(total / count, 700.0))
