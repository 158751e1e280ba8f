"""The bundled models, text and images: found by name, whole, without leaks, and as good as their cards say."""

import hashlib
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline
from safetensors import safe_open
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoTokenizer,
)

from quantry.bundled import (
    BUNDLED_MODELS,
    BUNDLED_TEXTS,
    NotBundledError,
    bundled_images,
    bundled_model,
    bundled_text,
)

ROOT = Path(__file__).parents[2]
MODEL = "bundled/opt-tiny"
TEXT = "bundled/pydoc"
CLASSIFIER = "bundled/vit-tiny"
IMAGES = "bundled/digits"


def paragraphs(text: str) -> list[str]:
    return text.strip().split("\n\n")


def word_runs(text: str, length: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + length]) for i in range(len(words) - length + 1)}


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(
        NotBundledError,
        match=r"no bundled model 'bundled/gpt'; there is bundled/ddpm-tiny, bundled/opt-tiny, bundled/vit-tiny",
    ):
        bundled_model("bundled/gpt")
    with pytest.raises(KeyError, match="no bundled text 'bundled/wiki'; there is bundled/pydoc"):
        bundled_text("bundled/wiki", "test")
    with pytest.raises(KeyError, match=r"no split of bundled/pydoc 'dev'; there is all, test, train"):
        bundled_text(TEXT, "dev")
    with pytest.raises(KeyError, match=r"no bundled set of images 'bundled/cats'; there is bundled/digits"):
        bundled_images("bundled/cats")


def test_needs_no_torch() -> None:
    load = f"from quantry.bundled import bundled_text; bundled_text({TEXT!r}, 'test')"
    check = f"import sys; {load}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.parametrize("split", ["train", "test"])
def test_text_is_the_one_of_its_readme(split: str) -> None:
    table = BUNDLED_TEXTS[TEXT][split].with_name("README.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"| {split} |"))
    data = bundled_text(TEXT, split).encode()
    assert f"{len(data):,}" in row
    assert hashlib.sha256(data).hexdigest() in row


def test_all_is_train_and_test() -> None:
    parts = [paragraphs(bundled_text(TEXT, split)) for split in ("train", "test")]
    assert paragraphs(bundled_text(TEXT, "all")) == parts[0] + parts[1]


def test_held_out_text_shares_nothing_with_train() -> None:
    train, test = bundled_text(TEXT, "train"), bundled_text(TEXT, "test")
    assert len(train) > 1_600_000
    assert 0.05 < len(test) / len(train) < 0.08
    assert not set(paragraphs(train)) & set(paragraphs(test))
    known = word_runs(train, 12)
    assert [p for p in paragraphs(test) if not known.isdisjoint(word_runs(p, 12))] == []


def test_sizes_stay_small() -> None:
    texts = sum(path.stat().st_size for path in BUNDLED_TEXTS[TEXT].values())
    model = sum(path.stat().st_size for path in BUNDLED_MODELS[MODEL].iterdir())
    classifier = sum(path.stat().st_size for path in BUNDLED_MODELS[CLASSIFIER].iterdir())
    assert texts < 1_500_000
    assert model < 15_000_000
    assert classifier < 1_200_000
    assert bundled_images(IMAGES).stat().st_size < 60_000


def test_the_diffusion_model_is_small_and_in_float16() -> None:
    file = bundled_model("bundled/ddpm-tiny") / "unet" / "diffusion_pytorch_model.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, framework="pt") as content:
        assert {content.get_slice(name).get_dtype() for name in content.keys()} == {"F16"}  # noqa: SIM118


def test_the_diffusion_model_draws_digits_that_the_classifier_reads() -> None:
    pipeline = DDIMPipeline.from_pretrained(bundled_model("bundled/ddpm-tiny"))
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet.float()
    images = pipeline(
        batch_size=24, num_inference_steps=10, generator=torch.Generator().manual_seed(0), output_type="np"
    )
    classifier = AutoModelForImageClassification.from_pretrained(bundled_model(CLASSIFIER))
    pixels = torch.from_numpy(images.images).permute(0, 3, 1, 2) * 2 - 1
    with torch.no_grad():
        certainty, digits = classifier(pixel_values=pixels).logits.softmax(-1).max(-1)
    assert float(certainty.mean()) > 0.75
    assert len(digits.unique()) >= 6


@pytest.mark.parametrize("name", [MODEL, CLASSIFIER])
def test_weights_are_float16_safetensors(name: str) -> None:
    with safe_open(bundled_model(name) / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118, no mapping


def test_tokenizer_follows_opt() -> None:
    tokenizer = AutoTokenizer.from_pretrained(bundled_model(MODEL))
    ids = tokenizer("Return the object’s name.\n\n    >>> x").input_ids
    assert ids[0] == tokenizer.bos_token_id == tokenizer.eos_token_id == 2
    assert tokenizer.decode(ids[1:]) == "Return the object’s name.\n\n    >>> x"


def test_documented_recipe_gives_the_recorded_perplexity(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "perplexity.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "docs/perplexity.md", "exec"), {})
    measured = float(capsys.readouterr().out)
    recorded = json.loads((bundled_model(MODEL) / "metrics.json").read_text())["perplexity"]
    assert math.isclose(measured, recorded, rel_tol=1e-4)


def test_model_writes_documentation() -> None:
    folder = bundled_model(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = tokenizer("Return True if the", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert len(set(text.split())) > 6  # words, not one word again and again


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_are_those_of_their_readme(split: str) -> None:
    table = bundled_images(IMAGES).with_name("README.md").read_text()
    row = next(line for line in table.splitlines() if line.startswith(f"| {split} |"))
    with np.load(bundled_images(IMAGES), allow_pickle=False) as arrays:
        images, labels = arrays[f"x_{split}"], arrays[f"y_{split}"]
    assert images.dtype == labels.dtype == np.uint8
    assert images.shape == (len(labels), 8, 8)
    assert row.startswith(f"| {split} | {len(labels)} |")
    for array in (images, labels):
        assert hashlib.sha256(array.tobytes()).hexdigest() in row


def test_no_test_image_is_in_train() -> None:
    with np.load(bundled_images(IMAGES), allow_pickle=False) as arrays:
        known = {image.tobytes() for image in arrays["x_train"]}
        assert not any(image.tobytes() in known for image in arrays["x_test"])
        assert all(np.bincount(arrays[f"y_{split}"], minlength=10).min() > 40 for split in ("train", "test"))


def test_the_classifier_is_as_accurate_as_its_card_says() -> None:
    folder = bundled_model(CLASSIFIER)
    model = AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    with np.load(bundled_images(IMAGES), allow_pickle=False) as arrays:
        images, labels = arrays["x_test"], torch.from_numpy(arrays["y_test"])
    pixels = processor(list(images[..., None]), return_tensors="pt", input_data_format="channels_last")
    with torch.no_grad():
        found = (model(**pixels).logits.argmax(-1) == labels).float().mean().item()
    recorded = json.loads((folder / "metrics.json").read_text())["accuracy"]
    assert found == pytest.approx(recorded, abs=0.0021)  # one image, for another way to round
    assert f"{100 * recorded:.1f} %" in (folder / "README.md").read_text()
    assert recorded > 0.95
