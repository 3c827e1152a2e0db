"""What a program may import: the names of dailies itself. The example that uses them runs in test_packaging.py."""

import ast
import re
import subprocess
import sys

import pytest
from test_house import HEAVY, ROOT, run_python
from tiny import TINY

import dailies


def for_type_checkers() -> dict[str, str]:
    """Name -> where it is defined, as the block under TYPE_CHECKING says."""
    tree = ast.parse((ROOT / "dailies" / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname: f"{node.module}:{alias.name}" for node in block.body for alias in node.names}


def test_who_checks_types_and_who_runs_are_told_the_same():
    lazily = {name: f"dailies.{place}" if ":" in place else f"dailies.{place}:{name}"
              for name, place in dailies._PLACES.items()}
    assert lazily == for_type_checkers() and sorted(lazily) == sorted(dailies.__all__)


@pytest.mark.parametrize("name", dailies.__all__)
def test_a_public_name_is_there_and_described(name):
    value = getattr(dailies, name)
    assert name == "CATALOG" or value.__doc__
    assert f"`{name}`" in (ROOT / "docs" / "api.md").read_text() and name in dir(dailies)


def test_what_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'kernel'"):
        _ = dailies.kernel


def test_importing_dailies_imports_nothing_heavy(tmp_path):
    heavy = [*HEAVY, "typer", "pydantic"]
    script = f"import sys, dailies; assert not [name for name in {heavy!r} if name in sys.modules]"
    assert run_python(["-c", script], cwd=tmp_path).returncode == 0


def test_an_error_that_a_person_can_mend_knows_its_exit_code(tmp_path):
    script = "import dailies\ntry:\n    dailies.Manifest.read('absent.csv')\nexcept dailies.DailiesError as error:\n" \
             "    print(error.exit_code, error)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("2 ") and "absent.csv" in done.stdout, done.stderr


class Mirror:
    """A stage that returns what it is told to."""

    def __init__(self, of):
        self.of = of

    def __call__(self, values):
        return self.of(values)


def run_in(folder, **options):
    weights = dailies.locate_weights(None, TINY)
    return dailies.prepare(dailies.Manifest.read(prompts=["a fox", "a hare"]), dailies.open_store(str(folder)), TINY,
                           weights=weights, defaults=dailies.Defaults(frames=5, steps=1), **options)


def test_folders_of_weights_are_paths_or_texts_everywhere(tmp_path):
    store, folder = dailies.open_store(str(tmp_path)), dailies.locate_weights(None, TINY)
    manifest = dailies.Manifest.read(prompts="a fox")   # one prompt, not five letters
    assert [dailies.prepare(manifest, store, TINY, weights=weights).plan.num_clips for weights in (
        folder, str(folder))] == [1, 1]
    for weights in (folder, str(folder), None):
        assert len(dailies.text_to_video(TINY, weights, store, TINY.runtime())) == 3


@pytest.mark.parametrize("wrong, said", [
    (lambda out: dailies.Defaults(steps=-1), "steps must be"),
    (lambda out: dailies.Defaults(duration_s=1.0, frames=9), "give duration_s or frames"),
    (lambda out: run_in(out, precision="int3"), "--precision must be"),
    (lambda out: run_in(out, device="tpu"), "--device must be cpu or cuda; got tpu"),
    (lambda out: TINY.runtime("cpu", "int3"), "precision must be fp32 or bf16 or int8 or fp8; got int3"),
    (lambda out: TINY.runtime("cpu", "fp32", "none"), "attention must be"),
    (lambda out: dailies.prepare(dailies.Manifest.read(prompts=["a fox"]), dailies.open_store(out), TINY, weights=None,
                                 defaults=dailies.Defaults(resolution="9p")), "resolution must be"),
    (lambda out: list(run_in(out).render([])), "there are none: text_to_video gives three"),
    (lambda out: dailies.read_ledger(dailies.open_store(out), ["id", "idd"]), "the ledger has no column idd; it has"),
    (lambda out: list(dailies.run_cluster([], [])), "use `with dailies.connect"),
])
def test_what_a_program_asks_for_and_cannot_have_is_an_error_that_it_can_tell(wrong, said, tmp_path):
    with pytest.raises(dailies.DailiesError, match=said):
        wrong(str(tmp_path / "out"))
    assert not list(tmp_path.rglob("*.json"))


def test_stages_that_do_not_make_the_runs_clips_are_told_of(tmp_path):
    """Before anything of them is recorded: another folder's stages, and stages of which none publishes."""
    run = run_in(tmp_path / "out")
    for stages, said in ((of_store(tmp_path / "other"), "make the stages with the store that the run has"),
                         (of_store(tmp_path / "out")[:2], "last stage, sample, must publish: .* returned Persisted")):
        with pytest.raises(dailies.DailiesError, match=said):
            list(run.render(stages))
        assert dailies.read_ledger(run.store, ["id"]).num_rows == 0
    assert [type(outcome.value) for outcome in run.render(of_store(tmp_path / "out"))] == [dailies.Clip] * 2


def of_store(folder):
    return dailies.text_to_video(TINY, None, dailies.open_store(str(folder)), TINY.runtime())


@pytest.mark.parametrize("made, said", [
    (lambda values: None, "Mirror must return a list; it returned NoneType"),
    (lambda values: [None], "Mirror must return values that carry their request.* it returned NoneType"),
    (lambda values: [], "Mirror must return a value for each that it gets; it got 1 and returned 0")])
def test_a_stage_of_ones_own_that_returns_something_else_fails_its_clip_by_its_own_name(made, said, tmp_path):
    run = run_in(tmp_path / "out")
    encode, sample, publish = of_store(tmp_path / "out")
    mirror = dailies.Stage(name="mirror", steps=(dailies.Step(actor=Mirror, args=dict(of=made)),))
    failures = [outcome.value for outcome in run.render([encode, mirror, sample, publish])]
    assert [(failure.stage, bool(re.fullmatch(said, failure.error))) for failure in failures] == [("mirror", True)] * 2


def test_stages_have_names_of_their_own_and_steps():
    step = dailies.Step(actor=Mirror, args=dict(of=list))
    for stages, said in (([dailies.Stage(name="", steps=(step,))], "must have a name"),
                         ([dailies.Stage(name="a", steps=())], "and 0 steps"),
                         ([dailies.Stage(name="a", steps=(step,))] * 2, "2 are called a")):
        with pytest.raises(ValueError, match=said):
            list(dailies.run_local(stages, []))
