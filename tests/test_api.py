"""What a program may import: the names of dailies itself. The example that uses them runs in test_packaging.py."""

import ast
import subprocess
import sys

import pytest
from test_house import HEAVY, ROOT, run_python

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
