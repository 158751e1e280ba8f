"""The commands. Each opens a session, calls the client, and shows what came back.

Exit codes: 0 done; 1 the job failed, was rejected or cancelled, or a download went wrong; 2 wrong usage, or
the server refused the request; 3 the server is out of reach, or refuses the API key; 4 not finished within
--timeout; 130 interrupted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from quantry.bundled import BUNDLED_MODELS
from quantry.cli import options as o
from quantry.cli import render
from quantry.cli.request import Options, build_request, parse_labels
from quantry.cli.session import INTERRUPTED, JOB_FAILED, Session, session
from quantry.client.connection import DEFAULT_URL
from quantry.diffusion import INDEX
from quantry.jobs import JobRead, State
from quantry.reports import Manifest

app = typer.Typer(
    name="quantry",
    help="Quantize models on a Quantry server, and get back checkpoints with proof of their quality.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
datasets_app = typer.Typer(help="Texts and images to calibrate and evaluate with.", no_args_is_help=False)
app.add_typer(datasets_app, name="datasets")


@app.callback()
def connect(
    context: typer.Context,
    url: Annotated[
        str | None,
        typer.Option(envvar="QUANTRY_URL", help=f"Address of the server; default {DEFAULT_URL}."),
    ] = None,
    version: o.Version = False,
) -> None:
    """The API key is read from QUANTRY_API_KEY, or from QUANTRY_DATA/api-key for a server on this machine."""
    context.obj = url


@app.command()
def submit(
    context: typer.Context,
    model: o.Model = None,
    bits: o.Bits = None,
    method: o.MethodOption = None,
    correction: o.CorrectionOption = None,
    group_size: o.GroupSize = None,
    asymmetric: o.Asymmetric = False,
    format_name: o.FormatOption = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    seed: o.Seed = None,
    evaluation: o.Evaluation = None,
    evaluate: o.Evaluate = True,
    accept_increase: o.AcceptIncrease = None,
    accept_accuracy_drop: o.AcceptAccuracyDrop = None,
    device: o.DeviceOption = None,
    labels: o.Labels = None,
    spec: o.SpecFile = None,
    idempotency_key: o.Key = None,
    watch: o.Watch = False,
    download: o.DownloadTo = None,
    as_json: o.Json = False,
) -> None:
    """Queue a quantization; with --watch or --download, follow it to its end."""
    fields = _recipe_fields(bits, method, correction, group_size, asymmetric, format_name, device)
    drawn = {"samples": samples, "sequence_length": sequence_length, "seed": seed}
    accept = {"perplexity_increase_max": accept_increase, "accuracy_drop_max": accept_accuracy_drop}
    typed = Options(spec, model, fields, calibration, drawn, evaluation, evaluate, accept, labels or [])
    with session(context, as_json) as s:
        job = s.client.submit(build_request(s, typed), idempotency_key=idempotency_key)
        if not (watch or download):
            _print_job(s, job)
            return
        s.say(f"{job.id} is {job.state.value}; follow it again with: quantry watch {job.id}")
        job = _follow(s, job.id, None)
        if download and job.state in (State.SUCCEEDED, State.REJECTED):
            manifest = _download(s, job.id, download, 4)
            if not s.as_json:
                render.show_manifest(s.err, manifest, str(download))
        _end(s, job)


@app.command()
def estimate(
    context: typer.Context,
    model: o.Model = None,
    bits: o.Bits = None,
    method: o.MethodOption = None,
    correction: o.CorrectionOption = None,
    group_size: o.GroupSize = None,
    asymmetric: o.Asymmetric = False,
    format_name: o.FormatOption = None,
    calibration: o.Calibration = None,
    samples: o.Samples = None,
    sequence_length: o.SequenceLength = None,
    evaluation: o.Evaluation = None,
    evaluate: o.Evaluate = True,
    device: o.DeviceOption = None,
    spec: o.SpecFile = None,
    as_json: o.Json = False,
) -> None:
    """A dry run: layers, size, memory, time and warnings; nothing is computed."""
    fields = _recipe_fields(bits, method, correction, group_size, asymmetric, format_name, device)
    drawn = {"samples": samples, "sequence_length": sequence_length}
    typed = Options(spec, model, fields, calibration, drawn, evaluation, evaluate, {}, [])
    with session(context, as_json) as s:
        found = s.client.estimate(build_request(s, typed))
        s.print_json(found) if as_json else render.show_estimate(s.out, found)


@app.command()
def watch(context: typer.Context, job: o.JobId, timeout: o.Timeout = None, as_json: o.Json = False) -> None:
    """Follow a job to its end; the exit code tells how it ended."""
    with session(context, as_json) as s:
        _end(s, _follow(s, job, timeout))


@app.command("list")
def list_jobs(
    context: typer.Context,
    state: Annotated[State | None, typer.Option(help="Only jobs in this state.")] = None,
    labels: Annotated[list[str] | None, typer.Option("--label", metavar="NAME=VALUE")] = None,
    limit: Annotated[int, typer.Option(min=1, help="Jobs at most, newest first.")] = 20,
    as_json: o.Json = False,
) -> None:
    """The jobs of this API key."""
    with session(context, as_json) as s:
        wanted = parse_labels(labels or [])
        found = s.client.jobs(state=state, labels=wanted, page_size=min(limit, 100))
        jobs = [job for job, _ in zip(found, range(limit), strict=False)]
        if as_json:
            s.print_json({"items": [job.model_dump(mode="json") for job in jobs]})
        elif jobs:
            s.out.print(render.jobs_table(jobs))
        else:
            s.say("no jobs; submit one with: quantry submit bundled/opt-tiny --bits 4")


@app.command()
def cancel(context: typer.Context, job: o.JobId, as_json: o.Json = False) -> None:
    """End a job; what it computed so far is kept for a retry."""
    with session(context, as_json) as s:
        _print_job(s, s.client.cancel(job))


@app.command()
def retry(context: typer.Context, job: o.JobId, as_json: o.Json = False) -> None:
    """Queue a failed, cancelled, rejected or expired job again."""
    with session(context, as_json) as s:
        _print_job(s, s.client.retry(job))


@app.command()
def report(
    context: typer.Context,
    job: o.JobId,
    html: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the full report page there, to read in a browser."),
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Quality, size and cost of a finished job."""
    with session(context, as_json) as s:
        if html:
            html.write_text(s.client.report_html(job), encoding="utf-8")
            s.say(f"wrote {html}")
        if as_json:
            s.print_json(s.client.report(job))
        elif not html:
            render.show_report(s.out, s.client.report(job))


