"""Whole jobs on a GPU, or on what stands in for one: all that they compute with is where it belongs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
JOBS = [
    "test_pipeline.py::test_a_job_ends_in_a_folder_that_proves_itself[llama-fields0-compressed-tensors]",
    "test_vision_pipeline.py::test_every_method_runs_and_its_artifact_computes_the_same[igq]",
    "training/test_job.py::test_every_family_trains_and_its_artifact_computes_the_same[resnet]",
    "diffusion/test_job.py::test_the_loaded_pipeline_adds_as_much_less_noise_as_the_worker[ddim-1.0]",
]
MORE = [
    "test_pipeline.py::test_a_job_ends_in_a_folder_that_proves_itself",
    "test_pipeline.py::test_softmax_of_a_language_model_is_corrected",
    "test_pipeline.py::test_w8a8_is_smoothed_and_loads_in_stock_transformers",
    "test_vision_pipeline.py::test_every_family_is_quantized_and_loads",
    "test_vision_pipeline.py::test_every_method_runs_and_its_artifact_computes_the_same",
    "training/test_job.py::test_every_family_trains_and_its_artifact_computes_the_same",
    "diffusion/test_job.py::test_every_step_runs_and_the_pipeline_predicts_the_same",
]


@pytest.mark.timeout(3000)
@pytest.mark.parametrize(
    "jobs", [JOBS, pytest.param(MORE, marks=[pytest.mark.slow, pytest.mark.gpu])], ids=["few", "all"]
)
def test_whole_jobs_compute_where_their_tensors_are(jobs: list[str]) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "stand_in_gpu"]
    chosen = [str(TESTS / "stand_in_rules.py"), *(str(TESTS / "worker" / job) for job in jobs)]
    run = subprocess.run(
        [*command, *chosen], env={**os.environ, "PYTHONPATH": str(TESTS)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
