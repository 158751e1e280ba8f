"""The block sweep on tiny models of every family: same bits however it is run, and what it reports is true."""

import io
import json
from pathlib import Path

import factories
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from quantry.contract import Evaluation, JobSpec, ModelRef
from quantry.recipe import BiasCompensationStep, GptqStep, RtnStep, Step
from worker.block import install
from worker.calibration import walk
from worker.calibration.hooks import layer_input
from worker.calibration.statistics import InputStatistics
from worker.calibration.store import BlockStore
from worker.calibration.streams import Stream
from worker.metrics.quality import PerplexityJudge, full_precision
from worker.models.causal_lm import CausalLM
from worker.progress import Progress
from worker.steps import WEIGHT_STEPS, WeightResult
from worker.sweep import BlockSweep, SweepResult

GPTQ = GptqStep(bits=3, group_size=16)
BIAS = BiasCompensationStep()


def windows(seed: int, count: int = 12, length: int = 32) -> torch.Tensor:
    return torch.randint(4, 67, (count, length), generator=torch.Generator().manual_seed(seed))


def sweep(folder: Path, store: Path, *recipe: Step, evaluate: bool = True) -> tuple[BlockSweep, SweepResult]:
    model = CausalLM(folder, device=torch.device("cpu"), dtype=torch.float32)
    spec = JobSpec(
        model=ModelRef(source="local", id=str(folder)),
        recipe=recipe,
        evaluation=Evaluation() if evaluate else None,
        format="quantry",
    )
    out = io.StringIO()
    run = BlockSweep(
        model,
        spec,
        BlockStore(store, "x"),
        Progress(out),
        windows(1),
        windows(2) if evaluate else None,
        PerplexityJudge(model),
    )
    result = run.run()
    assert [json.loads(line)["type"] for line in out.getvalue().splitlines()].count("event") <= 2
    return run, result


def stored(folder: Path) -> dict[str, bytes]:
    """The tensors of every stored block; the reports beside them hold seconds."""
    from safetensors.torch import load_file, save

    return {f.name: save(load_file(f)) for f in sorted(folder.glob("block-*"))}


@torch.no_grad()
def stock_perplexity(folder: Path, run: BlockSweep) -> float:
    """The same network put together from stock transformers and the stored integers."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    for name, tensor in run.model.kept():
        model.get_parameter(name).copy_(tensor)
    for name, layer in run.store.layers(run.model):
        linear = model.get_submodule(name)
        weight = layer.weight.dequantize()
        linear.weight.copy_(weight.T if run.model.family.transposed else weight)
        if layer.bias is not None:
            linear.bias = nn.Parameter(layer.bias)
    logits = model(input_ids=windows(2), use_cache=False).logits[:, :-1].flatten(0, 1)
    return float(cross_entropy(logits, windows(2)[:, 1:].flatten()).exp())


@pytest.mark.parametrize("name", factories.ARCHITECTURES)
def test_reported_perplexity_is_that_of_the_stored_network(name: str, tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", name)
    run, result = sweep(folder, tmp_path / "store", GPTQ, BIAS)
    assert result.perplexity["quantized"] == pytest.approx(stock_perplexity(folder, run), rel=1e-4)
    assert {"fp", "rtn", "quantized"} == set(result.perplexity)
    assert len(result.layers) == 2 * len(run.model.family.linears)
    for layer in result.layers:
        assert layer.relative_mse is not None
        assert layer.relative_mse_rtn is not None
        assert 0 < layer.relative_mse < 1
    ours = sum(layer.relative_mse or 0 for layer in result.layers)
    assert ours < sum(layer.relative_mse_rtn or 0 for layer in result.layers)


PUBLISHED = BIAS.model_copy(update={"targets": "published"})


@pytest.mark.parametrize(
    "recipe", [(GPTQ, BIAS), (GPTQ, PUBLISHED), (RtnStep(bits=4),), (RtnStep(bits=4), BIAS)]
)
def test_a_sweep_that_died_goes_on_with_the_same_bits(recipe: tuple[Step, ...], tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", "llama")
    _, whole = sweep(folder, tmp_path / "whole", *recipe)
    sweep(folder, tmp_path / "died", *recipe)
    (tmp_path / "died" / "block-00001.safetensors").unlink()
    (tmp_path / "died" / "block-00001.part").write_bytes(b"half a block")

    _, resumed = sweep(folder, tmp_path / "died", *recipe)

    assert stored(tmp_path / "died") == stored(tmp_path / "whole")
    assert resumed.perplexity == whole.perplexity
    kept = BlockStore(tmp_path / "died", "x").load(0, torch.device("cpu"))
    assert resumed.cost.wall_s > kept.wall_s > 0  # the first attempt's seconds are counted, too


def test_another_fingerprint_starts_over(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", "llama")
    sweep(folder, tmp_path / "store", GPTQ)
    assert BlockStore(tmp_path / "store", "x").finished() == 2
    assert BlockStore(tmp_path / "store", "y").finished() == 0


@pytest.mark.parametrize("name", sorted(factories.ARCHITECTURES))
def test_every_passage_through_a_block_gives_the_same_bits(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", name)
    sweep(folder, tmp_path / "halves", GPTQ, BIAS)
    monkeypatch.setattr(CausalLM, "halves", None)
    sweep(folder, tmp_path / "walk", GPTQ, BIAS)
    monkeypatch.setattr(walk, "WALK_SHARE", float("inf"))  # no memory to walk in
    sweep(folder, tmp_path / "rerun", GPTQ, BIAS)
    assert stored(tmp_path / "halves") == stored(tmp_path / "walk") == stored(tmp_path / "rerun")


def layer_inputs(run: BlockSweep, block: nn.Module, name: str, *, embeddings_kept: bool) -> Tensor:
    """What a layer of block 0 is given on the calibration windows, float64 (tokens, columns).

    embeddings_kept: with the embeddings of the checkpoint, not of the artifact.
    """
    with full_precision(run.model, embeddings_kept):
        stream = Stream.embed(run.model, windows(1))
    layer = block.get_submodule(name)
    inputs = [layer_input(block, layer, states, call) for _, states, call in stream.batches(0)]
    return torch.cat([x.flatten(0, -2) for x in inputs]).double()


@torch.no_grad()
@pytest.mark.parametrize("name", ["opt", "gpt2", "llama"])  # biases; weights stored transposed; neither
def test_a_layer_with_fewer_outputs_than_inputs_is_judged_by_its_outputs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E[W x_f x_q^T] of the layer that ends block 0 is what the two networks give, and W (D + H)."""
    seen: list[tuple[list[Tensor], InputStatistics | None]] = []

    def look(weights: list[Tensor], statistics: InputStatistics | None, step: GptqStep) -> WeightResult:
        seen.append((weights, statistics))
        return quantize(weights, statistics, step)

    quantize = WEIGHT_STEPS[GptqStep]
    monkeypatch.setitem(WEIGHT_STEPS, GptqStep, look)
    run, _ = sweep(
        factories.write_checkpoint(tmp_path / "model", name), tmp_path / "store", GPTQ, evaluate=False
    )
    groups = run.model.groups(0)
    assert [found is None or found.cross is None for _, found in seen[: len(groups)]] == [
        False,
        False,
        False,
        True,
    ]
    (weight,), statistics = seen[len(groups) - 1]
    deployed = run.model.block(0)
    for layer, stored_layer in run.store.load(0, torch.device("cpu")).layers.items():
        install(deployed, layer, stored_layer)
    x_q = layer_inputs(run, deployed, groups[-1][0], embeddings_kept=False)
    x_f = layer_inputs(run, run.model.block(0), groups[-1][0], embeddings_kept=True)
    assert not torch.equal(x_f, x_q)
    assert statistics is not None
    assert statistics.outputs is not None
    wanted = weight.double() @ x_f.T @ x_q / len(x_q)
    assert float((statistics.outputs - wanted).norm() / wanted.norm()) < 1e-5


