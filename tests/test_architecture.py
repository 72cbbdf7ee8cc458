"""The testbed stands as drawn: imports run one way, libraries stay in their rooms, the engine is pure.

The rules are read from the syntax tree, so an import inside a function counts like any other.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("buffer", "serving", "learner", "deploy", "benchmarks")

ALLOWED_FLOORS = {
    "buffer": {"buffer"},
    "serving": {"serving", "buffer"},
    "learner": {"learner", "buffer", "serving"},
    "deploy": {"deploy", "learner", "serving", "buffer"},
    "benchmarks": {"benchmarks", "deploy", "learner", "serving", "buffer"},
}
LEARNER_DOORS = ("serving.models", "serving.engine.sampling", "serving.engine.cost_table")
"""The learner enters serving only through its pure rooms: it sees the distribution that serving used, and
prices a round as the engine does."""

PURE_ROOMS = {
    "serving/engine/passes/": ("serving.engine.passes", "serving.cache_folders"),
    "serving/engine/": ("serving.engine", "buffer.names", "serving.cache_folders"),
    "serving/drafters/": ("serving.drafters", "serving.engine", "serving.models", "buffer.names"),
    "serving/models/": (
        "serving.models",
        "serving.engine.sampling",
        "buffer.names",
        "serving.cache_folders",
    ),
}
"""Rooms of serving, and the only modules of ours that each may import."""

LIBRARY_HOMES: dict[str, Callable[[str], bool]] = {
    "redis": lambda path: path == "buffer/redis_store.py",
    "mlflow": lambda path: path == "learner/tracking/mlflow_tracker.py",
    "ray": lambda path: path in {"serving/replica.py", "learner/actor.py"} or path.startswith("deploy/"),
    "fastapi": lambda path: path.startswith("serving/api/") or path == "serving/replica.py",
    "starlette": lambda path: path.startswith("serving/api/") or path == "serving/replica.py",
    "uvicorn": lambda path: path.startswith("serving/api/") or path == "serving/replica.py",
    "opentelemetry": lambda path: path == "serving/tracing.py",
    "vllm": lambda path: path.startswith("serving/engines/async_llm/"),
    "torch": lambda path: not path.startswith("buffer/"),
    "transformers": lambda path: not path.startswith("buffer/"),
    "peft": lambda path: path.startswith(("serving/models/", "learner/")),
}
MAX_FILE_LINES, MAX_FUNCTION_LINES = 350, 60

FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
LIBRARIES = {*LIBRARY_HOMES, "numpy", "msgpack", "safetensors", "tokenizers", "rich", "typer", "pydantic"}


def sources() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def imported_modules(tree: ast.AST) -> Iterator[str]:
    """Dotted names of everything imported; `from a import b` gives `a.b`, since b may be a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def is_under(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def broken_rules(path: str, source: str) -> list[str]:
    """Every rule that the file at `path` (relative, with slashes) breaks, in words."""
    return [
        f"{path} imports {module}: {reason}"
        for module in imported_modules(ast.parse(source))
        if (reason := _objection(path, module)) is not None
    ]


def _objection(path: str, module: str) -> str | None:
    floor, top = path.split("/")[0], module.split(".")[0]
    if module.startswith("."):
        return "relative; name the module in full"
    if top in FORBIDDEN_MODULES:
        return "never pickle"
    if top in LIBRARY_HOMES and not LIBRARY_HOMES[top](path):
        return f"{top} does not live in this file"
    if top in FOLDERS and top not in ALLOWED_FLOORS[floor]:
        return f"{floor} may not know {top}"
    if floor == "learner" and top == "serving" and not is_under(module, LEARNER_DOORS):
        return "the learner enters serving only through " + " and ".join(LEARNER_DOORS)
    for room, doors in PURE_ROOMS.items():
        if path.startswith(room) and top in FOLDERS and not is_under(module, doors):
            return f"{room} may import only " + ", ".join(doors)
    return None


def test_imports_run_one_way_and_every_library_stays_in_its_room() -> None:
    broken = [
        line
        for path in sources()
        for line in broken_rules(path.relative_to(ROOT).as_posix(), path.read_text())
    ]
    assert broken == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("buffer/records.py", "from serving.engine.request import SamplingParams"),
        ("serving/replica.py", "import learner.loop"),
        ("learner/loop.py", "from serving.engine import engine"),
        ("learner/loop.py", "def late():\n    import ray"),
        ("serving/engine/engine.py", "from buffer import records"),
        ("serving/engine/engine.py", "import fastapi"),
        ("buffer/exporter.py", "import redis"),
        ("learner/loop.py", "import mlflow"),
        ("buffer/codec.py", "import pickle"),
        ("deploy/cluster.py", "from ray import cloudpickle\nimport cloudpickle"),
        ("serving/api/app.py", "from . import keys"),
        ("deploy/commands/demo.py", "def late():\n    from benchmarks.adapted import adapt"),
        ("learner/loop.py", "import deploy.settings"),
        ("serving/local.py", "import benchmarks"),
        ("benchmarks/commands.py", "import ray"),
        ("serving/replica_parts.py", "def late():\n    import vllm"),
        ("serving/replica_parts.py", "def late():\n    import opentelemetry"),
    ],
)
def test_a_file_that_breaks_a_rule_is_caught(path: str, source: str) -> None:
    assert broken_rules(path, source) != []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("learner/distill.py", "from serving.engine.sampling import processed_logprobs"),
        ("learner/distill.py", "from serving.engine import sampling"),
        ("deploy/wiring.py", "import ray\nfrom learner.loop import Learner"),
        ("serving/drafters/ngram.py", "from serving.engine.proposal import Proposal"),
        ("benchmarks/commands.py", "from deploy.commands import demo\nfrom buffer import records"),
    ],
)
def test_a_file_that_keeps_the_rules_passes(path: str, source: str) -> None:
    assert broken_rules(path, source) == []


