"""The program `dailies`: what can be typed, and which function answers.

Nothing heavy is imported here: `dailies --help` must be instant, and torch, ray and pyarrow take seconds.
"""

import inspect
import logging
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

from dailies.jobs.answer import answer
from dailies.jobs.here import import_nothing_from_here
from dailies.jobs.process import leave, speak_safely
from dailies.jobs.progress import printable, say
from dailies.jobs.signals import on_signals
from dailies.jobs.usage import UsageError, absent_package, checked_place, refuse_absent_gpu
from dailies.model.errors import DailiesError
from dailies.model.settings import ROW_OPTIONS
from dailies.pipeline.run.masking import without_secrets

try:
    import typer
    from typer.core import TyperGroup
except ModuleNotFoundError as error:                    # a job on a cluster's head that has Ray and nothing else
    print(absent_package(error), file=sys.stderr)
    sys.exit(5)

if TYPE_CHECKING:
    from dailies.jobs.settings import RenderJob
    from dailies.pipeline.stages import Engine

HELP = """Render tonight, look tomorrow: large text-to-video batches, from a manifest of prompts to clips in a folder
or bucket.

Exit codes: 0 every row has a clip; 2 bad usage or bad manifest, nothing was started; 3 finished, some rows failed;
4 stopped early on a deadline, a budget or --limit; 5 the store or the cluster is not usable, or another driver has the
run; 130 interrupted. After 3, 4, 5 and 130 the same command continues.

\b
Example:  dailies render examples/prompts.parquet --out out/
"""

# typer's own base of what is wrong with a command line; the module that it lives in moved between versions
CommandLineError: Any = typer.BadParameter.__mro__[1]


class Interrupted(BaseException):
    """Ctrl-C or SIGTERM, outside of any block that answers it."""


