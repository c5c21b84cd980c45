"""Which way imports go: every import statement of both packages, wherever in a file it stands, against the rules.

    mflux_vae  <-  pipelines      <-  dreambooth  <-  plugin
    mflux_vae  <-  training core  <-  dreambooth, vae

Pipelines and core never import each other; nor do `vae` and `dreambooth`; nothing imports a `cli`. There is one
exception to the first: the programs that make the embedded pipeline stand on top of the core.
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
"""Core and pipelines both use it; it imports neither."""

PROGRAMS = {f"{TRAINING}.pipelines.tiny.{name}" for name in ("build", "train_flux", "run")}
"""They train the embedded pipeline with the core, its autoencoder as anyone's is. The pipeline never imports them."""

MAY_IMPORT = {
    "component": {"component"},
    "shared": {"component", "shared"},
    "core": {"component", "shared", "core"},
    "pipelines": {"component", "shared", "pipelines"},
    "programs": {"component", "shared", "core", "pipelines", "vae", "programs"},
    "dreambooth": {"component", "shared", "core", "pipelines", "dreambooth"},
    "vae": {"component", "shared", "core", "vae"},
    "plugin": {"component", "shared", "core", "pipelines", "dreambooth", "plugin"},
}

BESIDE = {"mflux_vae.images": {"PIL"}, "mflux_vae.compare.captions": {"PIL"}, "mflux_vae.cli.commands": {"tqdm"}}
"""What modules of the component need beside MLX and numpy."""

ON_DEMAND = {
    "mflux_vae.cli": {"tqdm"},
    "mflux_vae.opening.hub": {"huggingface_hub"},
    "mflux_vae.yaml_files": {"yaml"},
}
"""What modules of the component import inside the functions that use it."""

LIGHT = (
    *("", ".config", ".console", ".fields", ".flags"),
    *(".dreambooth", ".dreambooth.cli", ".vae", ".vae.cli", ".vae.config"),
)
"""What a command line needs for `--help`."""


def room(module: str) -> str:
    """The part of the house that a module stands in."""
    top, *below = module.split(".")
    if top == COMPONENT:
        return "component"
    if module in SHARED_GROUND or not below:
        return "shared"
    if module in PROGRAMS:
        return "programs"
    return below[0] if below[0] in MAY_IMPORT else "core"


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
    """What a statement imports: a module of ours by its full name, anything else by its package's."""
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
    """What a module imports, anywhere or (`at_top`) while it is itself imported."""
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    nodes = tree.body if at_top else ast.walk(tree)
    statements = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return frozenset(name for node in statements for name in named(module, node))


def ours(names: frozenset[str]) -> set[str]:
    return {name for name in names if name in modules()}


def test_every_module_imports_only_downwards() -> None:
    wrong = [
        f"{module} ({room(module)}) imports {name} ({room(name)})"
        for module in modules()
        for name in sorted(ours(imports(module)))
        if room(name) not in MAY_IMPORT[room(module)]
    ]
    assert not wrong, "\n".join(wrong)


def test_the_exception_is_as_small_as_it_is_written() -> None:
    """Each program exists, and needs the core itself or another program; otherwise it is no exception."""
    assert modules().keys() >= PROGRAMS
    for program in sorted(PROGRAMS):
        assert {room(name) for name in ours(imports(program))} & {"core", "programs"}, program


def test_nothing_imports_a_command_line() -> None:
    wrong = [
        f"{module} imports {name}"
        for module in modules()
        for name in ours(imports(module))
        if name.split(".")[-1] in ("cli", "__main__") and module != f"{name}.__main__"
    ]
    assert not wrong, "\n".join(wrong)


def test_there_are_no_circles() -> None:
    """Not even through a function's late imports, within the rooms that import at their top."""
    seen: dict[str, bool] = {}  # True while its imports are being followed

    def follow(module: str, path: tuple[str, ...]) -> None:
        assert not seen.get(module), " -> ".join([*path[path.index(module) :], module])
        if module in seen:
            return
        seen[module] = True
        for name in sorted(ours(imports(module, at_top=True)) - {module}):
            follow(name, (*path, module))
        seen[module] = False

    for module in modules():
        follow(module, ())


@pytest.mark.parametrize(
    ("module", "unknown"),
    [
        # networks know no file, name of a checkpoint, or preset
        ("mflux_vae.networks", {"weights", "vae", "images", "opening", "loading", "metrics", "tiling"}),
        ("mflux_vae.layers", {"networks", "weights", "vae", "images", "posterior"}),
        ("mflux_vae.kernels", {"layers", "networks", "weights", "vae", "images", "posterior", "errors"}),
        ("mflux_vae.weights", {"networks", "layers", "vae", "images", "opening"}),
        ("mflux_vae.images", {"networks", "layers", "vae", "weights", "kernels", "runtime"}),
    ],
)
def test_what_parts_of_the_component_do_not_know(module: str, unknown: set[str]) -> None:
    for name in modules():
        if name == module or name.startswith(f"{module}."):
            below = {
                other.split(".")[1] for other in ours(imports(name)) if "." in other and room(other) == "component"
            }
            assert not below & unknown, f"{name} imports {sorted(below & unknown)}"


@pytest.mark.parametrize("module", ["loop", "step"])
def test_the_loop_knows_no_image_model_or_adapter(module: str) -> None:
    known = {f"{COMPONENT}.errors", f"{COMPONENT}.runtime"}
    found = ours(imports(f"{TRAINING}.{module}"))
    assert {name for name in found if room(name) == "component"} <= known
    assert f"{TRAINING}.lora" not in found


def test_the_component_needs_mlx_and_numpy_and_pillow_for_pictures_only() -> None:
    for module in modules():
        if room(module) == "component":
            known = modules().keys() | sys.stdlib_module_names
            allowed = {"mlx", "numpy", *BESIDE.get(module, ())}
            assert imports(module, at_top=True) - known <= allowed, module
            assert imports(module) - known <= allowed | ON_DEMAND.get(module, set()), module


def test_one_module_alone_names_the_host() -> None:
    naming = {module for module in modules() if "mflux" in imports(module)}
    assert naming <= {f"{TRAINING}.pipelines.mflux_adapter"}


@pytest.mark.parametrize("module", LIGHT)
def test_a_command_line_imports_what_computes_only_when_it_computes(module: str) -> None:
    at_top = imports(TRAINING + module, at_top=True)
    outside = at_top - modules().keys() - sys.stdlib_module_names
    assert not outside, f"{sorted(outside)} at the top of {TRAINING + module}"
    assert {name.removeprefix(TRAINING) for name in ours(at_top) if name.startswith(TRAINING)} <= {*LIGHT, ".schedule"}


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