def shadowing_modules(paths: list[Path]) -> list[str]:
    """Top-level modules of ours, or files run as scripts, that bear a library's or stdlib module's name."""
    taken = LIBRARIES | set(sys.stdlib_module_names)
    return [str(path) for path in paths if path.stem in taken and path.stem != "__init__"]


def test_no_module_bears_the_name_of_a_library_or_a_stdlib_module() -> None:
    packages = [path for path in ROOT.iterdir() if path.name in FOLDERS]
    assert shadowing_modules([*sources(), *packages]) == []
    assert shadowing_modules([Path("learner/queue.py")]) == ["learner/queue.py"]


def run_in_a_clean_interpreter(script: str, *arguments: str) -> list[str]:
    """Top-level modules loaded after `script` ran by itself."""
    report = "\nimport sys\nprint(' '.join(sorted({name.split('.')[0] for name in sys.modules})))"
    command = [sys.executable, "-c", script + report, *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.splitlines()[-1].split()


SERVICES = {"ray", "redis", "mlflow", "fastapi"}


def test_importing_the_engine_loads_no_service() -> None:
    loaded = run_in_a_clean_interpreter("import serving.engine")
    assert SERVICES.isdisjoint(loaded)


def test_generating_text_with_the_library_entry_loads_no_service(tmp_path: Path) -> None:
    from tests.support.tiny_models import save_tiny_pair

    target, draft = save_tiny_pair(tmp_path)
    script = (
        "import sys\n"
        "from serving.engine import SamplingParams\n"
        "from serving.local import load_engine\n"
        "from serving.options import EngineOptions\n"
        "with load_engine(sys.argv[1], sys.argv[2], EngineOptions(num_slots=2, max_seq_len=64)) as engine:\n"
        "    [generation] = engine.generate([[1, 2, 3]], SamplingParams(temperature=0.0, max_tokens=4))\n"
        "assert generation.output_token_ids\n"
    )
    loaded = run_in_a_clean_interpreter(script, str(target), str(draft))
    assert "torch" in loaded
    assert SERVICES.isdisjoint(loaded)


def test_a_clean_interpreter_shows_a_service_that_was_loaded() -> None:
    assert "redis" in run_in_a_clean_interpreter("import redis")


def test_files_and_functions_stay_small() -> None:
    """A file is one screenful of ideas; a function that is longer than a screen is the system."""
    files, functions = {}, {}
    for path in [*sources(), *(ROOT / "docs").glob("*.py")]:
        name, source = path.relative_to(ROOT).as_posix(), path.read_text()
        files[name] = len(source.splitlines())
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                functions[f"{name}:{node.name}"] = node.end_lineno - node.lineno + 1
    assert {name: lines for name, lines in files.items() if lines > MAX_FILE_LINES} == {}
    assert {name: lines for name, lines in functions.items() if lines > MAX_FUNCTION_LINES} == {}


def test_a_class_name_has_one_meaning() -> None:
    where: dict[str, list[str]] = {}
    for path in sources():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where.setdefault(node.name, []).append(path.relative_to(ROOT).as_posix())
    assert {name: files for name, files in where.items() if len(files) > 1} == {}
