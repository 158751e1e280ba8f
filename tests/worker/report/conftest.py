"""Reports to render, with figures as a small OPT and a small ViT give them."""

from __future__ import annotations

import pytest

from quantry.reports import (
    BitOperations,
    BlockReport,
    CostReport,
    LayerReport,
    OperandReport,
    QualityRow,
    Report,
    SizeReport,
)
from quantry.requests import JobRequest

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "fc1", "fc2")


def layer(block: int, name: str, index: int) -> LayerReport:
    error = 0.004 * (1 + 0.6 * block) * (1 + 0.35 * index)
    return LayerReport(
        name=f"model.decoder.layers.{block}.{name}",
        bits=3,
        group_size=64,
        relative_mse=error,
        relative_mse_rtn=error * (2.1 + 0.2 * index),
        sqnr_db=25.0 - 1.7 * block - 0.9 * index,
        mean_error_before=0.011 * (block + 1) * (1 + 0.2 * index),
        mean_error_after=0.0013 * (block + 1),
        damping=0.01 if (block, name) != (2, "fc2") else 0.1,
        warnings=("damping was raised to 0.1 to factorise the Hessian",)
        if (block, name) == (2, "fc2")
        else (),
    )


@pytest.fixture
def report() -> Report:
    blocks = 6
    quality = QualityRow(
        metric="perplexity",
        dataset="bundled/pydoc, test",
        samples=412,
        fp=14.612,
        rtn=19.874,
        quantized=15.981,
    )
    size = SizeReport(
        fp_bytes=9_412_608,
        quantized_bytes=2_913_204,
        effective_bits=3.274,
        quantized_weights=3_538_944,
        added_bias_bytes=0,
    )
    said = {"seconds_low": 18.0, "seconds_high": 55.0, "peak_memory_bytes": 900_000_000}
    return Report(
        job="job_0192f0c1-7a3e-7c1d-9a51-1f2e3d4c5b6a",
        spec=JobRequest(
            model="bundled/opt-tiny", bits=3, correction="bias_compensation", group_size=64
        ).resolve(),
        quality=(quality,),
        size=size,
        layers=tuple(layer(b, name, i) for b in range(blocks) for i, name in enumerate(LINEARS)),
        blocks=tuple(
            BlockReport(
                index=b,
                relative_mse=0.0021 * 1.9**b,
                relative_mse_evaluation=0.0024 * 1.95**b,
                relative_mse_rtn=0.0093 * 2.02**b,
                mean_error=0.0004 * (b + 1),
                seconds=1.7 + 0.1 * b,
            )
            for b in range(blocks)
        ),
        cost=CostReport(
            wall_s=27.4, cpu_s=49.1, peak_rss_bytes=812_000_000, quantize_wall_s=14.2, quantize_cpu_s=26.9
        ),
        estimate={**said, "quantized_bytes": 2_913_204, "effective_bits": 3.274},
        environment={
            "torch": "2.13.0",
            "transformers": "5.23.0",
            "quantry": "0.1.0",
            "python": "3.11.7",
            "processor": "x86_64, 2 threads",
        },
        fingerprint="sha256:5f0c9a3e1b7d48266f1f2b7c0a9be8d3c1a2f4e5d6978812ab34cd56ef7890ab",
        format="compressed-tensors",
        warnings=("2 layers were kept in full precision: lm_head and its tied embedding",),
        verification={
            "loader": "transformers 5.23.0",
            "tokens": 256.0,
            "max_logit_difference": 0.0,
            "status": "equal",
        },
    )


def operand(block: int, place: str, kind: str, quantizer: str, sqnr: float) -> OperandReport:
    summed = kind == "probabilities"
    return OperandReport(
        name=f"vit.layers.{block}.{place}",
        kind=kind,
        bits=4,
        quantizer=quantizer,
        sqnr_db=sqnr - block,
        row_sum_before=0.9412 if summed else None,
        row_sum_after=0.9998 if summed else None,
    )


@pytest.fixture
def vision_report(report: Report) -> Report:
    """An image classifier at 4 bits, weights and activations: three metrics, operands, bit operations."""
    places = (
        ("attention.q_proj.input", "post_norm", "uniform", 21.0),
        ("attention.probabilities", "probabilities", "twin_softmax", 17.5),
        ("mlp.fc2.input", "post_activation", "twin_gelu", 15.2),
    )
    figures = (("top1", 0.9754, 0.6812, 0.9723), ("top5", 0.9991, 0.9214, 0.9993), ("kl", 0.0, 1.25, 0.01234))
    return report.model_copy(
        update={
            "spec": JobRequest(
                model="local:vit", bits=4, method="ptq4vit", correction="softmax_bias"
            ).resolve(),
            "quality": tuple(
                QualityRow(
                    metric=metric, dataset="digits, test", samples=1000, fp=fp, rtn=rtn, quantized=quantized
                )
                for metric, fp, rtn, quantized in figures
            ),
            "operands": tuple(operand(block, *place) for block in range(3) for place in places),
            "bit_operations": BitOperations(base=2.81e11, overhead=7e9),
            "format": "quantry",
        }
    )
