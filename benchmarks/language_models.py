"""Perplexity of full precision, round-to-nearest, GPTQ and GPTQ with bias compensation on one model.

usage: python benchmarks/language_models.py MODEL --calibration TEXT --evaluation TEXT [--separator S]
           [--bits 4 3 2] [--group-sizes 64 0] [--recipes plain default] [--seeds 0 1 2]
           [--samples 64] [--length 512] [--evaluation-windows 40] [--evaluation-length 1024] [--show]

A text may be one file for both: calibration takes its first nine tenths, evaluation the rest. Group size 0
is one scale a row; --evaluation-windows 0 is the whole text. Recipes: plain (GPTQ as published: no clip
search, no asymmetric target, no refinement), default, each also with bias compensation (plain+bc,
default+bc). Runs are kept in benchmarks/results (kept.py) and not computed again.
"""

from __future__ import annotations

import argparse
import io
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from kept import Kept

from quantry.contract import DatasetRef, Evaluation, JobSpec, ModelRef
from quantry.recipe import BiasCompensationStep, GptqStep, Step
from worker.calibration.store import BlockStore
from worker.calibration.texts import calibration_windows, cut_windows, load_text, tokenize
from worker.metrics.quality import PerplexityJudge
from worker.models.causal_lm import CausalLM
from worker.progress import Progress
from worker.sweep import BlockSweep
from worker.workspace import Workspace

KEPT = Kept("language_models")
RECIPES = ("plain", "plain+bc", "default", "default+bc")


def steps(name: str, bits: int, group_size: int, symmetric: bool) -> tuple[Step, ...]:
    grid = {"bits": bits, "group_size": group_size or None, "symmetric": symmetric}
    plain = {"clip": "none", "target": "plain", "refinement": 0} if name.startswith("plain") else {}
    gptq = GptqStep.model_validate({**grid, **plain})
    return (gptq, BiasCompensationStep()) if name.endswith("+bc") else (gptq,)


def windows(options: argparse.Namespace, model: CausalLM, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Calibration and evaluation windows, cut as a job cuts them."""
    texts = [Path(options.calibration).resolve(), Path(options.evaluation).resolve()]
    nowhere = Path()
    space = Workspace(
        artifact=nowhere, checkpoints=nowhere, cache=nowhere, model_roots=tuple(t.parent for t in texts)
    )
    one = texts[0] == texts[1]
    tokens = []
    for path, role in zip(texts, ("calibration", "evaluation"), strict=True):
        ref = DatasetRef(
            source="local", id=str(path), split=None if one else "all", separator=options.separator
        )
        text = load_text(ref, role, space)  # type: ignore[arg-type]
        tokens.append(tokenize(text, model.tokenizer(), model.start_token))
    calibration = calibration_windows(
        tokens[0], samples=options.samples, length=options.length, seed=seed, name=texts[0].name
    )
    return calibration, cut_windows(tokens[1], options.evaluation_length)[
        : options.evaluation_windows or None
    ]


def judged(options: argparse.Namespace) -> dict[str, Any]:
    """What a perplexity depends on but for the weights."""
    windows = f"{options.evaluation_windows}x{options.evaluation_length}"
    return {"model": options.model.name, "windows": windows, "dtype": options.dtype}


def settings(
    options: argparse.Namespace, recipe: str, bits: int, group: int, seed: int | None
) -> dict[str, Any]:
    """What a run is known by; no seed: round to nearest."""
    grid = {"recipe": recipe, "bits": bits, "group": group, "asymmetric": options.asymmetric}
    calibration = {"calibration": f"{options.samples}x{options.length}", "seed": seed}
    return {**judged(options), **grid, **(calibration if seed is not None else {})}


def measure(options: argparse.Namespace, recipe: str, bits: int, group: int, seed: int) -> None:
    """Keep the perplexity and the cost of one recipe, and those of full precision and RTN where they miss."""
    facts = settings(options, recipe, bits, group, seed)
    if KEPT.find(facts) is not None:
        return
    model = CausalLM(options.model, device=torch.device("cpu"), dtype=getattr(torch, options.dtype))
    calibration, evaluation = windows(options, model, seed)
    references = {
        "fp": {**judged(options), "recipe": "fp"},
        "rtn": settings(options, "rtn", bits, group, None),
    }
    baselines = [name for name, run in references.items() if KEPT.find(run) is None]
    spec = JobSpec(
        model=ModelRef(source="local", id=str(options.model)),
        recipe=steps(recipe, bits, group, not options.asymmetric),
        evaluation=Evaluation.model_validate({"baselines": baselines}),
        format="quantry",
    )
    with tempfile.TemporaryDirectory() as folder:
        store = BlockStore(Path(folder) / "blocks", "benchmark")
        judge = PerplexityJudge(model)
        result = BlockSweep(model, spec, store, Progress(io.StringIO()), calibration, evaluation, judge).run()
    for name in baselines:
        KEPT.keep(references[name], {"perplexity": result.perplexity[name]})
    figures = {"perplexity": result.perplexity["quantized"], "cpu_s": round(result.cost.cpu_s, 1)}
    KEPT.keep(facts, {**figures, "windows": len(evaluation)})


def row(options: argparse.Namespace, bits: int, group: int) -> str:
    """A line of the table, of what was measured so far."""
    runs = [[{**judged(options), "recipe": "fp"}], [settings(options, "rtn", bits, group, None)]]
    for recipe in options.recipes:
        runs.append([settings(options, recipe, bits, group, seed) for seed in options.seeds])
    cells = [str(bits), str(group or "row")]
    for column in runs:
        found = [known["perplexity"] for known in map(KEPT.find, column) if known is not None]
        cells.append(cell(found) if found else "")
    return "| " + " | ".join(cells) + " |"


def cell(values: list[float]) -> str:
    """Mean, and half the spread where there are several."""
    spread = f" ± {(max(values) - min(values)) / 2:.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--separator")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[0, 64])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--evaluation-windows", type=int, default=40)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--asymmetric", action="store_true")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the forwards")
    parser.add_argument("--show", action="store_true", help="run nothing")
    options = parser.parse_args()
    print(
        f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {options.dtype}\n"
    )
    print("| bits | group | FP | RTN | " + " | ".join(options.recipes) + " |")
    print("| --- " * (4 + len(options.recipes)) + "|", flush=True)
    for bits in options.bits:
        for group in options.group_sizes:
            for recipe in options.recipes if not options.show else ():
                for seed in options.seeds:
                    measure(options, recipe, bits, group, seed)
            print(row(options, bits, group), flush=True)


if __name__ == "__main__":
    main()