def test_which_blocks_are_taken_half_by_half(tmp_path: Path) -> None:
    def halves(name: str) -> tuple[str, str, str] | None:
        folder = factories.write_checkpoint(tmp_path / name, name)
        return CausalLM(folder, device=torch.device("cpu"), dtype=torch.float32).halves

    assert halves("opt") == ("self_attn_layer_norm", "self_attn", "final_layer_norm")
    assert halves("gemma3_text") == ("input_layernorm", "self_attn", "pre_feedforward_layernorm")
    assert halves("opt-post-ln") is None  # its norms stand behind the additions
    assert halves("gpt_neox") is None  # attention and MLP read the same residual stream
    assert halves("gpt_neox-sequential") is not None


def mean_error(run: BlockSweep) -> float:
    """Rms over channels of the mean error of the last block's output on the calibration windows."""
    report = run.store.load(1, torch.device("cpu")).report
    assert report.mean_error is not None
    return report.mean_error


def test_sequential_compensation_removes_the_mean_error_of_the_deployed_network(tmp_path: Path) -> None:
    """The last layer's output, hence the residual stream, has no mean error on the calibration windows."""
    folder = factories.write_checkpoint(tmp_path / "model", "llama")
    ours, _ = sweep(folder, tmp_path / "sequential", RtnStep(bits=3), BIAS, evaluate=False)
    theirs, _ = sweep(folder, tmp_path / "published", RtnStep(bits=3), PUBLISHED, evaluate=False)
    assert mean_error(ours) < 5e-5  # float32 rounding
    assert mean_error(theirs) > 10 * mean_error(ours)


@pytest.mark.parametrize("targets", ["sequential", "published"])
@pytest.mark.parametrize("granularity", ["channel", "position_channel"])
@pytest.mark.parametrize("name", ["opt", "opt-post-ln", "llama", "gemma2"])
def test_every_mode_of_compensation_runs(name: str, granularity: str, targets: str, tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", name)
    step = BiasCompensationStep.model_validate({"granularity": granularity, "targets": targets})
    run, result = sweep(folder, tmp_path / "store", RtnStep(bits=3), step)
    layers = run.store.load(0, torch.device("cpu")).layers
    for layer in layers.values():
        if granularity == "channel":
            assert layer.bias is not None
            assert layer.position_bias is None
        else:
            assert layer.position_bias is not None
            assert layer.position_bias.shape[0] == 32
    assert result.perplexity["quantized"] < 1e6


def test_plain_gptq_and_all_at_once_run(tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", "llama")
    classic = GptqStep(
        bits=3, target="plain", clip="none", act_order="none", true_sequential=False, refinement=0
    )
    one, _ = sweep(folder, tmp_path / "classic", classic)
    sequential = classic.model_copy(update={"true_sequential": True})
    two, _ = sweep(folder, tmp_path / "sequential", sequential)
    first, second = (run.store.load(0, torch.device("cpu")).layers for run in (one, two))
    assert torch.equal(first["self_attn.q_proj"].weight.codes, second["self_attn.q_proj"].weight.codes)
    assert not torch.equal(first["mlp.down_proj"].weight.codes, second["mlp.down_proj"].weight.codes)
