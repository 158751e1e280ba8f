"""The dry run on classifiers that transformers itself builds: tensors, bytes, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import factories
import pytest
import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantry.base import SpecError
from quantry.headers import TensorInfo, read_header
from quantry.reports import Estimate
from quantry.requests import JobRequest
from quantry.vision import VISION_FAMILIES, class_count
from quantry.vision_costs import estimate_vision
from quantry.vision_layers import tensor_shapes, tensors_in_memory
from quantry.vision_planning import VisionPlan, plan_vision

IMAGES = {"dataset": {"source": "local", "id": "images.npz"}}
REQUEST: dict[str, Any] = {"model": "a/b", "bits": 4, "method": "uniform", "calibration": IMAGES}


def tiny(name: str, **changes: Any) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """The config and the tensors of a random classifier, by their names in memory."""
    known = {k: v for k, v in {**factories.CLASSIFIERS[name], **changes}.items() if v is not None}
    config = CONFIG_MAPPING[name](**known)
    with torch.device("meta"):
        model = getattr(transformers, VISION_FAMILIES[name].architecture)(config)
    tensors = {key: TensorInfo("F32", tuple(value.shape)) for key, value in model.state_dict().items()}
    return {**config.to_dict(), "architectures": [type(model).__name__]}, tensors


def planned(name: str = "vit", config: dict[str, Any] | None = None, **request: Any) -> VisionPlan:
    found, tensors = tiny(name, **(config or {}))
    body = {**REQUEST, "evaluation": IMAGES, **request}
    return plan_vision(JobRequest(**body).resolve(), found, tensors)


def estimated(plan: VisionPlan, images: int | None, loaded_bytes: int = 0) -> Estimate:
    return estimate_vision(plan, threads=2, cuda=False, evaluation_images=images, loaded_bytes=loaded_bytes)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {}) for name in VISION_FAMILIES),
        *((name, {"qkv_bias": False, "num_labels": 1, "num_channels": 1}) for name in VISION_FAMILIES),
        *((name, {"image_size": [16, 24], "patch_size": [4, 8]}) for name in VISION_FAMILIES),
        ("vit", {"image_size": 18, "num_attention_heads": 5, "num_hidden_layers": 1}),
        ("deit", {"head_dim": 12}),
        ("dinov2", {"use_mask_token": False, "mlp_ratio": 3}),
        ("swin", {"use_absolute_embeddings": True, "window_size": 3, "mlp_ratio": 1.5}),
        ("swin", {"depths": [1, 1, 2], "num_heads": [1, 2, 4], "image_size": 15}),
    ],
)
def test_every_tensor_of_transformers_is_expected(name: str, changes: dict[str, Any]) -> None:
    config, tensors = tiny(name, **changes)
    expected = list(tensor_shapes(VISION_FAMILIES[name], config))
    assert dict(expected) == {key: info.shape for key, info in tensors.items()}
    assert len(dict(expected)) == len(expected)


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_a_config_without_sizes_has_the_defaults_of_transformers(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    with torch.device("meta"):
        model = getattr(transformers, VISION_FAMILIES[name].architecture)(config)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert dict(tensor_shapes(VISION_FAMILIES[name], {"model_type": name})) == expected
    assert class_count({}) == config.num_labels


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_names_on_disk_are_those_in_memory(name: str, tmp_path: Path) -> None:
    factories.write_classifier(tmp_path, name)
    found = read_header(tmp_path / "model.safetensors")
    assert tensors_in_memory(found) == tiny(name)[1]
    assert tensors_in_memory(tiny(name)[1]) == tiny(name)[1]


@pytest.mark.parametrize("name", VISION_FAMILIES)
def test_every_family_plans_its_own_architecture(name: str) -> None:
    config, tensors = tiny(name)
    found = planned(name)
    linear = {key for key, info in tensors.items() if len(info.shape) in (2, 4) and key.endswith(".weight")}
    assert {f"{layer.name}.weight" for layer in found.layers if layer.quantized} == linear
    assert found.parameters == sum(info.numel for info in tensors.values())
    assert found.classes == 5
    with torch.device("meta"):
        model = getattr(transformers, found.family.architecture)(CONFIG_MAPPING[name](**config))
        tokens = model.get_submodule(found.family.base).embeddings(torch.zeros(1, 3, 16, 16))
    hidden = tokens[0] if isinstance(tokens, tuple) else tokens
    assert (found.tokens, found.stream, found.pixels) == (hidden.shape[1], hidden[0].numel(), 3 * 16 * 16)


def test_what_swin_computes_itself_may_stand_in_the_file() -> None:
    config, tensors = tiny("swin")
    tensors["swin.encoder.layers.0.blocks.0.attention.self.relative_position_index"] = TensorInfo(
        "I64", (4, 4)
    )
    found = plan_vision(JobRequest(**{**REQUEST, "evaluation": None}).resolve(), config, tensors)
    assert found.parameters == planned("swin").parameters


BLOCK = "vit.layers.1"


@pytest.mark.parametrize(
    ("name", "change", "fault"),
    [
        ("vit", lambda c, t: t.pop(f"{BLOCK}.mlp.fc2.weight"), f"lacks {BLOCK}.mlp.fc2.weight"),
        ("vit", lambda c, t: t.pop(f"{BLOCK}.attention.k_proj.bias"), "lacks .*1.attention.k_proj.bias"),
        ("vit", lambda c, t: t.pop(f"{BLOCK}.layernorm_after.bias"), "lacks .*1.layernorm_after.bias"),
        ("vit", lambda c, t: t.pop("vit.embeddings.cls_token"), "lacks vit.embeddings.cls_token"),
        ("vit", lambda c, t: t.pop("classifier.weight"), "lacks classifier.weight"),
        ("dinov2", lambda c, t: t.pop("dinov2.encoder.layer.0.layer_scale1.lambda1"), "lacks .*lambda1"),
        ("swin", lambda c, t: t.pop("swin.encoder.layers.0.downsample.norm.bias"), "lacks .*norm.bias"),
        (
            "swin",
            lambda c, t: t.pop(
                "swin.encoder.layers.1.blocks.0.attention.relative_position_bias.relative_position_bias_table"
            ),
            "lacks .*bias_table",
        ),
        ("swin", lambda c, t: c.update(depths=[2, 2]), r"lacks swin.encoder.layers.1.blocks.1"),
        ("swin", lambda c, t: c.update(depths=[1, 1]), r"holds swin.encoder.layers.0.blocks.1"),
        ("swin", lambda c, t: c.update(depths=[2, "1"]), "not a positive whole number"),
        ("swin", lambda c, t: c.update(depths=3), "depths and num_heads"),
        ("swin", lambda c, t: c.update(num_heads=[2]), "depths and num_heads"),
        ("swin", lambda c, t: c.update(mlp_ratio=float("inf")), "mlp_ratio is inf"),
        (
            "vit",
            lambda c, t: t.update({f"{BLOCK}.mlp.fc1.weight": TensorInfo("F32", (32, 48))}),
            r"fc1.weight has the shape \[32, 48\], config.json makes it \[48, 32\]",
        ),
        (
            "vit",
            lambda c, t: t.update({f"{BLOCK}.mlp.fc1.weight": TensorInfo("I8", (48, 32))}),
            "fc1.weight is I8",
        ),
        (
            "vit",
            lambda c, t: t.update({"vit.extra.dense.bias": TensorInfo("F32", (32,))}),
            "holds vit.extra",
        ),
        ("vit", lambda c, t: c.update(num_hidden_layers=3), r"says 3 blocks, the checkpoint holds 2 \(0-1\)"),
        ("vit", lambda c, t: c.update(num_hidden_layers=2**31 - 1), "says 2147483647 blocks"),
        ("vit", lambda c, t: c.update(image_size=32), r"position_embeddings has the shape \[1, 17, 32\]"),
        ("vit", lambda c, t: c.update(image_size=[16, 16, 16]), "not a height and a width"),
        ("vit", lambda c, t: c.update(hidden_size=None), "hidden_size is null"),
        ("vit", lambda c, t: c.update(id2label=["a"]), "id2label is not an object"),
        (
            "vit",
            lambda c, t: c["id2label"].update({"5": "x"}),
            r"classifier.weight has .* makes it \[6, 32\]",
        ),
        ("vit", lambda c, t: c.update(quantization_config="x"), "already quantized"),
    ],
)
def test_a_checkpoint_that_is_not_its_configs_is_refused(name: str, change: Any, fault: str) -> None:
    config, tensors = tiny(name)
    change(config, tensors)
    with pytest.raises(SpecError, match=fault) as caught:
        plan_vision(JobRequest(**{**REQUEST, "evaluation": None}).resolve(), config, tensors)
    assert caught.value.path == "model"


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_ptq4vit_is_refused_without_gelu(activation: str) -> None:
    with pytest.raises(SpecError, match=f"hidden_act is `{activation}`") as caught:
        planned(config={"hidden_act": activation}, method="ptq4vit")
    assert caught.value.path == "recipe.1"
    assert planned(config={"hidden_act": activation}).layers
    assert planned(config={"hidden_act": "gelu_new"}, method="ptq4vit").layers


@pytest.mark.parametrize(
    ("classes", "evaluation", "fine"),
    [
        (5, {"metrics": ["top5"]}, False),
        (6, {"metrics": ["top5"]}, True),
        (5, {"metrics": ["top5", "top1"]}, True),
        (1, {"baselines": []}, False),
        (1, {}, True),
    ],
)
def test_metrics_that_can_only_be_perfect_are_refused(
    classes: int, evaluation: dict[str, Any], fine: bool
) -> None:
    request = {"config": {"num_labels": classes}, "evaluation": {**IMAGES, **evaluation}}
    if fine:
        assert planned(**request).classes == classes
        return
    with pytest.raises(SpecError, match=f"of a model with {classes} classes is always") as caught:
        planned(**request)
    assert caught.value.path == "evaluation.metrics"


def test_kept_tensors_are_written_as_float32() -> None:
    config, tensors = tiny("vit")
    half = {name: TensorInfo("F16", info.shape) for name, info in tensors.items()}
    spec = JobRequest(**{**REQUEST, "evaluation": None}).resolve()
    whole, found = plan_vision(spec, config, tensors), plan_vision(spec, config, half)
    assert found.quantized_bytes == whole.quantized_bytes
    assert 2 * found.fp_bytes == whole.fp_bytes


def test_evaluation_images_count_in_memory_and_time() -> None:
    plan = planned()
    few, many = estimated(plan, 1000), estimated(plan, 3000)
    streams = 2000 * (1 + 3) * 4 * plan.pixels
    assert many.peak_memory_bytes - few.peak_memory_bytes >= streams
    assert many.seconds_high > few.seconds_high
    assert few.warnings == many.warnings == plan.warnings
    assert estimated(plan, 1000, 5000).peak_memory_bytes == few.peak_memory_bytes + 5000


def test_samples_bound_the_evaluation_images() -> None:
    plan = planned(evaluation={**IMAGES, "samples": 100})
    answers = [estimated(plan, images) for images in (100, 5000, None)]
    assert len({(x.peak_memory_bytes, x.seconds_high, x.warnings) for x in answers}) == 1
    assert estimated(plan, 50).peak_memory_bytes < answers[0].peak_memory_bytes


def test_an_unknown_number_of_evaluation_images_is_said_to_be_left_out() -> None:
    unknown = estimated(planned(), None)
    assert any("number of evaluation images is not known" in warning for warning in unknown.warnings)
    none = estimated(planned(evaluation=None), None)
    assert not any("not known" in warning for warning in none.warnings)
    assert unknown.peak_memory_bytes == none.peak_memory_bytes


def test_ptq4vit_holds_what_enters_every_block() -> None:
    def peak(step: dict[str, Any]) -> int:
        calibration = {**IMAGES, "samples": 4096}
        recipe = [{"method": "rtn", "bits": 4}, step]
        found, tensors = tiny("vit")
        request = JobRequest.model_validate(
            {"model": "a/b", "recipe": recipe, "calibration": calibration, "evaluation": None}
        )
        plan = plan_vision(request.resolve(), found, tensors)
        return estimated(plan, 0).peak_memory_bytes

    fisher, plain = (peak({"method": "ptq4vit", "bits": 4, "metric": metric}) for metric in ("fisher", "mse"))
    assert fisher > plain == peak({"method": "uniform", "bits": 4})


@pytest.mark.parametrize(("name", "share"), [("vit", 0.01), ("deit", 0.01), ("swin", 0.02)])
def test_a_budget_that_the_fewest_groups_exceed_is_refused(name: str, share: float) -> None:
    def recipe(share: float) -> list[dict[str, Any]]:
        igq = {"method": "igq", "bits": 4, "groups": 8, "allocation": "ilp", "overhead_max": share}
        return [{"method": "rtn", "bits": 4}, igq]

    body = {"bits": None, "method": None, "recipe": None}
    request = {k: v for k, v in REQUEST.items() if k not in body} | {"evaluation": IMAGES}
    found, tensors = tiny(name)
    with pytest.raises(SpecError, match=r"2 groups of every operand take") as caught:
        plan_vision(JobRequest(**request, recipe=recipe(share)).resolve(), found, tensors)
    assert caught.value.path == "recipe.1.overhead_max"
    plan_vision(JobRequest(**request, recipe=recipe(50)).resolve(), found, tensors)


def test_biases_of_the_products_take_memory_and_their_size_is_that_of_the_config() -> None:
    form = {"granularity": "position_channel", "targets": "published"}

    def with_levels(*levels: str, name: str = "vit") -> Estimate:
        steps = [{"method": "rtn", "bits": 4}, {"method": "uniform", "bits": 4}]
        steps.append({"method": "bias_compensation", **form, "levels": levels})
        request = JobRequest(model="a/b", recipe=steps, calibration=IMAGES, evaluation=IMAGES)  # type: ignore[arg-type]
        return estimated(plan_vision(request.resolve(), *tiny(name)), 10)

    few, many = with_levels("module"), with_levels("module", "products")
    stored = many.quantized_bytes - few.quantized_bytes
    assert stored > 0
    assert many.peak_memory_bytes - few.peak_memory_bytes == 3 * stored  # float64 sums beside float32 biases
    warned = "sizes are those of config.json's image_size"
    assert not any(warned in warning for warning in many.warnings)
    assert any(warned in warning for warning in with_levels("module", name="dinov2").warnings)


@pytest.mark.parametrize(
    ("changes", "stage"),
    [({"window_size": 9}, "8x8 patches of stage 0"), ({"image_size": [20, 8]}, "5x2 patches of stage 1")],
)
def test_a_swin_with_a_window_that_is_wider_than_its_map_is_refused(
    changes: dict[str, Any], stage: str
) -> None:
    """Its bias has the size of the window and its attention that of the map: transformers itself does not run it."""
    with pytest.raises(SpecError, match=f"window_size . is more than the {stage}") as caught:
        planned("swin", config={"window_size": 3, **changes})
    assert caught.value.path == "model"
