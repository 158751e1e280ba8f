"""Small real checkpoints of every family: random weights, a character tokenizer, the layout of transformers."""

from __future__ import annotations

import inspect
import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import quantry.cifar_resnet  # noqa: F401  (registers it)
from quantry.vision import VISION_FAMILIES

CHARACTERS = "\n !\"'(),-.:;?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVW"
_SMALL = {"vocab_size": 67, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
_LLAMA = {**_SMALL, **_HEADS, "pad_token_id": None}
_OPT = {
    "vocab_size": 67,
    "hidden_size": 32,
    "ffn_dim": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "opt": {"model_type": "opt", **_OPT},
    "opt-post-ln": {"model_type": "opt", **_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16},
    "opt-no-bias": {"model_type": "opt", **_OPT, "enable_bias": False},
    "llama": {"model_type": "llama", **_LLAMA},
    "mistral": {"model_type": "mistral", **_LLAMA, "sliding_window": 16, "head_dim": 12},
    "qwen2": {"model_type": "qwen2", **_LLAMA, "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", **_LLAMA, "head_dim": 16},
    "gemma": {"model_type": "gemma", **_LLAMA, "head_dim": 16, "pad_token_id": 0},
    "gemma2": {"model_type": "gemma2", **_LLAMA, "head_dim": 16, "pad_token_id": 0, "sliding_window": 16},
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_LLAMA,
        "head_dim": 16,
        "pad_token_id": 0,
        "sliding_window": 16,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": 67,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 64,
    },
    "gpt_neox": {"model_type": "gpt_neox", **_SMALL, "num_attention_heads": 4, "max_position_embeddings": 64},
    "gpt_neox-sequential": {
        "model_type": "gpt_neox",
        **_SMALL,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "use_parallel_residual": False,
    },
}

_IMAGES = {"image_size": 16, "num_channels": 3, "num_labels": 5}
_VIT = {
    **_IMAGES,
    "patch_size": 4,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}
CLASSIFIERS: dict[str, dict[str, Any]] = {
    "vit": _VIT,
    "deit": _VIT,
    "dinov2": {**_VIT, "intermediate_size": None, "mlp_ratio": 2},
    # windows of 2x2 patches, so that the second block of the first stage shifts them
    "swin": {
        **_IMAGES,
        "patch_size": 2,
        "embed_dim": 16,
        "depths": [2, 1],
        "num_heads": [2, 4],
        "window_size": 2,
        "mlp_ratio": 2,
    },
}

CONVNETS: dict[str, dict[str, Any]] = {
    "resnet": {
        **_IMAGES,
        "embedding_size": 8,
        "hidden_sizes": [8, 16],
        "depths": [1, 1],
        "layer_type": "basic",
    },
    "mobilenet_v2": {**_IMAGES, "image_size": 32, "depth_multiplier": 0.1, "classifier_dropout_prob": 0.2},
    "cifar_resnet": {**_IMAGES, "depths": [1, 1], "widths": [8, 16]},
}


def write_convnet(folder: Path, name: str, **changes: Any) -> Path:
    """A model of CONVNETS with the weights that its class starts from, and an image processor."""
    torch.manual_seed(0)
    known = {**CONVNETS[name], **changes}
    model = AutoModelForImageClassification.from_config(CONFIG_MAPPING[name](**known))
    model.save_pretrained(folder)
    write_processor(folder, known["image_size"], known["num_channels"])
    return folder


def write_classifier(folder: Path, name: str, **changes: Any) -> Path:
    """A model of CLASSIFIERS with lively random weights, saved as transformers saves it, with an image processor."""
    torch.manual_seed(0)
    known = {key: value for key, value in {**CLASSIFIERS[name], **changes}.items() if value is not None}
    config = CONFIG_MAPPING[name](**known)
    model = getattr(transformers, VISION_FAMILIES[name].architecture)(config).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * 0.15
        parameter.data = parameter.data + noise if parameter.dim() == 1 else noise
    model.save_pretrained(folder)
    write_processor(folder, known["image_size"], known["num_channels"])
    return folder


def write_processor(folder: Path, side: int, channels: int) -> None:
    """An image processor that resizes to side x side and maps pixels to [-1, 1]."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5] * channels,
        "image_std": [0.5] * channels,
        "size": {"height": side, "width": side},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))


def write_checkpoint(folder: Path, name: str, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A model of ARCHITECTURES with lively random weights, saved as transformers saves it, with a tokenizer."""
    torch.manual_seed(0)
    known = {**ARCHITECTURES[name], "bos_token_id": 1, "eos_token_id": 2, **changes}
    config = CONFIG_MAPPING[known["model_type"]](**known)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():
        noise = torch.randn_like(parameter) * 0.1
        parameter.data = (
            parameter.data + noise if parameter.dim() == 1 else noise * (5 if parameter.shape[0] == 67 else 1)
        )
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def write_tokenizer(folder: Path) -> None:
    """One token a character."""
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{c: i + 4 for i, c in enumerate(CHARACTERS)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.save_pretrained(folder)


def write_text(file: Path, words: int = 3000, seed: int = 0) -> Path:
    """A text without repetitions of any length, in sentences and paragraphs."""
    chance = random.Random(seed)
    text = ""
    for _ in range(words):
        text += "".join(chance.choices("abcdefghijklmnopqrstuvwxyz", k=chance.randint(1, 9)))
        text += chance.choices([" ", ". ", ", ", "\n"], weights=[8, 1, 1, 1])[0]
    file.write_text(text, encoding="utf-8")
    return file


def edit_json(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def next_token(model: Any, token: torch.Tensor, cache: Any) -> tuple[torch.Tensor, Any]:
    """One step of decoding: logits (1, 1, vocabulary) for `token` (1, 1), and the cache after it."""
    renamed = "cache" in inspect.signature(type(model).forward).parameters  # transformers 5.24
    name = "cache" if renamed else "past_key_values"
    with torch.no_grad():
        out = model(input_ids=token, use_cache=True, **{name: cache})
    return out.logits, getattr(out, name)
