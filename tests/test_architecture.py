"""Import rules of both packages: every import statement, wherever it stands in a file, TYPE_CHECKING included.

    mflux_vae  <-  pipelines      <-  evaluation  <-  dreambooth  <-  plugin
    mflux_vae  <-  training core  <-  dreambooth, vae

Pipelines and training core never import each other; nor do `vae` and `dreambooth`; nothing imports a `cli`. Inside
`dreambooth`: data <- optimization <- planning <- reporting <- drawing <- evaluation. The programs of `tiny_world`
may import everything.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMPONENT, TRAINING = "mflux_vae", "mflux_vae_train"

SHARED_GROUND = {f"{TRAINING}.{name}" for name in ("randomness", "fingerprint")}
"""Modules that core and pipelines share."""

CORE = {"training", "checkpointing", "distributed", "settings", "monitoring", "optimizers", "lora"}
"""Packages of the training core."""

MAY_IMPORT = {
    "component": {"component"},
    "shared": {"component", "shared"},
    "core": {"component", "shared", "core"},
    "pipelines": {"component", "shared", "pipelines"},
    "evaluation": {"component", "shared", "pipelines", "evaluation"},
    "dreambooth": {"component", "shared", "core", "pipelines", "evaluation", "dreambooth"},
    "vae": {"component", "shared", "core", "vae"},
    "plugin": {"component", "shared", "core", "pipelines", "evaluation", "dreambooth", "plugin"},
    "tiny_world": {"component", "shared", "core", "pipelines", "evaluation", "vae", "tiny_world"},
}

DREAMBOOTH_ORDER = ("data", "optimization", "planning", "reporting", "drawing", "evaluation", "inspection")
"""Packages of `dreambooth`: each imports only itself and those before it."""

MAX_FILES = 14
"""Python files in a folder."""

BESIDE = {
    **{name: {"PIL"} for name in ("images", "image_files.colour", "image_files.modes", "image_files.reading")},
    "compare.labels": {"PIL"},
    "kernels.cpu.native.build": {"setuptools"},
}
BESIDE = {f"mflux_vae.{module}": requirements for module, requirements in BESIDE.items()}
"""Further requirements of modules of the component."""

ON_DEMAND = {
    "mflux_vae.kernels.cpu.native.build": {"nanobind"},
    "mflux_vae.image_files.reading": {"pillow_heif"},
    "mflux_vae.utils.console": {"tqdm"},
    "mflux_vae.utils.item_bar": {"tqdm"},
    "mflux_vae.pretrained.hub": {"huggingface_hub"},
    "mflux_vae.utils.yaml_io": {"yaml"},
}
"""Imports inside functions of the component."""

LIGHT = (
    *("", ".settings", ".settings.fields", ".settings.flags", ".settings.origins", ".settings.values"),
    *(".optimizers", ".optimizers.registry", ".training.awake"),
    *(
        ".pipelines",
        ".pipelines.noise",
        ".dreambooth",
        ".dreambooth.cli",
        ".dreambooth.commands",
        ".dreambooth.commands.adapter",
        ".dreambooth.commands.arguments",
        ".dreambooth.commands.check",
        ".dreambooth.commands.draw",
        ".dreambooth.commands.evaluate",
        ".dreambooth.config",
        ".vae",
        ".vae.cli",
        ".vae.config",
    ),
)
"""Modules that `--help` imports."""


def room(module: str) -> str:
    """The group of packages that a module belongs to: a key of `MAY_IMPORT`."""
    top, *below = module.split(".")
    if top == COMPONENT:
        return "component"
    if module in SHARED_GROUND or not below:
        return "shared"
    return "core" if below[0] in CORE else below[0]


@cache
def modules() -> dict[str, Path]:
    """Every module of both packages, by name."""
    found = {}
    for package in (COMPONENT, TRAINING):
        for path in sorted((ROOT / package).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path
    return found


def named(module: str, node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    """Yield imported modules: ours by full name, others by package."""
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    else:
        source = node.module or ""
        if node.level:  # relative: as many parents up as there are dots
            package = module if modules()[module].name == "__init__.py" else module.rpartition(".")[0]
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            source = ".".join([*parents, *([source] if source else [])])
        # `from package import name`: a module of that package, or something inside it
        inside = [f"{source}.{alias.name}" for alias in node.names]
        names = [name if name in modules() else source for name in inside]
    for name in names:
        yield name if name in modules() else name.split(".")[0]


@cache
def imports(module: str, *, at_top: bool = False) -> frozenset[str]:
    """Imports of a module, everywhere or only at module level (`at_top`)."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    nodes = tree.body if at_top else ast.walk(tree)
    statements = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return frozenset(name for node in statements for name in named(module, node))


def ours(names: frozenset[str]) -> set[str]:
    return {name for name in names if name in modules()}