class Commands(TyperGroup):
    """Typer ends a KeyboardInterrupt without a word; main has one to say."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted from None


app = typer.Typer(cls=Commands, help=HELP, no_args_is_help=True, add_completion=False, rich_markup_mode=None,
                  pretty_exceptions_enable=False)


def say_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import PackageNotFoundError, version
        try:
            found = version("dailies-render")
        except PackageNotFoundError:                    # a checkout, or what a submitted job brings
            found = "(not installed: run from its folder)"
        typer.echo(f"dailies {found}")
        raise typer.Exit


@app.callback()
def dailies(version: Annotated[bool, typer.Option("--version", is_eager=True, callback=say_version,
                                                  help="Which version this is.")] = False) -> None:
    pass


Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, and nothing else there.")]
RunUri = Annotated[str, typer.Argument(metavar="URI", help="The run folder: a local folder or s3://bucket/prefix.")]


def where_from_and_to(
    manifest: Annotated[list[str] | None, typer.Argument(
        metavar="MANIFEST", help="Parquet, CSV, TSV, JSON, JSON lines, or text with a prompt per line; "
        "compressed or not; files, folders or globs; local, s3:// or https://; - for stdin.")] = None,
    prompt: Annotated[list[str] | None, typer.Option(
        metavar="TEXT", help="A row with this prompt, in place of a manifest; may be repeated.")] = None,
    map: Annotated[list[str] | None, typer.Option(
        metavar="NAME=COLUMN", help="Take the manifest's column NAME for one of ours, as caption=prompt; NAME= carries "
        "it along to the ledger; may be repeated.")] = None,
    out: Annotated[str | None, typer.Option(metavar="URI", help="The run folder: local or s3://bucket/prefix.")] = None,
    config: Annotated[Path | None, typer.Option(
        metavar="FILE", help="TOML with any of these options as keys; flags win.")] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="See `dailies models`.  [default: demo]")] = None,
    weights: Annotated[str | None, typer.Option(
        metavar="URI", help="Folder or s3:// in the published layout.  [default: the model's own]")] = None,
    ray: Annotated[str | None, typer.Option(
        metavar="local|auto|ADDRESS", help="Where the work runs: this machine, the cluster this machine belongs to, "
        "or the cluster at ADDRESS.  [default: local]")] = None,
    allow_images: Annotated[list[str] | None, typer.Option(
        metavar="URI", help="s3://BUCKET/PREFIX below which images of rows may lie, beside the manifest's own bucket "
        "or folder; again for each.")] = None,
    device: Annotated[str | None, typer.Option(metavar="cpu|cuda", help="[default: cuda where there is a GPU]")] = None,
    cpus: Annotated[int | None, typer.Option(
        metavar="N", help="Cores of this machine that a local run uses.  [default: all that this process may use: "
        "affinity and the quota of its control group count]")] = None,
) -> None:
    """Options that render, plan and submit share (with_render_options), up to those of rows."""


def how(
    precision: Annotated[str | None, typer.Option(
        metavar="fp32|bf16|int8|fp8|auto", help="int8: the transformer's linear layers, the rest bf16; fp8: as int8, "
        "of a file that has them so; auto: the fastest on this GPU, as measured.  "
        "[default: bf16 on a GPU, fp32 on a CPU, int8 of INT8 weights]")] = None,
    decode_precision: Annotated[str | None, typer.Option(
        metavar="fp32|bf16", help="Of the VAE that makes pixels of latents.  "
        "[default: the model's; fp32 for Wan, as it was released]")] = None,
    attention: Annotated[str | None, typer.Option(
        metavar="dense|sage|sparse|auto", help="sage: INT8 logits; sparse: the best blocks of keys alone; auto: the "
        "fastest on this GPU, as measured, but sparse only for models tuned for it.  "
        "[default: the model's; dense, but for models tuned for sparse]")] = None,
    compile: Annotated[bool | None, typer.Option(
        "--compile/--no-compile", help="Compile the diffusion model (torch.compile): "
        "minutes at the first clip of each shape; the last bits differ, so clips have other ids.")] = None,
    batch: Annotated[int | None, typer.Option(
        metavar="N", help="Clips that a sampler takes at a time; this changes no bit of them.  [default: 1]")] = None,
    samplers: Annotated[int | None, typer.Option(
        metavar="N", help="Copies of the diffusion model.  [default: as many as fit]")] = None,
    threads_per_sampler: Annotated[int | None, typer.Option(
        metavar="N", help="CPU threads of each copy; above 1 the last bits differ, so clips on CPUs have other ids.  "
        "[default: 1]")] = None,
) -> None:
    """Those that come after what rows can set."""


def how_much(
    until: Annotated[str | None, typer.Option(
        metavar="HH:MM",
        help="Begin no clip that would not be done by then: the next such local time, or an ISO date and "
        "time.")] = None,
    max_gpu_hours: Annotated[float | None, typer.Option(
        metavar="X",
        help="Begin no clip that would need more. Counts every GPU that this command holds, whole, from its "
        "start to its end; a run on CPUs holds none.")] = None,
    max_cost: Annotated[float | None, typer.Option(metavar="USD", help="The same in money; needs --price.")] = None,
    price: Annotated[float | None, typer.Option(metavar="USD", help="Of one GPU hour.")] = None,
    report: Annotated[str | None, typer.Option(
        metavar="5m", help="Write the morning report so often while the run goes, and when it ends.")] = None,
    limit: Annotated[int | None, typer.Option(
        metavar="N", help="Make at most N clips in this command; where more are left, exit 4, and the same command "
        "makes the next N.")] = None,
    max_attempts: Annotated[int | None, typer.Option(
        metavar="N", help="Tries for a row whose worker died.  [default: 3]")] = None,
    skip_invalid: Annotated[bool | None, typer.Option(
        "--skip-invalid/--no-skip-invalid", help="Record bad rows as failed and render the rest.")] = None,
    strict: Annotated[bool | None, typer.Option(
        "--strict/--no-strict", help="Refuse rows that would not be rendered as asked, instead of noting it.")] = None,
    keep_latents: Annotated[bool | None, typer.Option(
        "--keep-latents/--no-keep-latents", help="Keep latents/ after publishing.")] = None,
    changed: Annotated[str | None, typer.Option(
        metavar="render|keep", help="Of rows that the run folder knows and that ask for something else now: make them "
        "again, in place of what is there, or keep that.  [default: refuse them by name]")] = None,
    reuse: Annotated[list[str] | None, typer.Option(
        metavar="URI", help="Another run folder: clips that it has, by clip_id, are linked or copied, checked, and not "
        "made; again for each.")] = None,
    take_over: Annotated[bool | None, typer.Option(
        "--take-over/--no-take-over",
        help="Where another driver has the run folder: watch it for a minute and go on in "
        "its place if it is silent. One that works is never disturbed.")] = None,
) -> None:
    """The last of them."""


def of_rows() -> list[inspect.Parameter]:
    """What can be said for rows that do not say (model/settings.py)."""
    found = []
    for setting in ROW_OPTIONS:
        said = f"{setting.help}  For rows that do not say.  [default: the model's]".strip()
        switch = [f"--{setting.option.replace('_', '-')}/--no-{setting.option.replace('_', '-')}"]
        option = typer.Option(*switch, help=said) if setting.type is bool else typer.Option(
            metavar=setting.metavar or {str: "TEXT", int: "N", float: "X"}[setting.type], help=said)
        found.append(inspect.Parameter(setting.option, inspect.Parameter.KEYWORD_ONLY, default=None,
                                       annotation=Annotated[setting.type | None, option]))
    return found


def parameters_of(command: Callable[..., Any]) -> list[inspect.Parameter]:
    return list(inspect.signature(command, eval_str=True).parameters.values())


def with_render_options(command: Callable[..., int]) -> Callable[..., int]:
    """`command(options, **own)` as a function whose signature typer can read: the shared options, then its own."""
    shared = [*parameters_of(where_from_and_to), *of_rows(), *parameters_of(how), *parameters_of(how_much)]
    own = [parameter for parameter in parameters_of(command) if parameter.name != "options"]

    def typed(**given: Any) -> int:
        return command({parameter.name: given.pop(parameter.name) for parameter in shared}, **given)

    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in [*shared, *own]]
    typed.__signature__ = inspect.Signature(parameters)     # type: ignore[attr-defined]  # what inspect asks first
    typed.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    typed.__name__, typed.__doc__ = command.__name__, command.__doc__
    return typed


@app.command()
@with_render_options
def render(options: dict[str, Any], context: typer.Context,
           wait: Annotated[bool | None, typer.Option(
               "--wait/--no-wait",
               help="Where another driver works on the run folder: wait until it has ended.")] = None,
           json: Json = False) -> int:
    """Plan, render and publish every row that is not done yet; running it again continues.

    \b
    Examples:
      dailies render examples/prompts.parquet --out out/
      dailies render --prompt "a red circle moves left" --prompt "a blue square moves up" --out out/
      dailies render captions.tsv --map caption=prompt --out out/
      dailies render s3://b/night.parquet --out s3://b/runs/0412 --model linum-v2-720p --ray auto
      dailies render --config night.toml --until 07:00 --max-cost 400 --price 2.5
    """
    job = job_of(options | {"wait": wait})
    from dailies.jobs.render import render
    return render(job, json=json, engine=context.obj)


@app.command()
@with_render_options
def plan(options: dict[str, Any], json: Json = False) -> int:
    """The same checks and the same plan as render: what is left to make, how long it takes, which weights are missing.

    Nothing is rendered, written or fetched. Without --out it is the plan of a run that has not begun.

    \b
    Example:  dailies plan examples/prompts.parquet --out out/
    """
    job = job_of(options, needs_out=False)
    from dailies.jobs.plan import show_plan
    return show_plan(job, json=json)


def job_of(options: dict[str, Any], needs_out: bool = True) -> "RenderJob":
    """The settings, checked, and a word at once: what comes next takes seconds to import."""
    from dailies.jobs.settings import RenderJob
    job = RenderJob.read(options, options.pop("config"), needs_out=needs_out)
    refuse_absent_gpu(job.device, job.ray)
    # of a link only what names the file: the rest may be a key
    named = ", ".join(source.partition("?")[0].rpartition("@")[2] if "://" in source else source
                      for source in job.sources)
    say(printable(f"reading {named or 'the prompts'}" + (f", for {job.out}" if job.out else "") + f" with {job.model}"),
        stream=sys.stderr)
    return job


@app.command()
@with_render_options
def submit(options: dict[str, Any],
           address: Annotated[str, typer.Option(metavar="URL", help="The Ray head's dashboard: http://HEAD:8265.")],
           wait: Annotated[bool, typer.Option(help="Follow the log and return render's exit code.")] = False,
           json: Json = False) -> int:
    """The same render as a job on a Ray cluster.

    \b
    Example:  dailies submit night.parquet --out s3://b/runs/0412 --address http://head:8265 --wait
    """
    from dailies.jobs.parcel import one_manifest
    from dailies.jobs.settings import RenderJob
    from dailies.jobs.submit import submit
    if options.pop("ray") is not None:
        raise typer.BadParameter("submit runs on the cluster at --address; leave --ray out")
    if options.pop("cpus") is not None:
        raise typer.BadParameter("--cpus is of a local run: a cluster's machines say themselves what they have")
    job = RenderJob.read(options, options.pop("config"))
    with one_manifest(job) as manifest:
        return submit(manifest, job.out, address, job.flags(), wait, json)


@app.command()
def status(uri: RunUri, json: Json = False) -> int:
    """Done, failed and pending rows, clips per hour, ETA, by bucket; from the run folder alone.

    \b
    Example:  dailies status s3://b/runs/0412
    """
    from dailies.jobs.runs import status
    return status(uri, json=json)


@app.command()
def report(uri: RunUri,
           beside: Annotated[list[str] | None, typer.Option(
               metavar="URI2", help="Another run, whose clips stand beside those of the same prompt; may be "
               "repeated.")] = None,
           to: Annotated[str | None, typer.Option(
               metavar="DIR", help="Where the report goes.  [default: report/ in the run folder]")] = None,
           presign: Annotated[str | None, typer.Option(
               metavar="12h", help="Clips in a bucket get links that work for so long, for whoever has the "
               "report.")] = None,
           price: Annotated[float | None, typer.Option(
               metavar="USD", help="Of one GPU hour.  [default: what render was told]")] = None,
           posters: Annotated[bool, typer.Option(
               "--posters/--no-posters", help="Make the posters that are missing, of the clips.")] = True,
           serve: Annotated[bool, typer.Option(
               "--serve", help="Show the report to a browser of this machine, and take its decisions straight into the "
               "run folder; until Ctrl-C.")] = False,
           port: Annotated[int | None, typer.Option(
               metavar="N", min=1, max=65535, help="Of --serve.  [default: one that is free]")] = None,
           json: Json = False) -> int:
    """Write the morning report: contact sheet, figures, failures and cost; from the run folder alone, at any time.

    \b
    Examples:
      dailies report out/
      dailies report s3://b/runs/0412 --to morning/ --presign 12h
      dailies report out/ --beside out-old/
      dailies report s3://b/runs/0412 --serve
    """
    from dailies.jobs.report import report
    return report(uri, beside=beside or (), to=to, presign=presign, price=price, posters=posters, serve=serve,
                  port=port, json=json)


@app.command()
def verify(uri: RunUri,
           repair: Annotated[bool, typer.Option(
               "--repair",
               help="Put the rows of clips that are wrong back to pending; the next render makes them.")] = False,
           json: Json = False) -> int:
    """Re-read every clip and check its hash, that it decodes, and its size, against the ledger; exit 3 if any is wrong.

    \b
    Examples:
      dailies verify out/
      dailies verify out/ --repair
    """
    from dailies.jobs.verify import verify
    return verify(uri, json=json, repair=repair)


@app.command()
def retry(uri: RunUri,
          where: Annotated[list[str] | None, typer.Option(
              metavar="COLUMN=VALUE", help="Only failed rows with this value in the ledger, or of which an "
              "expression is true, as of redo; may be repeated.")] = None,
          json: Json = False) -> int:
    """Put failed rows back to pending; the next render tries them again.

    \b
    Example:  dailies retry out/ --where error_type=WorkerDied
    """
    from dailies.jobs.runs import retry
    return retry(uri, where or [], json=json)


Where = Annotated[list[str] | None, typer.Option(
    metavar="EXPR", help="Rows of which this is true, by columns of the ledger, as \"quality.motion < 0.2 and "
    "user.mood = sad\"; may be repeated, and all must hold.")]
Waits = Annotated[bool, typer.Option("--wait", help="Where a driver works on the run folder: wait until it has ended.")]


@app.command()
def pick(uri: RunUri,
         source: Annotated[str, typer.Option("--from", metavar="FILE", help="picks.json; - for stdin.")],
         json: Json = False) -> int:
    """Keep what a person decided about clips (pick, reject, redo, a note) as columns beside the ledger.

    \b
    Example:  dailies pick out/ --from picks.json
    """
    from dailies.jobs.decide import pick
    return pick(uri, source, json=json)


@app.command()
def redo(uri: RunUri,
         picks: Annotated[bool, typer.Option("--picks", help="Clips that a person wants made again.")] = False,
         where: Where = None,
         seed: Annotated[str, typer.Option(
             metavar="+N|N", help="So many more than the clip's own; or this one.")] = "+1",
         revert: Annotated[bool, typer.Option("--revert", help="Earlier takes that a person picked count again, in "
                                              "place of the newer ones.")] = False,
         wait: Waits = False, json: Json = False) -> int:
    """Have other takes of clips that are done made by the next render; what they replace stays until gc.

    \b
    Examples:
      dailies redo out/ --picks
      dailies redo out/ --where "quality.motion < 0.1 and decision is null" --seed +10
      dailies redo out/ --revert
    """
    from dailies.jobs.decide import redo
    return redo(uri, picks=picks, where=where or [], seed=seed, revert=revert, wait=wait, json=json)


@app.command()
def drop(uri: RunUri, where: Where = None, wait: Waits = False, json: Json = False) -> int:
    """Take rows out of a run; they are not made again, and their clips stay until gc.

    \b
    Example:  dailies drop out/ --where "decision = reject"
    """
    from dailies.jobs.decide import drop
    return drop(uri, where=where or [], wait=wait, json=json)


@app.command()
def gc(uri: RunUri,
       yes: Annotated[bool, typer.Option("--yes", help="Delete it.")] = False,
       wait: Waits = False, json: Json = False) -> int:
    """List what no current row of a run names: old takes, clips of rows that were dropped, what was left over.

    \b
    Examples:
      dailies gc out/
      dailies gc out/ --yes
    """
    from dailies.jobs.decide import gc
    return gc(uri, yes=yes, wait=wait, json=json)


@app.command()
def models(name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="One model, in full.")] = None,
           weights: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where to look for its weights.")] = None,
           json: Json = False) -> int:
    """The catalogue: what each model is, needs and defaults to, and which of its weights files are missing.

    \b
    Example:  dailies models linum-v2-720p --weights /data/linum-v2-720p
    """
    from dailies.jobs.runs import models
    return models(name, weights, json=json)


@app.command()
def convert(source: Annotated[str, typer.Argument(
                metavar="SRC", help="A published repository's folder, or one file of it.")],
            model: Annotated[str, typer.Option(metavar="NAME", help="See `dailies models`.")],
            to: Annotated[str, typer.Option(metavar="URI", help="Where the safetensors go: a folder or s3://.")],
            precision: Annotated[str | None, typer.Option(
                metavar="int8",
                help="Make the transformer's layers INT8: half the bytes to load.  [default: as published]")] = None,
            json: Json = False) -> int:
    """Published weights (.pth, read with weights_only, or .safetensors) to checked safetensors that render can load.

    \b
    Example:  dailies convert Wan2.1-T2V-1.3B/ --model wan2.1-t2v-1.3b --to s3://b/weights/wan2.1-t2v-1.3b
    """
    checked_place("SRC", source)
    checked_place("--to", to)
    from dailies.jobs.convert import convert
    return convert(source, model, to, precision=precision, json=json)


@app.command()
def bench(what: Annotated[str | None, typer.Argument(
              metavar="[WHAT]", help="demo, quality, pipeline, memory, model, kernels, clip, report, or gpu.  "
              "[default: all but gpu]")] = None,
          model: Annotated[str | None, typer.Argument(
              metavar="[NAME]", help="`bench model`: this model's transformer; `bench clip`: a clip of it.")] = None,
          random_weights: Annotated[bool, typer.Option(
              "--random-weights", help="With NAME: weights are made up; nothing is downloaded.")] = False,
          ways: Annotated[str | None, typer.Option(
              metavar="WAY,WAY", help="`bench clip NAME`: some ways to run it, as int8:sparse or bf16:dense:compiled.  "
              "[default: all]")] = None,
          steps: Annotated[int | None, typer.Option(
              metavar="N", help="`bench clip NAME`: of the clip.  [default: the model's]")] = None,
          frames: Annotated[int | None, typer.Option(
              metavar="N", help="`bench clip NAME`: of the clip.  [default: the model's]")] = None,
          size: Annotated[str | None, typer.Option(
              metavar="WIDTHxHEIGHT", help="`bench clip NAME`: of the clip.  [default: the model's]")] = None,
          out: Annotated[str | None, typer.Option(
              metavar="DIR", help="`bench gpu`: folder for results.json, report.md and log.txt.")] = None,
          budget: Annotated[float | None, typer.Option(
              metavar="SECONDS", help="`bench gpu`: for all its parts together.  [default: 540]")] = None,
          only: Annotated[str | None, typer.Option(metavar="PART,PART", help="`bench gpu`: some of its parts.")] = None,
          tiny: Annotated[bool, typer.Option("--tiny", help="`bench gpu`: sizes of a dry run; a CPU will do.")] = False,
          gpu_shapes: Annotated[bool, typer.Option(
              "--gpu-shapes", help="`bench pipeline`: how busy 1, 2 and 8 pretended GPUs are kept.")] = False,
          json: Json = False) -> int:
    """Time a part of dailies against a named peer in the same run.

    \b
    Examples:
      dailies bench pipeline
      dailies bench pipeline --gpu-shapes
      dailies bench model wan2.1-t2v-1.3b --random-weights
      dailies bench clip turbo-wan2.1-t2v-1.3b-480p --random-weights --ways int8:sparse
      dailies bench gpu --out found
    """
    if what == "gpu" and model is None and not random_weights:
        from dailies.jobs.gpu.__main__ import run
        return run(out, budget=budget or 540, only=only, tiny=tiny, json=json)
    if out or budget or only or tiny:
        raise UsageError("--out, --budget, --only and --tiny are of: dailies bench gpu")
    from dailies.jobs.bench.command import bench
    return bench(what, model, random_weights=random_weights, gpu_shapes=gpu_shapes, ways=ways, steps=steps,
                 frames=frames, size=size, json=json)


def program() -> NoReturn:
    """`dailies` as a process: its exit code is the command's, and 1 with a traceback is our own mistake."""
    speak_safely()
    code = 1
    try:
        code = main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        leave(code)


