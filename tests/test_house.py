"""The rules of the house: imports point one way, one door per library, importing touches nothing, true documents."""

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["kernels", "model", "actors", "pipeline", "jobs"]

# where each outside library may be imported; a name that ends in / is a folder
DOORS = {
    "transformers": ["model/text.py"],
    "tokenizers": ["model/tokenizer.py"],
    "ftfy": ["model/text.py"],
    "safetensors": ["model/checkpoint.py"],
    "huggingface_hub": ["model/weights.py"],
    "pyarrow": ["pipeline/manifest/manifest.py", "pipeline/manifest/raw_bytes.py", "pipeline/manifest/cells.py",
                "pipeline/manifest/parquet.py", "pipeline/manifest/part.py", "pipeline/plan.py", "pipeline/resolved.py",
                "pipeline/run/ledger.py",
                "pipeline/run/ledger_part.py", "pipeline/run/ledger_row.py", "pipeline/manifest/stored_types.py",
                "pipeline/run/picks.py", "pipeline/run/current.py", "pipeline/run/growth.py", "pipeline/run/takes.py",
                "pipeline/run/judged.py", "pipeline/run/redo.py", "pipeline/run/sweep.py", "pipeline/run/where.py",
                "pipeline/report/columns.py", "pipeline/report/rows.py", "pipeline/report/figures.py",
                "pipeline/report/writer.py"],
    "boto3": ["pipeline/store/s3.py"],
    "botocore": ["pipeline/store/s3.py"],
    "ray": ["pipeline/scheduler/cluster.py", "pipeline/scheduler/ray_executor.py", "pipeline/scheduler/ray_private.py",
            "jobs/submit.py"],
    "av": ["actors/clip_writer.py", "actors/clip_file.py", "actors/soundtrack.py", "actors/recompress.py",
           "jobs/demo/pictures.py"],
    "PIL": ["actors/image_file.py", "actors/poster.py", "jobs/demo/curves.py", "jobs/demo/pictures.py"],
    "typer": ["jobs/"],
    "click": ["jobs/"],
    "rich": ["jobs/"],
    "pydantic": ["pipeline/", "jobs/"],
    "triton": ["kernels/"],
    "torch": ["kernels/", "model/", "actors/", "pipeline/stages.py",
              "pipeline/run/intermediates.py", "pipeline/run/saved_steps.py", "jobs/"],
}
PACKAGED_AS = {"botocore": "boto3", "PIL": "pillow", "yaml": "pyyaml"}
HEAVY = ["torch", "ray", "transformers", "pyarrow", "boto3", "av", "numpy"]         # not for `dailies --help`
# what takes long to import, or may be absent: the one reason for an import inside a function
DEFERRED = {*HEAVY, "botocore", "diffusers", "ftfy", "huggingface_hub", "psutil", "pydantic", "rich", "safetensors",
            "tokenizers", "triton"}
MOST_LINES = {"class": 300, "function": 60}
# what is to be mended still; a name is added to none of these lists
# public names that two modules define on purpose
ALIKE = {
    "LINUM", "WAN",                                     # a family, and the key table of its releases
    "Rope",                                             # as kernels take it, and as a block makes it
    "build", "fallbacks",                               # of plain weights, and of a transformer that is refitted
    "pack",                                             # layers for a processor, and tensors for a file
    "request_of",                                       # of a value between stages, and of a benchmark
    "PARTS", "ROOT", "Way", "rows", "run", "table",     # of programs for one machine: each of its own
}
# what a command needs is imported when it is typed: `dailies --help` is instant, and before import_nothing_from_here a
# logging.py or email.py of the user's own would be taken for Python's
IMPORTS_INSIDE = {"jobs/cli.py", "dailies/__main__.py"}


def modules() -> list[Path]:
    return sorted(path for package in ["dailies", *ORDER, "infra"] for path in (ROOT / package).rglob("*.py"))