@app.command()
def download(
    context: typer.Context,
    job: o.JobId,
    folder: Annotated[
        Path | None, typer.Argument(metavar="[DIR]", help="Default: the id of the job.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=16, help="Files at a time.")] = 4,
    tar: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Fetch one tar file instead of a folder.")
    ] = None,
    as_json: o.Json = False,
) -> None:
    """Fetch the checkpoint; what an earlier try left is continued, and every file is checked by sha256."""
    if folder and tar:
        raise typer.BadParameter("give a folder or --tar, not both")
    with session(context, as_json) as s:
        target = folder or Path(job)
        manifest = _download_tar(s, job, tar) if tar else _download(s, job, target, parallel)
        s.print_json(manifest) if as_json else render.show_manifest(s.out, manifest, str(tar or target))


@app.command()
def models(context: typer.Context, as_json: o.Json = False) -> None:
    """The models that Quantry ships, to try it without a hub; any other is named at submit."""
    with session(context, as_json) as s:
        found = [_bundled(name, folder) for name, folder in BUNDLED_MODELS.items() if folder.is_dir()]
        if as_json:
            s.print_json({"items": found})
        else:
            s.out.print(render.models_table(found))


@app.command()
def methods(context: typer.Context, as_json: o.Json = False) -> None:
    """The methods that the server knows."""
    with session(context, as_json) as s:
        found = s.client.methods()
        if as_json:
            s.print_json({"items": [method.model_dump(mode="json") for method in found]})
        else:
            s.out.print(render.methods_table(found))


@datasets_app.callback(invoke_without_command=True)
def list_datasets(context: typer.Context, as_json: o.Json = False) -> None:
    """List the uploads."""
    if context.invoked_subcommand:
        return
    with session(context, as_json) as s:
        found = s.client.datasets()
        if as_json:
            s.print_json({"items": [dataset.model_dump(mode="json") for dataset in found]})
        elif found:
            s.out.print(render.datasets_table(found))
        else:
            s.say("no uploads; add one with: quantry datasets upload FILE")


@datasets_app.command("upload")
def upload_dataset(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help=".txt, .jsonl, .parquet or .npz")],
    name: Annotated[str | None, typer.Option(help="Default: the name of the file.")] = None,
    as_json: o.Json = False,
) -> None:
    """Upload a text, or images as .npz."""
    with session(context, as_json) as s:
        made = s.client.upload_dataset(file, name=name)
        s.print_json(made) if as_json else s.out.print(render.datasets_table([made]))


