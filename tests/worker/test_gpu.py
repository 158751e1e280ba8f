"""The same code on CUDA: run by `make test-gpu` where there is a device."""

from pathlib import Path

import factories
import pytest
import torch

from quantry.contract import Evaluation, JobSpec, ModelRef
from quantry.recipe import BiasCompensationStep, GptqStep
from worker.calibration.store import BlockStore
from worker.metrics.quality import PerplexityJudge
from worker.models.causal_lm import CausalLM
from worker.progress import Progress
from worker.sweep import BlockSweep


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "opt", "gpt2", "gemma3_text"])
def test_the_sweep_on_cuda_agrees_with_the_cpu(name: str, tmp_path: Path) -> None:
    folder = factories.write_checkpoint(tmp_path / "model", name)
    windows = torch.randint(4, 67, (12, 32), generator=torch.Generator().manual_seed(1))
    spec = JobSpec(
        model=ModelRef(source="local", id="model"),
        recipe=(GptqStep(bits=4), BiasCompensationStep()),
        evaluation=Evaluation(),
        format="quantry",
    )
    found = {}
    for device in ("cpu", "cuda"):
        model = CausalLM(folder, device=torch.device(device), dtype=torch.float32)
        with (tmp_path / "messages").open("w") as out:
            store = BlockStore(tmp_path / device, "x")
            found[device] = BlockSweep(
                model, spec, store, Progress(out), windows, windows + 0, PerplexityJudge(model)
            ).run()
    assert found["cuda"].perplexity["fp"] == pytest.approx(found["cpu"].perplexity["fp"], rel=1e-4)
    assert found["cuda"].perplexity["quantized"] == pytest.approx(
        found["cpu"].perplexity["quantized"], rel=0.05
    )
