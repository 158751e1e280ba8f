"""Check a written checkpoint: a clean process loads it as a user would, and its logits must be the worker's.

    python -m worker.export.verify FOLDER REFERENCE.safetensors --json

REFERENCE holds `input_ids` int64 (n, L) and `logits` float32 (n, L, vocab), or `pixel_values` float32 (n, C, H,
W) and `logits` float32 (n, classes) as one batch of them gives; of a diffusion pipeline `latents` and predictions
`logits`, float32 (steps, n, C, H, W). Exit status 0: they agree; 1: they do not, or the checkpoint does not load
with every tensor in its place.

Loaders: onnx: ONNX Runtime; compressed-tensors: stock transformers; nothing of ours is imported for either.
quantry: transformers after `import quantry`. gptq and gguf: their stock loaders are not part of a worker (and
transformers drops biases from GGUF files), so `quantry.unpack` reads them into the stock model.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from worker.errors import OutOfMemory, VerificationError

# Largest difference of a logit that is put down to rounding, as a share of the logits' root mean square.
TOLERANCE = 1e-3
# A value on the edge between two codes may fall to the other one: in another runtime's arithmetic, and in one sample
# of a step of a pipeline. A parameter that is wrong in a step shows in all its samples.
EDGE = 0.1
TOLERANCES = {"onnx": EDGE}
LOADERS = {
    "onnx": "onnxruntime",
    "compressed-tensors": "transformers, compressed-tensors",
    "quantry": "transformers, import quantry",
    "gptq": "quantry.unpack, transformers (optimum and gptqmodel are not used)",
    "gguf": "quantry.unpack, transformers (whose own GGUF reader drops biases)",
}
_RELOAD = Path(__file__).with_name("reload.py")
_ROOT = Path(__file__).resolve().parents[2]


def verify(
    folder: Path,
    format: str,
    reference: Path,
    *,
    tolerance: float | None = None,
    threads: int | None = None,
) -> dict[str, float | str]:
    """Reload `folder` in a clean process and compare.

    tolerance: share of the rms logit; None: that of the format. In a pipeline, every step must have a sample within it
    (relative_difference_of_steps), and the other samples may be off by EDGE.
    Returns: loader, max_abs_difference, relative_difference (of the rms logit), argmax_agreement, tokens or images.
    Raises: VerificationError saying what the clean process saw.
    """
    tolerance = TOLERANCES.get(format, TOLERANCE) if tolerance is None else tolerance
    result = _reload(folder, format, reference, threads)
    if "error" in result:
        raise VerificationError(f"the checkpoint ({format}) does not load cleanly: {result['error']}")
    if result.get("relative_difference_of_steps", float("inf")) <= tolerance:
        tolerance = max(tolerance, EDGE)
    if not result["relative_difference"] <= tolerance:
        raise VerificationError(
            f"the reloaded checkpoint ({format}) computes logits that differ by "
            f"{result['max_abs_difference']:.3g} ({result['relative_difference']:.3g} of their rms, "
            f"allowed {tolerance:g})"
        )
    loader = "diffusers, quantry.load" if "steps" in result else LOADERS[format]
    return {"loader": loader, **result}


def _reload(folder: Path, format: str, reference: Path, threads: int | None) -> dict[str, Any]:
    """The line of JSON that `reload.py` prints. Raises VerificationError if it prints none."""
    # -P: the folder of the script, whose modules have names such as compressed_tensors, stays off the path
    command = [sys.executable, "-P", str(_RELOAD), str(folder), str(reference), format]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_ROOT), environment.get("PYTHONPATH"))))
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment
    )
    try:
        result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        if done.returncode == -signal.SIGKILL:
            raise OutOfMemory(
                "the process that reloads the checkpoint was killed, most likely for memory: it holds the whole "
                "model in float32; use a worker with more memory"
            ) from error
        tail = done.stderr.strip().splitlines()[-1:] or ["it printed nothing"]
        raise VerificationError(
            f"the process that reloads the checkpoint ended with status {done.returncode}: {tail[0]}"
        ) from error
    return result


def format_of(folder: Path) -> str:
    """The format that config.json names; GGUF is told by its file. Raises VerificationError."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise VerificationError(f"{folder} is not a checkpoint: {error}") from error
    method = config.get("quantization_config", {}).get("quant_method")
    if method in LOADERS:
        return str(method)
    for suffix in ("gguf", "onnx"):
        if any(folder.glob(f"*.{suffix}")):
            return suffix
    raise VerificationError(
        f"{folder}: quantization {method!r} of its config.json is none of {sorted(LOADERS)}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker.export.verify")
    parser.add_argument("folder", type=Path)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--format", choices=sorted(LOADERS), help="default: what the folder says")
    parser.add_argument("--tolerance", type=float, help="share of the rms logit; default: the format's")
    parser.add_argument("--json", action="store_true", help="one line of JSON instead of text")
    options = parser.parse_args()
    try:
        form = options.format or format_of(options.folder)
        result: dict[str, Any] = verify(options.folder, form, options.reference, tolerance=options.tolerance)
    except VerificationError as error:
        result = {"error": str(error)}
    print(
        json.dumps(result) if options.json else "\n".join(f"{key}: {value}" for key, value in result.items())
    )
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main())