def module_name(path: Path) -> str:
    """As it is imported, whether its folder is that of dailies or lies beside it."""
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    return name if name.split(".")[0] == "dailies" else f"dailies.{name}"


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def imported(path: Path) -> Iterator[tuple[str, int]]:
    """Every dotted name that a file imports, at the top or inside a function, with its line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.relative_to(ROOT)}:{node.lineno}: name the module in full"
            yield node.module or "", node.lineno


def test_imports_point_one_way():
    wrong = []
    for path in modules():
        home = path.relative_to(ROOT).parts[0]
        # infra: alone
        below = ORDER[:ORDER.index(home) + 1] if home in ORDER else ORDER if home == "dailies" else []
        for name, line in imported(path):
            top, _, package = name.partition(".")
            if top in [*ORDER, "infra", "tests"]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}; ours are dailies.{top} and below")
            package = package.split(".")[0]
            if top == "dailies" and package in [*ORDER, "infra"] and package not in below:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {name}")
    assert not wrong, "\n".join([f"imports must point {' <- '.join(ORDER)}", *wrong])


def test_each_library_has_one_door():
    wrong = []
    for path in modules():
        name = path.relative_to(ROOT).as_posix()
        for library, line in ((dotted.split(".")[0], line) for dotted, line in imported(path)):
            doors = DOORS.get(library)
            if doors and not any(name.startswith(door) if door.endswith("/") else name == door for door in doors):
                wrong.append(f"{name}:{line} imports {library}; it belongs in {', '.join(doors)}")
    assert not wrong, "\n".join(wrong)


@cache
def module_names() -> set[str]:
    return {module_name(path) for path in modules()}


@cache
def imports_by_place(path: Path) -> tuple[set[str], dict[str, int]]:
    """What a file imports as it is imported, and what its functions import when they are called, with the line.

    `from package import name` is of the module package.name where there is one. What is read for its types alone, below
    `if TYPE_CHECKING`, is not imported.
    """
    at_once: set[str] = set()
    later: dict[str, int] = {}

    def visit(node: ast.AST, inside: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [dotted if (dotted := f"{node.module}.{alias.name}") in module_names() else str(node.module)
                     for alias in node.names]
        else:
            names = []
        if inside:
            later.update(dict.fromkeys(names, getattr(node, "lineno", 0)))
        else:
            at_once.update(names)
        for child in ast.iter_child_nodes(node):
            visit(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)))

    visit(tree(path), inside=False)
    return at_once, later


def test_no_files_import_each_other_in_a_circle():
    """Not at the top, nor inside functions, where a circle would hide."""
    graph = {module_name(path): {name for names in imports_by_place(path) for name in names} for path in modules()}

    def reached(name: str) -> set[str]:
        found, waiting = set(), [name]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    behind = {name: reached(name) for name in graph}
    wrong = [f"{name} imports {', '.join(sorted(other for other in graph[name] if name in behind.get(other, ())))}"
             for name in graph if name in behind[name]]
    assert not wrong, "\n".join(["in a circle:", *wrong])


def test_an_import_inside_a_function_defers_a_heavy_library():
    """One of DEFERRED, or a module of ours that needs one which this file does without."""
    places = {module_name(path): imports_by_place(path) for path in modules()}

    def heavy_of(name: str, seen: set[str]) -> set[str]:
        """What importing it brings; with every package above it, whose __init__ runs too."""
        if name.partition(".")[0] != "dailies":
            return {name.partition(".")[0]} & DEFERRED
        found, parts = set(), name.split(".")
        for each in (".".join(parts[:length]) for length in range(1, len(parts) + 1)):
            if each in places and each not in seen:
                seen.add(each)
                found |= {heavy for other in places[each][0] for heavy in heavy_of(other, seen)}
        return found

    wrong = []
    for path in modules():
        own = heavy_of(module_name(path), set())
        wrong += [f"{path.relative_to(ROOT)}:{line} imports {name} inside a function, though it defers nothing"
                  for name, line in places[module_name(path)][1].items()
                  if not heavy_of(name, set()) - own and name.partition(".")[0] not in DEFERRED
                  and path.relative_to(ROOT).as_posix() not in IMPORTS_INSIDE]
    assert not wrong, "\n".join(wrong)


def test_no_function_and_no_class_is_longer_than_a_page():
    wrong = []
    for path in modules():
        for node in ast.walk(tree(path)):
            kind = "class" if isinstance(node, ast.ClassDef) else "function" if isinstance(
                node, (ast.FunctionDef, ast.AsyncFunctionDef)) else None
            lines = node.end_lineno - node.lineno + 1 if kind else 0
            if kind and lines > MOST_LINES[kind]:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {kind} {node.name} has {lines} lines; "
                             f"at most {MOST_LINES[kind]}")
    assert not wrong, "\n".join(wrong)


def public_names(path: Path) -> Iterator[str]:
    """Classes, functions and constants that a module defines, with no underscore before them."""
    for node in tree(path).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [node.name]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)]
        else:
            continue
        yield from (name for name in names if not name.startswith("_"))


@cache
def commands() -> set[str]:
    """What can be typed: a function of jobs/cli.py, beside the one that answers."""
    return {name for name in public_names(ROOT / "jobs" / "cli.py")}


def test_no_public_name_is_defined_in_two_modules():
    homes: dict[str, list[str]] = {}
    for path in modules():
        for name in set(public_names(path)):
            homes.setdefault(name, []).append(path.relative_to(ROOT).as_posix())
    wrong = []
    for name, files in sorted(homes.items()):
        # of one kernel, the implementations of one function
        folders = {Path(file).parent if file.startswith("kernels/") and file.count("/") > 1 else file for file in files}
        is_command = name == "main" or name in commands() and all(file.startswith("jobs/") for file in files)
        if len(folders) > 1 and not is_command and name not in ALIKE:
            wrong.append(f"{name}: {', '.join(files)}")
    assert not wrong, "\n".join(wrong)


def test_importing_any_module_touches_nothing(tmp_path: Path):
    """All modules, in one process with an empty home, which is asked afterwards what was opened, made or dialled."""
    names = [module_name(path) for path in modules() if path.name != "__main__.py"]
    names = [name for name in names if name not in needs_absent_library()]
    script = f"""
