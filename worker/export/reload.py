"""Run by `verify` as a script in a clean process: load a checkpoint as a user would and compare its logits.

    python -P reload.py FOLDER REFERENCE.safetensors FORMAT

Prints one line of JSON: the figures, or {"error": ...}. Imports nothing of ours unless a user of the format
has to.
"""

import importlib
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def compare(folder: Path, format: str, reference: Path) -> dict[str, Any]:
    """Load, run and measure; in the clean process. Raises whatever the loader raises."""
    torch = importlib.import_module("torch")
    tensors = importlib.import_module("safetensors.torch").load_file(reference)
    if "latents" in tensors:
        with importlib.import_module("safetensors").safe_open(reference, framework="pt") as file:
            call = json.loads(file.metadata()["call"])
        return _compare_pipeline(folder, tensors, call)
    images = "pixel_values" in tensors
    model = _load(folder, format, images)
    wanted = tensors["logits"].float()
    square, worst, agree = 0.0, 0.0, 0
    with torch.no_grad():
        for got, logits in _forwards(model, tensors):
            difference = (got.float() - logits).abs().max()
            if not torch.isfinite(difference):
                raise ValueError("the reloaded checkpoint computes NaN or infinity")
            worst = max(worst, float(difference))
            square += float(logits.double().pow(2).sum())
            agree += int((got.argmax(-1) == logits.argmax(-1)).sum())
    count = wanted.numel() // wanted.shape[-1]
    rms = (square / wanted.numel()) ** 0.5
    return {
        "max_abs_difference": worst,
        "relative_difference": worst / rms if rms else worst,
        "argmax_agreement": agree / count,
        "images" if images else "tokens": count,
    }


def _forwards(model: Any, tensors: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """(logits computed, logits wanted): images in one batch, as they were given; texts one by one."""
    wanted = tensors["logits"].float()
    if callable(getattr(model, "get_inputs", None)):  # a session of ONNX Runtime
        found = model.run(["logits"], {"pixel_values": tensors["pixel_values"].numpy()})[0]
        yield importlib.import_module("torch").from_numpy(found), wanted
        return
    if "pixel_values" in tensors:
        yield model(pixel_values=tensors["pixel_values"]).logits, wanted
        return
    for ids, logits in zip(tensors["input_ids"], wanted, strict=True):
        yield model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0], logits


def _compare_pipeline(folder: Path, tensors: dict[str, Any], call: dict[str, Any]) -> dict[str, Any]:
    """What a diffusion pipeline predicts at every step, (steps, samples, C, H, W), and a whole run with `call`."""
    torch = importlib.import_module("torch")
    pipeline = importlib.import_module("quantry").load(folder)
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    wanted = tensors["logits"].double()
    steps = len(wanted)
    pipeline.scheduler.set_timesteps(steps)
    given = {name.removeprefix("given."): t for name, t in tensors.items() if name.startswith("given.")}
    with torch.no_grad():
        found = [
            denoiser(latents, timestep=time.expand(len(latents)), **given, return_dict=False)[0].double()
            for latents, time in zip(tensors["latents"], pipeline.scheduler.timesteps, strict=True)
        ]
    differences = (torch.stack(found) - wanted).abs().flatten(2).amax(-1)  # (steps, samples)
    if not torch.isfinite(differences).all():
        raise ValueError("the reloaded pipeline predicts NaN or infinity")
    rms = wanted.square().mean().sqrt()
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    pictures = pipeline(**call, generator=generator).images
    return {
        "max_abs_difference": float(differences.max()),
        "relative_difference": float(differences.max() / rms),
        "relative_difference_of_steps": float(differences.amin(1).max() / rms),
        "steps": steps,
        "samples": wanted.shape[1],
        "pictures": len(pictures),
    }


def _load(folder: Path, format: str, images: bool) -> Any:
    """The model in float32. Raises ValueError for missing or unexpected tensors."""
    torch = importlib.import_module("torch")
    if format in ("gptq", "gguf"):
        return importlib.import_module("quantry.checkpoint").load(folder, dtype=torch.float32).eval()
    if format == "quantry":
        importlib.import_module("quantry")
    elif "quantry" in sys.modules:
        raise RuntimeError("quantry must not have a hand in loading this format")
    if format == "onnx":
        return _session(next(folder.glob("*.onnx")))
    transformers = importlib.import_module("transformers")
    auto = transformers.AutoModelForImageClassification if images else transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[kind]:
            raise ValueError(
                f"{len(info[kind])} {kind.replace('_', ' ')}, such as {min(map(str, info[kind]))}"
            )
    return model.eval()


def _session(file: Path) -> Any:
    """A session that multiplies 4-bit weights by float32 inputs where these have no grid."""
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])


def main(folder: str, reference: str, format: str) -> int:
    try:
        result = compare(Path(folder), format, Path(reference))
    except Exception as error:  # noqa: BLE001  (whatever a loader raises is the finding)
        traceback.print_exc()
        result = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(result))
    return 1 if "error" in result else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
