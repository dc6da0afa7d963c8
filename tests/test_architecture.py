"""The layout of the package, checked from its sources: order of the wings, cycles, sizes, a test for each module.

Each check is a function from sources by path to the list of what is wrong; the tests run it on the project, where the
list must be empty, and on two lines that it must find fault with.
"""

import ast
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

import pytest

from tests.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Sources = Mapping[str, str]  # by path from the root of the repository, as "rdoq_onnx/model/graph.py"

# Each imports only from those before it: folders of rdoq_onnx, and modules at its root.
ORDER = (
    "errors",
    "version",
    "targets",
    "config_file",
    "model",
    "calibration",
    "config",
    "options",
    "keywords",
    "passes",
    "system",
    "cluster",
    "analysis",
    "observation",
    "kernels",
    "gradients",
    "candidates",
    "probing",
    "curves",
    "cost",
    "allocation",
    "emission",
    "profiling",
    "reconstruction",
    "refinement",
    "verification",
    "report",
    "estimate",
    "pipeline",
    "api",
    "integrations",
    "cli",
    "__main__",
)
BELOW_PASSES = ("errors", "version", "targets", "config_file", "model")
NUMPY_ONLY = (
    "curves/curves.py",
    "allocation/allocate.py",
    "allocation/paired.py",
    "model/union_find.py",
    "candidates/quantizer.py",
    "model/codes.py",
    "model/grid.py",
)
ADAPTERS = {
    "onnxruntime": ("rdoq_onnx/system/runtime.py",),
    "ray": ("rdoq_onnx/cluster/ray_cluster.py", "rdoq_onnx/cluster/process.py"),
    "openvino": ("rdoq_onnx/system/openvino_runtime.py",),
    "onnx_graphsurgeon": tuple(f"rdoq_onnx/model/{m}.py" for m in ("surgeon", "graft", "lazy_values")),
}

ROOT_FILES = 12
LINES = 250
LONG_MODULES = {
    "rdoq_onnx/config.py": "one declaration and one check per setting",
    "rdoq_onnx/options.py": "one declaration per option, with its help",
    "rdoq_onnx/report/figures.py": "one function per plot of the page",
    "rdoq_onnx/system/runtime.py": "the one importer of ONNX Runtime",
}
LONG_MODULES_ALLOWED = 8
PARAMETERS = 6
LONG_SIGNATURES_ALLOWED = 0
LONG_SIGNATURES_FREE = ("rdoq_onnx/cli.py", "rdoq_onnx/options.py", "rdoq_onnx/api.py")  # a parameter an option