import importlib, os, sys
sys.path.insert(0, {str(ROOT)!r})
touched = []
def watch(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        touched.append(("writes", str(args[0])))
    elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "os.mkdir", "os.rename", "os.remove"):
        touched.append((event, str(args)))
for name in {["torch", "transformers", "ray", "pyarrow", "boto3", "av", "typer", "rich", "pydantic"]!r}:
    importlib.import_module(name)           # what these do is theirs
before = dict(os.environ)
sys.addaudithook(watch)
for name in {names!r}:
    importlib.import_module(name)
import ray, torch
assert not touched, touched
assert not torch.cuda.is_initialized()
assert not ray.is_initialized()
assert torch.get_default_dtype() is torch.float32
assert dict(os.environ) == before
"""
    done = run_python(["-B", "-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in tmp_path.iterdir()] == []


def needs_absent_library() -> set[str]:
    """Kernel modules that can only be imported where Triton is installed."""
    try:
        import triton  # noqa: F401
    except ImportError:
        return {module_name(path) for path in modules()
                if any(name.split(".")[0] == "triton" for name, _ in imported(path))}
    return set()


def run_python(args: list[str], cwd: Path) -> subprocess.CompletedProcess:
    env = {"HOME": str(cwd), "PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=300,
                          stdin=subprocess.DEVNULL)


def test_help_imports_nothing_heavy(tmp_path: Path):
    script = ("import sys, dailies.jobs.cli\n"
              "sys.argv = ['dailies', '--help']\n"
              "try:\n    dailies.jobs.cli.main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
              f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])")
    done = run_python(["-c", script], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout
    assert done.stdout.splitlines()[-1] == "HEAVY []"


def documents() -> list[Path]:
    return sorted(path for path in tracked() if path.suffix == ".md")


def tracked() -> list[Path]:
    """The files of the repository: git's list, or, where this is no checkout, all that is not made by us."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True) \
        if (ROOT / ".git").exists() else None
    if listed and listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    made = {".venv", ".cache", ".git", "out", "build", "dailies_render.egg-info",
            "__pycache__", ".pytest_cache", ".hypothesis"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not made & set(path.relative_to(ROOT).parts)]