def main(arguments: list[str] | None = None, *, engine: "Engine | None" = None) -> int:
    """Run one command; whatever goes wrong becomes one message and an exit code.

    engine: does the work of `render`; None: Ray (pipeline/scheduler/cluster.py).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        import_nothing_from_here()
    except FileNotFoundError:                           # paths mean nothing there, and libraries fail to load
        return report_failure(2, "The working directory has been deleted; give the command from one that is there",
                              arguments)
    log_plainly()
    if no_text := [argument for argument in arguments if not is_encodable(argument)]:
        encoding = sys.getfilesystemencoding()
        advice = "Rename it, or link to it by another name" if encoding == "utf-8" else "Set PYTHONUTF8=1, or rename it"
        return report_failure(2, f"{no_text[0]!r} has bytes that are no text in {encoding}, and a run is written down "
                              f"as text. {advice}", arguments)
    try:
        # jobs/render.py answers both signals itself while clips are made, and saves more
        with on_signals(signal.default_int_handler, signal.SIGTERM):
            return app(arguments, prog_name="dailies", standalone_mode=False, obj=engine) or 0
    except CommandLineError as error:
        hint = f"\nSee: {error.ctx.command_path} --help" if error.ctx else ""
        return report_failure(2, error.format_message() + hint, arguments)
    except (Interrupted, typer.Abort):
        return report_failure(130, "Interrupted; the same command continues.", arguments)
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and (lacking := absent_package(error)):
            return report_failure(5, lacking, arguments)
        if not isinstance(error, DailiesError):
            raise                                       # our own mistake: the traceback is what helps
        return report_failure(error.exit_code, str(error), arguments, getattr(error, "errors", None))


def is_encodable(argument: str) -> bool:
    """False where it names a file by bytes that are no text: Python stands lone surrogates in for them."""
    try:
        argument.encode()
        return True
    except UnicodeEncodeError:
        return False


def log_plainly() -> None:
    """What libraries and we log, on standard error, with nothing in it that a terminal would obey."""
    class Plain(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            return "\n".join(printable(line) for line in super().format(record).splitlines())

    handler = logging.StreamHandler()
    handler.setFormatter(Plain("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def report_failure(code: int, message: str, arguments: list[str], errors: Any = None) -> int:
    """Say it once for a person, and once for a program; a store's or a cluster's words may be anything."""
    message = "\n".join(printable(line) for line in without_secrets(message).splitlines())
    print(message, file=sys.stderr)
    details = {"complaints": errors.as_json()} if errors else {}
    return answer({"error": message, "exit_code": code} | details, lambda: None, json="--json" in arguments)