@datasets_app.command("delete")
def delete_dataset(
    context: typer.Context,
    dataset: Annotated[str, typer.Argument(metavar="DATASET", help="Its id, ds_...")],
    as_json: o.Json = False,
) -> None:
    """Delete an upload."""
    with session(context, as_json) as s:
        s.client.delete_dataset(dataset)
        if as_json:
            s.print_json({"deleted": dataset})
        else:
            s.say(f"deleted {dataset}")


def _bundled(name: str, folder: Path) -> dict[str, Any]:
    index = folder / INDEX
    config = json.loads((index if index.exists() else folder / "config.json").read_text(encoding="utf-8"))
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    architecture = config["_class_name"] if index.exists() else config["architectures"][0]
    return {"id": name, "architecture": architecture, "bytes": size}


def _recipe_fields(
    bits: int | None,
    method: o.Method | None,
    correction: o.Correction | None,
    group_size: int | None,
    asymmetric: bool,
    format_name: o.FormatName | None,
    device: o.Device | None,
) -> dict[str, Any]:
    """The fields of a JobRequest that options name; None where nothing was typed."""
    return {
        "bits": bits,
        "method": method,
        "correction": correction,
        "group_size": group_size,
        "symmetric": False if asymmetric else None,
        "format": format_name,
        "device": device,
    }


def _follow(s: Session, job: str, timeout: float | None) -> JobRead:
    """Show a job until it has finished; Ctrl-C leaves it running and says so."""
    last: JobRead | None = None
    try:
        with render.LiveJob(s.err) as live:
            for last in s.client.watch(job, timeout):
                live.show(last)
    except KeyboardInterrupt:
        s.say(f"{job} goes on: quantry watch {job} follows it, quantry cancel {job} ends it")
        raise typer.Exit(INTERRUPTED) from None
    assert last is not None  # watch yields the job at least once
    return last


def _end(s: Session, job: JobRead) -> None:
    """Print a finished job and leave with the code of how it ended."""
    _print_job(s, job)
    if job.state is not State.SUCCEEDED:
        raise typer.Exit(JOB_FAILED)


def _print_job(s: Session, job: JobRead) -> None:
    s.print_json(job) if s.as_json else render.show_job(s.out, job)


def _download(s: Session, job: str, folder: Path, parallel: int) -> Manifest:
    with _bar(s) as bar:
        task = bar.add_task(str(folder), total=None)
        return s.client.download(
            job,
            folder,
            parallel=parallel,
            on_bytes=lambda done, total: bar.update(task, completed=done, total=total),
        )


def _download_tar(s: Session, job: str, file: Path) -> Manifest:
    with _bar(s) as bar:
        task = bar.add_task(str(file), total=None)
        return s.client.download_checkpoint(
            job, file, on_bytes=lambda done, total: bar.update(task, completed=done, total=total)
        )


def _bar(s: Session) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, console=s.err, transient=True, disable=not s.err.is_terminal)