def shell_lines(document: Path) -> list[str]:
    """The commands in a document's ```sh blocks, continuation lines joined, comments and outputs left out."""
    blocks = re.findall(r"^ *```sh\n(.*?)^ *```", document.read_text(encoding="utf-8"), re.M | re.S)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.split(" #")[0].strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_every_command_in_the_documents_exists(tmp_path: Path):
    targets = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.M))
    helps: dict[str, str] = {}
    for document in documents():
        for line in shell_lines(document):
            words = shlex.split(line)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words.pop(0)
            if words[0] == "make":
                assert set(word for word in words[1:] if "=" not in word) <= targets, f"{document.name}: {line}"
            if Path(words[0]).name != "dailies" or len(words) < 2 or words[1].startswith("-"):
                continue
            command = words[1]
            if command not in helps:
                done = run_python(["-m", "dailies", command, "--help"], cwd=tmp_path)
                assert done.returncode == 0, f"{document.name}: {line}\n{done.stderr}"
                helps[command] = done.stdout
            for flag in (word.split("=")[0] for word in words[2:] if word.startswith("--")):
                assert flag in helps[command], f"{document.name}: `{line}`: {command} has no {flag}"


def test_no_document_links_to_a_file_that_is_not_there():
    for document in documents():
        text = re.sub(r"^ *```.*?^ *```", "", document.read_text(encoding="utf-8"), flags=re.M | re.S)
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text):
            if not re.match(r"[a-z]+:", target):
                assert (document.parent / target).exists(), f"{document.relative_to(ROOT)} links to {target}"


@pytest.mark.parametrize("pattern, why", [
    (r"(?<![\w.])/(work|root|opt)/", "a path of somebody's machine"),
    (r"(?<![\w.])/home/(?!dailies)\w+/", "a path of somebody's machine"),
    (r"--(extra-)?index-url|--find-links|PIP_FIND_LINKS|\.org/simple|/simple/|whl/c(u\d|pu)",
     "where packages come from is the environment's business"),
    (r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|\bghp_\w{20,}|\bhf_[A-Za-z]{20,}", "a credential"),
])
def test_no_file_carries(pattern, why):
    found = []
    for path in tracked():
        if path == Path(__file__).resolve():
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}" for number, line in enumerate(lines, 1)
                  if re.search(pattern, line)]
    assert not found, "\n".join([why, *found])


def test_no_file_is_a_link():
    """A link leads to one machine's folders, and git keeps it where a folder of that name is ignored."""
    if not (ROOT / ".git").exists():
        pytest.skip("needs a git checkout: an unpacked source has no list of its files")
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert not [line for line in listed.splitlines() if line.startswith("120000")]


def test_the_example_settings_are_settings():
    from dailies.jobs.settings import RenderJob
    job = RenderJob.read({}, ROOT / "examples" / "night.toml")
    assert (ROOT / job.manifest).suffix == ".parquet"


def required(*extras: str) -> set[str]:
    """The packages that pyproject.toml names, without versions, and with those of these extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    return {canonical(re.match(r"[\w.-]+", line)[0]) for line in lines}


def test_every_requirement_is_pinned_to_a_tested_version():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert not required("gpu", "dev") - {canonical(line.split("==")[0]) for line in lines if "==" in line}


def test_every_import_is_a_requirement():
    wrong = []
    for path in [*modules(), *(ROOT / "tests").glob("*.py")]:
        tests = path.is_relative_to(ROOT / "tests")
        # a benchmark's peer is a tool of development, as what tests compare with
        allowed = required("gpu", "dev") if tests or path.parent.name == "bench" else required("gpu")
        ours = {"dailies", "tests", "s3", "chaos", *(each.stem for each in (ROOT / "tests").glob("*.py") if tests)}
        for library, line in ((dotted.split(".")[0], line) for dotted, line in imported(path)):
            package = canonical(PACKAGED_AS.get(library, library))
            if library not in sys.stdlib_module_names | ours and package not in allowed:
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {library}; add it to pyproject.toml")
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_ours_is_installed_below_one_name():
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {path.parent.relative_to(ROOT) for path in tracked()
               if path.relative_to(ROOT).parts[0] in [*ORDER, "infra"]}
    assert sorted(tools["packages"]) == sorted(["dailies",
                                                *(".".join(["dailies", *folder.parts]) for folder in folders)])
    assert tools["package-dir"] == {"dailies": "dailies"} | {f"dailies.{top}": top for top in [*ORDER, "infra"]}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