def test_import_rules() -> None:
    wrong = [
        f"{module} ({room(module)}) imports {name} ({room(name)})"
        for module in modules()
        for name in sorted(ours(imports(module)))
        if room(name) not in MAY_IMPORT[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_imports_a_command_line() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in ours(imports(module))
        if name.split(".")[-1] in ("cli", "__main__") and module != f"{name}.__main__"
    ]
    assert not wrong, "\n".join(wrong)


def test_dreambooth_packages_import_in_one_direction() -> None:
    def place(name: str) -> int | None:
        package = name.removeprefix(f"{TRAINING}.dreambooth.").split(".")[0]
        return DREAMBOOTH_ORDER.index(package) if package in DREAMBOOTH_ORDER else None

    wrong = [
        f"{module} imports {name}"
        for module in modules()
        if module.startswith(f"{TRAINING}.dreambooth.") and place(module) is not None
        for name in sorted(ours(imports(module)))
        if name.startswith(f"{TRAINING}.dreambooth.") and (place(name) or 0) > (place(module) or 0)
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_cycles() -> None:
    """Imports inside functions and under TYPE_CHECKING count."""
    state: dict[str, bool] = {}  # True while the imports of a module are being followed
    cycles: set[tuple[str, ...]] = set()

    def follow(module: str, path: tuple[str, ...]) -> None:
        if state.get(module):
            cycle = path[path.index(module) :]
            start = cycle.index(min(cycle))
            cycles.add((*cycle[start:], *cycle[:start]))
        if module in state:
            return
        state[module] = True
        for name in sorted(ours(imports(module)) - {module}):
            follow(name, (*path, module))
        state[module] = False

    for module in modules():
        follow(module, ())
    assert not cycles, "\n".join(" -> ".join(cycle) for cycle in sorted(cycles))


@pytest.mark.parametrize("package", [COMPONENT, TRAINING, "tests", "benchmarks"])
def test_folders_hold_few_files(package: str) -> None:
    folders = {path.parent for path in (ROOT / package).rglob("*.py")}
    counts = {str(folder.relative_to(ROOT)): len(list(folder.glob("*.py"))) for folder in folders}
    crowded = {folder for folder, count in counts.items() if count > MAX_FILES}
    assert not crowded


def test_parity_tests_are_in_their_folder() -> None:
    """`pytest -m parity` imports no other test files."""
    marker = "mark.par" + "ity"
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if marker in path.read_text()]
    assert [path for path in files if ROOT / "tests/parity" not in path.parents] == []


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        # networks know no file, name of a checkpoint, or preset
        ("mflux_vae.networks", {"weights", "vae", "images", "pretrained", "metrics", "tiling"}),
        ("mflux_vae.networks.layers", {"networks", "weights", "vae", "images", "posterior"}),
        ("mflux_vae.kernels", {"networks", "weights", "vae", "images", "posterior", "errors"}),
        ("mflux_vae.weights", {"networks", "vae", "images", "pretrained"}),
        ("mflux_vae.images", {"networks", "vae", "weights", "kernels", "runtime"}),
    ],
)
def test_packages_of_the_component_do_not_import_each_other(module: str, unknown: set[str]) -> None:
    for name in modules():
        if name == module or name.startswith(f"{module}."):
            below = {
                other.split(".")[1] for other in ours(imports(name)) if "." in other and room(other) == "component"
            }
            assert not below & unknown, f"{name} imports {sorted(below & unknown)}"


@pytest.mark.parametrize("module", ["training.loop", "training.step"])
def test_training_loop_knows_no_image_model_or_adapter(module: str) -> None:
    runtime = (f"{COMPONENT}.runtime.{name}" for name in ("device", "device_errors", "threads"))
    known = {f"{COMPONENT}.errors", f"{COMPONENT}.kernels.cpu.compile", *runtime}
    found = ours(imports(f"{TRAINING}.{module}"))
    assert {name for name in found if room(name) == "component"} <= known
    assert f"{TRAINING}.lora" not in found


def test_component_needs_mlx_numpy_and_pillow_only() -> None:
    for module in modules():
        if room(module) == "component":
            known = modules().keys() | sys.stdlib_module_names
            allowed = {"mlx", "numpy", *BESIDE.get(module, ())}
            assert imports(module, at_top=True) - known <= allowed, module
            assert imports(module) - known <= allowed | ON_DEMAND.get(module, set()), module


def test_one_module_knows_mflux() -> None:
    naming = {module for module in modules() if "mflux" in imports(module)}
    assert naming <= {f"{COMPONENT}.integrations.mflux"}


def test_mlx_lm_is_imported_for_dora_only() -> None:  # it takes seconds
    dora = f"{TRAINING}.lora.dora"
    assert {module for module in modules() if "mlx_lm" in imports(module)} == {dora}
    assert not [module for module in modules() if dora in imports(module, at_top=True)]


@pytest.mark.parametrize("module", LIGHT)
def test_command_lines_import_heavy_packages_late(module: str) -> None:
    at_top = imports(TRAINING + module, at_top=True)
    outside = at_top - modules().keys() - sys.stdlib_module_names
    assert not outside, f"{sorted(outside)} at the top of {TRAINING + module}"
    assert {name.removeprefix(TRAINING) for name in ours(at_top) if name.startswith(TRAINING)} <= {
        *LIGHT,
        ".training",
        ".training.lr_schedule",
    }


def test_help_loads_nothing_heavy() -> None:
    code = """
import sys
from mflux_vae_train.dreambooth.cli import main
try:
    main(["--help"])
except SystemExit as stopped:
    assert not stopped.code
print(*sorted({name.split(".")[0] for name in sys.modules}), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--instance_prompt" in done.stdout
    heavy = {"transformers", "torch", "mlx_lm", "numpy", "PIL", "matplotlib", "yaml"}
    assert not heavy & set(done.stderr.split())