# Modules without a test file of their name: what tests them instead, by a module that imports them if not directly.
TESTED_ELSEWHERE = {
    "__init__": "tests/test_api.py",
    "errors": "tests/test_cli.py",
    "options": "tests/test_cli.py",
    "version": "tests/test_cli.py",
    "pipeline": "tests/refinement/test_search.py",
    "observation/inputs": "tests/observation/test_observe.py",
    "emission/naming": "tests/emission/test_tools.py",
    "passes/zeros": "tests/passes/test_insert_qdq.py",
    "passes/normalization/linear_layer": "tests/passes/normalization/test_fold_batchnorm.py",
    "refinement/best": "tests/refinement/test_refine.py",
    "refinement/trial": "tests/refinement/test_diversion.py",
    "refinement/reference": "tests/verification/test_verify.py",
    "report/layer_report": "tests/report/test_html_report.py",
    "report/contents": "tests/report/test_documents.py",
    "report/outcome": "tests/report/test_html_report.py",
    "cluster/process": "tests/cluster/test_ray_cluster.py",
    "cluster/shipping": "tests/cluster/test_ray_cluster.py",
    "curves/stores": "tests/curves/test_shards.py",
    "calibration/conversion": "tests/calibration/test_load.py",
    "calibration/loaders": "tests/calibration/test_feeds.py",
    "passes/__init__": "tests/passes/normalization/test_normalize.py",
    "passes/normalization/hoist_weights": "tests/analysis/test_stored_weights.py",
    "passes/normalization/inline_functions": "tests/passes/normalization/test_widen_floats.py",
    "passes/packing/decoding": "tests/passes/packing/test_pack_vectors.py",
    "passes/packing/sub_byte_parts": "tests/passes/packing/test_pack_weights.py",
    "passes/pruning/slice_channels": "tests/passes/pruning/test_remove_channels.py",
    "passes/unfusing/activations": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/attention": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/block": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/grouped": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/norms": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/products": "tests/passes/unfusing/test_unfuse.py",
    "passes/unfusing/rotary": "tests/passes/unfusing/test_unfuse.py",
    "passes/quantize_stored": "tests/analysis/test_stored_weights.py",
    "passes/replace_weights": "tests/refinement/test_refine.py",
    "model/equality": "tests/model/test_external.py",
    "model/graft": "tests/model/test_surgeon.py",
    "model/layers": "tests/analysis/test_analyse.py",
    "analysis/activations": "tests/analysis/test_analyse.py",
    "analysis/network": "tests/analysis/test_analyse.py",
    "analysis/normalization": "tests/analysis/test_analyse.py",
    "gradients/backward": "tests/candidates/test_moments.py",
    "gradients/elementwise": "tests/gradients/test_reverse.py",
    "gradients/foreign": "tests/gradients/test_reverse.py",
    "gradients/im2col_nodes": "tests/gradients/test_sum_graph.py",
    "gradients/packed_products": "tests/gradients/test_opened.py",
    "gradients/products": "tests/gradients/test_reverse.py",
    "gradients/shapes": "tests/gradients/test_reverse.py",
    "candidates/absorbing": "tests/candidates/test_channel_scales.py",
    "candidates/candidates": "tests/candidates/test_make.py",
    "candidates/scale_groups": "tests/candidates/test_channel_scales.py",
    "observation/shapes": "tests/candidates/test_channel_scales.py",
    "candidates/layer_rows": "tests/candidates/test_sensitivity.py",
    "candidates/moment_passes": "tests/candidates/test_moments.py",
    "probing/distortions": "tests/probing/test_probe.py",
    "probing/missing_curves": "tests/curves/test_taylor.py",
    "curves/measure": "tests/curves/test_float_fallback.py",
    "curves/measurement": "tests/curves/test_float_fallback.py",
    "curves/scaling": "tests/candidates/test_channel_scales.py",
    "curves/select": "tests/curves/test_float_fallback.py",
    "curves/steps": "tests/curves/test_float_fallback.py",
    "allocation/allocation": "tests/allocation/test_budget.py",
    "curves/layerwise": "tests/curves/test_large.py",
    "estimate/speeds": "tests/estimate/test_seconds.py",
    "estimate/work": "tests/estimate/test_seconds.py",
    "emission/quantized_model": "tests/candidates/test_make.py",
    "emission/storage": "tests/verification/test_verify.py",
    "refinement/affine_correction": "tests/refinement/test_refine.py",
    "refinement/judge": "tests/refinement/test_refine.py",
    "refinement/reround": "tests/refinement/test_refine.py",
    "system/files": "tests/test_cli.py",
    "system/turns": "tests/verification/test_latency.py",
    "verification/part_figures": "tests/verification/test_gates.py",
    "verification/runs": "tests/verification/test_verify.py",
    "verification/widths": "tests/verification/test_verify.py",
    "report/figures": "tests/report/test_html_report.py",
    "report/html_page": "tests/report/test_html_report.py",
    "verification/details": "tests/report/test_html_report.py",
    "report/html_layers": "tests/report/test_html_report.py",
    "report/html_run": "tests/report/test_html_report.py",
    "report/html_script": "tests/report/test_html_report.py",
    "report/html_table": "tests/report/test_html_report.py",
    "report/report": "tests/report/test_html_report.py",
    "report/result": "tests/report/test_html_report.py",
}


def sources_of(*folders: str) -> dict[str, str]:
    """The Python files below `folders` of the repository."""
    paths = sorted(p for folder in folders for p in (ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding="utf-8") for p in paths}


PROJECT = sources_of("rdoq_onnx", "passes")
TESTS = sources_of("tests")


def module_of(path: str) -> str:
    """The name that a file is imported by."""
    name = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return f"rdoq_onnx.{name}" if name.split(".")[0] == "passes" else name


def wing_of(module: str) -> str:
    """Folder of rdoq_onnx that `module` is in, or its own name at the root; empty for the package itself."""
    return f"{module}.".split(".")[1]


