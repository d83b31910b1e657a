"""The order of the house.

Imports run down only and in no circle, files and constructors stay small, every stage has its YAML,
commands answer at once.
"""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "unclip_pl"
FILES = sorted(
    path
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "eval").rglob("*.py")]
    if "_configs" not in path.parts
)

FLOORS = {
    "utils": 1, "diffusion": 1,
    "networks": 2, "clip": 2,
    "data": 3, "cluster": 3, "optim": 3, "planner": 3,
    "stages": 4, "datamodules": 4, "training": 4,
    "pipeline": 5,
    "manipulate": 6, "probe": 6,
    "studio": 7,
    "cli": 8, "eval": 8,
    "__main__": 9,
}  # fmt: skip


def room(module: str) -> str | None:
    """The room of a dotted module name: `eval`, or one inside unclip_pl; None for the package."""
    package, *inside = module.split(".")
    if package == "eval":
        return "eval"
    return inside[0] if inside else None


def imports(path: Path, packages: tuple[str, ...] = ("unclip_pl",)) -> set[str]:
    """Modules of these packages that a file imports, and names in them, lazy imports included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in packages}


def violations(path: Path, module: str) -> list[str]:
    """Imports, lazy ones included, that do not run down; a file of the root is its own room."""
    own = room(module)
    bad = []
    for name in imports(path):
        other = room(name)
        if own is None or other not in FLOORS or other == own:
            continue
        if FLOORS[other] >= FLOORS[own]:
            bad.append(f"{module} (floor {FLOORS[own]}) imports {name} (floor {FLOORS[other]})")
    return bad


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def test_imports_run_down_only():
    bad = [line for path in FILES for line in violations(path, module_of(path))]
    assert not bad, "\n".join(bad)


def test_the_import_test_can_fail(tmp_path):
    upwards = tmp_path / "unet.py"
    upwards.write_text("from unclip_pl.stages.decoder import Decoder\n")
    assert violations(upwards, "unclip_pl.networks.unet")
    sideways = tmp_path / "release.py"
    sideways.write_text("def late():\n    import unclip_pl.stages.decoder\n")
    assert violations(sideways, "unclip_pl.datamodules.base")
    late = tmp_path / "sweep.py"
    late.write_text("def run():\n    from unclip_pl.cli import options\n")
    assert violations(late, "eval.sweep")


def import_graph(files: dict[str, Path]) -> dict[str, set[str]]:
    """The files that each file imports, by module names, lazy imports included."""
    graph = {}
    for module, path in files.items():
        graph[module] = {*files} & imports(path, ("unclip_pl", "eval")) - {module}
    return graph


def test_no_files_import_each_other_in_a_circle():
    files = {module_of(path): path for path in FILES}
    TopologicalSorter(import_graph(files)).prepare()


def test_the_circle_test_can_fail(tmp_path):
    one, other = tmp_path / "one.py", tmp_path / "other.py"
    one.write_text("from unclip_pl.cli.other import name\n")
    other.write_text("def late():\n    from unclip_pl.cli import one\n")
    graph = import_graph({"unclip_pl.cli.one": one, "unclip_pl.cli.other": other})
    with pytest.raises(CycleError):
        TopologicalSorter(graph).prepare()


def test_the_package_does_not_know_what_judges_it():
    for path in FILES:
        if not path.is_relative_to(PACKAGE):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "eval"], path


def test_every_room_has_a_floor():
    rooms = {room(module_of(path)) for path in FILES if path.is_relative_to(PACKAGE)}
    assert rooms - {None} <= set(FLOORS)


def test_files_stay_under_400_lines():
    long = {
        str(path.relative_to(ROOT)): n
        for path in FILES
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long


def test_lines_stay_within_100_columns():
    """Comments for tools included, which ruff leaves out of account."""
    own = [ROOT / "unclip_pl", ROOT / "eval", ROOT / "tests", ROOT / "benchmarks"]
    wide = []
    for path in sorted(path for folder in own for path in folder.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if len(line) > 100:
                wide.append(f"{path.relative_to(ROOT)}:{number}")
    assert not wide


def test_constructors_take_at_most_8_arguments():
    wide = []
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                count = (
                    len(node.args.posonlyargs) + len(node.args.args) + len(node.args.kwonlyargs) - 1
                )
                if count > 8:
                    wide.append(f"{path.name}:{node.lineno} takes {count}")
    assert not wide


def test_every_stage_has_a_yaml():
    yamls = [path.stem for path in (ROOT / "stages").glob("*.yaml")]
    stages = [
        path.stem
        for path in (PACKAGE / "stages").glob("*.py")
        if "(Stage):" in path.read_text(encoding="utf-8")
    ]
    assert len(stages) >= 5
    assert not [stage for stage in stages if not any(yaml.startswith(stage) for yaml in yamls)]


HEAVY = "torch", "lightning", "numpy", "scipy", "PIL", "open_clip"  # seconds to import
WITHOUT_HEAVY = f"""
import sys
def check():
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    assert not heavy, heavy
"""


def run_python(code: str) -> str:
    """What code prints in a process of its own, after `check`, which fails at a heavy import."""
    command = [sys.executable, "-c", WITHOUT_HEAVY + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("option", ["--version", "--help"])
@pytest.mark.parametrize("command", ["lightning", "unclip"])
def test_help_and_version_answer_without_heavy_imports(command, option):
    code = f"""
from unclip_pl.cli.{command} import main
try:
    sys.exit(main(["{option}"]))
except SystemExit as end:
    assert not end.code, end.code
check()
"""
    assert run_python(code)


def test_help_of_every_command_answers_without_heavy_imports():
    code = """
from unclip_pl.cli.unclip import COMMANDS
from unclip_pl.utils.commands import CommandParser
for name, command in COMMANDS.items():
    print(name, CommandParser(command, name).format_help())
check()
"""
    assert {"generate", "upsample", "verify", "pca"} <= set(run_python(code).split())