def imported(source: str) -> Iterator[str]:
    """Every name that `source` imports, dotted, also inside functions: of `from a import b` a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ("." * node.level + f"{node.module or ''}.{alias.name}" for alias in node.names)


def module_imports(source: str, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that `source` imports or takes something from."""
    known, found = set(modules), set()
    for name in imported(source):
        found.add(name if name in known else name.rpartition(".")[0])
    return found & known


def import_graph(sources: Sources) -> dict[str, set[str]]:
    """By module, the modules of `sources` that it imports. The package itself, which re-exports, is left out."""
    modules = {module_of(path) for path in sources} - {"rdoq_onnx"}
    return {module_of(p): module_imports(s, modules) for p, s in sources.items() if module_of(p) in modules}


def import_order(sources: Sources) -> list[str]:
    """Imports against ORDER."""
    wrong = []
    for path, source in sources.items():
        wing = wing_of(module_of(path))
        if not wing:
            continue
        if wing not in ORDER:
            wrong.append(f"{path}: {wing!r} has no place in the order of the wings; give it one in ORDER")
            continue
        for name in sorted(set(imported(source))):
            other = wing_of(name) if name.split(".")[0] == "rdoq_onnx" else wing
            if other not in ORDER:
                wrong.append(f"{path} imports {name} from the package itself; import the module that defines it")
            elif ORDER.index(other) > ORDER.index(wing):
                wrong.append(f"{path} imports {name}, which comes after {wing} in the order; move one of the two")
            if name.startswith("."):
                wrong.append(f"{path} imports {name}, relative to itself; write the name out")
    return wrong


def passes_stand_alone(sources: Sources) -> list[str]:
    """Passes that import more than the model and the leaves of the root."""
    allowed = (*BELOW_PASSES, "passes")
    return [
        f"{path} imports {name}: a pass knows models alone; hand it what it needs as a field"
        for path, source in sources.items()
        if path.startswith("passes/")
        for name in sorted(set(imported(source)))
        if name.startswith("rdoq_onnx.") and wing_of(name) not in allowed
    ]


def cycles(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """A cycle of `graph`, if it has any."""
    done: set[str] = set()

    def visit(node: str, path: tuple[str, ...]) -> list[str]:
        if node in path:
            return [" imports ".join((*path[path.index(node) :], node)) + "; move what both need below them"]
        found = [] if node in done else [c for n in sorted(graph.get(node, ())) for c in visit(n, (*path, node))]
        done.add(node)
        return found

    return [cycle for node in sorted(graph) for cycle in visit(node, ())]


def file_cycles(sources: Sources) -> list[str]:
    """Files that import each other."""
    return cycles(import_graph(sources))


def folder_cycles(sources: Sources) -> list[str]:
    """Folders that import each other; each module at the root of rdoq_onnx counts for one."""
    folders = {
        module_of(path): module_of(path)
        if path.count("/") == 1 and path.startswith("rdoq_onnx/")
        else module_of(path.rsplit("/", 1)[0])
        for path in sources
    }
    graph: dict[str, set[str]] = {}
    for module, others in import_graph(sources).items():
        graph.setdefault(folders[module], set()).update({folders[o] for o in others} - {folders[module]})
    return cycles(graph)


def folder_docstrings(sources: Sources) -> list[str]:
    """Folders without an `__init__.py` of three lines that say what the folder is, takes, gives and imports."""
    wrong = []
    for folder in sorted({path.rsplit("/", 1)[0] for path in sources} - {"rdoq_onnx", "passes"}):
        path = f"{folder}/__init__.py"
        if path not in sources:
            wrong.append(f"{path} is missing; add it, with three lines on what the folder holds")
            continue
        tree = ast.parse(sources[path])
        lines = [line for line in (ast.get_docstring(tree) or "").splitlines() if line.strip()]
        if len(lines) != 3:
            wrong.append(f"{path} has {len(lines)} lines of docstring; say in three what it is, takes and imports")
        if tree.body[1:]:
            wrong.append(f"{path} holds code; move it to a module of the folder")
    return wrong


def unlisted_packages(sources: Sources, packages: Iterable[str]) -> list[str]:
    """Folders that the wheel would lack, and packages of pyproject.toml that have no folder."""
    folders = {module_of(path.rsplit("/", 1)[0]) for path in sources}
    listed = set(packages)
    return [f"pyproject.toml: add {name!r} to setuptools' packages" for name in sorted(folders - listed)] + [
        f"pyproject.toml: {name!r} has no folder; take it out of setuptools' packages"
        for name in sorted(listed - folders)
    ]


def numpy_only(sources: Sources) -> list[str]:
    """Imports of the pure modules beyond numpy, the standard library, errors and each other."""
    pure = {f"rdoq_onnx/{path}" for path in NUMPY_ONLY}
    allowed = {module_of(path) for path in pure} | {"rdoq_onnx.errors"}
    known = allowed | {module_of(path) for path in PROJECT} - {"rdoq_onnx"}
    wrong = [f"{path} has moved; say where to in NUMPY_ONLY" for path in sorted(pure - sources.keys())]
    for path in sorted(pure & sources.keys()):
        outside = {name.split(".")[0] for name in imported(sources[path])} - {"numpy", "rdoq_onnx"}
        found = (outside - set(sys.stdlib_module_names)) | (module_imports(sources[path], known) - allowed)
        wrong += [f"{path} imports {name}: it is arithmetic on arrays alone; pass it plain data" for name in found]
    return wrong


def wrapped_libraries(sources: Sources) -> list[str]:
    """Imports of ONNX Runtime, OpenVINO and graphsurgeon outside the modules that wrap them."""
    return [
        f"{path} imports {name}; call {' or '.join(ADAPTERS[name])} instead"
        for path, source in sources.items()
        for name in sorted({n.split(".")[0] for n in imported(source)} & ADAPTERS.keys())
        if path not in ADAPTERS[name]
    ]


def crowded_root(sources: Sources) -> list[str]:
    """The root of rdoq_onnx, if it holds too many files."""
    found = sorted(p for p in sources if p.startswith("rdoq_onnx/") and p.count("/") == 1)
    wrong = f"rdoq_onnx/ holds {len(found)} files, at most {ROOT_FILES}; move one into a wing: {', '.join(found)}"
    return [wrong] if len(found) > ROOT_FILES else []


def long_modules(sources: Sources, reasons: Mapping[str, str]) -> list[str]:
    """Modules over LINES without a reason, reasons of modules that are short by now, and too many of them."""
    long = {path: n for path, s in sources.items() if (n := len(s.splitlines())) > LINES}
    wrong = [f"{p} has {n} lines, at most {LINES}; divide it" for p, n in long.items() if p not in reasons]
    wrong += [f"{p} is no longer over {LINES} lines; strike it from LONG_MODULES" for p in reasons if p not in long]
    if len(reasons) > LONG_MODULES_ALLOWED:
        wrong.append(f"{len(reasons)} modules are over {LINES} lines, at most {LONG_MODULES_ALLOWED}; divide one")
    return wrong


def long_signatures(sources: Sources, allowed: int) -> list[str]:
    """All functions of more than PARAMETERS parameters, if these are more than `allowed`."""
    found = [
        f"{path}: {node.name} takes {count}"
        for path, source in sources.items()
        if path not in LONG_SIGNATURES_FREE
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (count := _parameters(node)) > PARAMETERS
    ]
    advice = f"{len(found)} functions take over {PARAMETERS} parameters, at most {allowed}; pass a dataclass"
    return [f"{advice}: {'; '.join(found)}"] if len(found) > allowed else []


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    return sum(a.arg not in ("self", "cls") for a in (*given.posonlyargs, *given.args, *given.kwonlyargs))


def untested_modules(sources: Sources, tests: Sources, elsewhere: Mapping[str, str]) -> list[str]:
    """Modules without a test file of their name, unless that of `elsewhere` imports them or an importer of them."""
    graph = import_graph(sources)
    modules = {path: module_of(path) for path in sources}
    wrong = []
    for path in sources:
        key = path.removeprefix("rdoq_onnx/").removesuffix(".py")
        own = "tests/" + "/".join([*key.split("/")[:-1], f"test_{key.split('/')[-1]}.py"])
        if own in tests or not _has_code(sources[path]):
            if key in elsewhere:
                wrong.append(f"{path} has a test file of its own, or no code; strike it from TESTED_ELSEWHERE")
        elif key not in elsewhere:
            wrong.append(f"{path}: write {own}, or say in TESTED_ELSEWHERE which file tests it")
        elif elsewhere[key] not in tests:
            wrong.append(f"{path}: {elsewhere[key]} does not exist; say in TESTED_ELSEWHERE which file tests it")
        else:
            direct = called_by(elsewhere[key], tests, modules.values())
            if modules[path] not in direct.union(*(graph.get(name, set()) for name in direct)):
                wrong.append(f"{path}: {elsewhere[key]} imports neither it nor an importer of it; name another file")
    known = {path.removeprefix("rdoq_onnx/").removesuffix(".py") for path in sources}
    return wrong + [f"{key} is no module; strike it from TESTED_ELSEWHERE" for key in elsewhere.keys() - known]


def called_by(path: str, tests: Sources, modules: Iterable[str]) -> set[str]:
    """Those of `modules` that a test imports, itself or by the helpers of the tests that it imports."""
    files = {module_of(name): source for name, source in tests.items()}
    helpers = module_imports(tests[path], files)
    return set().union(*(module_imports(source, modules) for source in (tests[path], *(files[h] for h in helpers))))


def _has_code(source: str) -> bool:
    return len(ast.parse(source).body) > 1


def report(wrong: Iterable[str]) -> str:
    return "\n".join(["", *wrong])


def packages() -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed: list[str] = project["tool"]["setuptools"]["packages"]
    return listed


CHECKS: dict[str, Callable[[Sources], list[str]]] = {
    "imports go down the order of the wings": import_order,
    "a pass imports only the model and the leaves": passes_stand_alone,
    "no files import each other": file_cycles,
    "no folders import each other": folder_cycles,
    "each folder says what it is": folder_docstrings,
    "the wheel has every folder": lambda sources: unlisted_packages(sources, packages()),
    "the arithmetic needs nothing but numpy": numpy_only,
    "each library has its adapter": wrapped_libraries,
    "the root is no drawer": crowded_root,
    "long modules have a reason": lambda sources: long_modules(sources, LONG_MODULES),
    "long signatures are few": lambda sources: long_signatures(sources, LONG_SIGNATURES_ALLOWED),
    "each module has a test": lambda sources: untested_modules(sources, TESTS, TESTED_ELSEWHERE),
}


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_the_project_keeps_its_layout(check):
    assert not (wrong := check(PROJECT)), report(wrong)


def test_every_part_of_the_package_is_in_the_order():
    parts = {wing_of(module_of(path)) for path in PROJECT} - {""}
    assert parts == set(ORDER)


BAD = {
    "an import against the order": (import_order, {"rdoq_onnx/model/a.py": "import rdoq_onnx.curves.b"}),
    "one inside a function": (
        import_order,
        {"rdoq_onnx/model/a.py": "def f():\n    from rdoq_onnx.curves import b"},
    ),
    "one of the package's own names": (import_order, {"rdoq_onnx/errors.py": "from rdoq_onnx import quantize"}),
    "one of the package": (import_order, {"rdoq_onnx/errors.py": "import rdoq_onnx"}),
    "one by `from rdoq_onnx import`": (import_order, {"rdoq_onnx/errors.py": "from rdoq_onnx import pipeline"}),
    "a root module against the order": (import_order, {"rdoq_onnx/errors.py": "from rdoq_onnx.api import measure"}),
    "a new wing": (import_order, {"rdoq_onnx/extras/a.py": ""}),
    "a relative import": (import_order, {"rdoq_onnx/model/a.py": "from . import b"}),
    "a pass that runs models": (passes_stand_alone, {"passes/a.py": "from rdoq_onnx.system.runtime import Runtime"}),
    "two files": (
        file_cycles,
        {
            "rdoq_onnx/model/a.py": "from rdoq_onnx.model.b import c",
            "rdoq_onnx/model/b.py": "from rdoq_onnx.model import a",
        },
    ),
    "three folders": (
        folder_cycles,
        {
            "rdoq_onnx/model/a.py": "import rdoq_onnx.curves.a",
            "rdoq_onnx/curves/a.py": "import rdoq_onnx.system.a",
            "rdoq_onnx/system/a.py": "import rdoq_onnx.model.b",
            "rdoq_onnx/model/b.py": "",
        },
    ),
    "a folder without a docstring": (folder_docstrings, {"rdoq_onnx/model/a.py": ""}),
    "a docstring of one line": (folder_docstrings, {"rdoq_onnx/model/__init__.py": '"""Models."""'}),
    "a folder that imports": (
        folder_docstrings,
        {"rdoq_onnx/model/__init__.py": '"""A.\n\nB.\nC.\n"""\nimport os'},
    ),
    "a folder that the wheel lacks": (CHECKS["the wheel has every folder"], {**PROJECT, "rdoq_onnx/extras/a.py": ""}),
    "a package without a folder": (CHECKS["the wheel has every folder"], {"rdoq_onnx/model/a.py": ""}),
    "arithmetic on models": (
        numpy_only,
        {**PROJECT, "rdoq_onnx/model/codes.py": "import onnx"},
    ),
    "arithmetic on the project's data": (
        numpy_only,
        {**PROJECT, "rdoq_onnx/curves/curves.py": "from rdoq_onnx.model.graph import Graph"},
    ),
    "arithmetic that has moved": (numpy_only, {"rdoq_onnx/model/codes.py": ""}),
    "a second importer of ONNX Runtime": (wrapped_libraries, {"passes/a.py": "def f():\n    import onnxruntime"}),
    "a thirteenth file at the root": (crowded_root, {**PROJECT, "rdoq_onnx/misc.py": ""}),
    "a long module": (CHECKS["long modules have a reason"], {**PROJECT, "passes/a.py": "\n" * 251}),
    "a module that is short by now": (
        CHECKS["long modules have a reason"],
        {**PROJECT, "rdoq_onnx/system/runtime.py": ""},
    ),
    "long modules, all with reasons": (
        lambda sources: long_modules(sources, dict.fromkeys(sources, "")),
        {f"passes/{k}.py": "\n" * 251 for k in range(LONG_MODULES_ALLOWED + 1)},
    ),
    "a long signature": (
        lambda sources: long_signatures(sources, 0),
        {"passes/a.py": "def f(self, a, b, c, d, /, e, *, f, g): ..."},
    ),
    "a module without a test": (CHECKS["each module has a test"], {**PROJECT, "passes/a.py": "import a\nimport b"}),
    "a module that is tested elsewhere, nowhere": (
        lambda sources: untested_modules(sources, {}, {"passes/a": "tests/test_a.py"}),
        {"passes/a.py": "import a\nimport b"},
    ),
    "a module that its test does not know": (
        lambda sources: untested_modules(sources, {"tests/test_b.py": "import a"}, {"passes/a": "tests/test_b.py"}),
        {"passes/a.py": "import a\nimport b"},
    ),
    "a module that has a test by now": (
        lambda sources: untested_modules(sources, {"tests/passes/test_a.py": ""}, {"passes/a": "tests/test_b.py"}),
        {"passes/a.py": "import a\nimport b"},
    ),
    "a module that is gone": (lambda sources: untested_modules(sources, {}, {"passes/a": "tests/test_b.py"}), {}),
}


@pytest.mark.parametrize(("check", "sources"), BAD.values(), ids=BAD)
def test_each_check_finds_fault_with(check, sources):
    assert check(sources)


def test_what_the_checks_let_pass():
    sources = {
        "rdoq_onnx/model/a.py": "from rdoq_onnx.errors import ModelError\nimport onnx",
        "rdoq_onnx/model/__init__.py": '"""A.\n\nB.\nC.\n"""',
        "passes/b.py": "from rdoq_onnx.model import a\ndef f(self, a, b, c, d, e, f): ...",
    }
    tests = {"tests/model/test_a.py": "", "tests/test_c.py": "from rdoq_onnx.passes.b import f"}
    checks = [import_order, passes_stand_alone, file_cycles, folder_cycles, folder_docstrings, wrapped_libraries]
    assert not [wrong for check in checks for wrong in check(sources)]
    assert not long_signatures(sources, 0)
    assert not untested_modules(sources, tests, {"passes/b": "tests/test_c.py"})
