"""Rules of `docs/architecture.md` and `CONTRIBUTING.md` that can be checked."""

import ast
import functools
import importlib
import inspect
import pathlib
import re

import pytest

import deer_ode


ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "deer_ode"
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
"""All source files by module name: `_newton`, `_discretisation._base`, `__init__`."""
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}

#: Modules that only pass names on.
FACADES = (
    "__init__",
    "_affine.__init__",
    "_demo.__init__",
    "_discretisation.__init__",
    "nn.__init__",
)

MAX_LINES = 600

#: The only module that may name what is private to other libraries.
FOREIGN = "_foreign"


def test_source_files_were_found():
    assert {"__init__", "_newton", "_solver", "_discretisation._base"} <= set(FILES)
    assert len(FILES) >= 20
    assert pathlib.Path(inspect.getfile(deer_ode)).name == "__init__.py"


# --- layers -------------------------------------------------------------------------


def rows() -> list[list[str]]:
    """The rows of the picture in the documentation, from bottom to top."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    pictures = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert len(pictures) == 1
    out = []
    for line in pictures[0].splitlines():
        folder = re.search(r"(\w+)/ \((.*)\)", line)
        if folder is None:
            out.append(re.findall(r"\b_\w+", line))
        else:
            out.append([f"{folder[1]}.{name}" for name in folder[2].split()])
    return out[::-1]


def imports(name: str) -> list[str]:
    """The modules of the package that module `name` imports, by name as in `FILES`."""
    out = []
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            full = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            full = [node.module]
        elif isinstance(node, ast.ImportFrom):
            package = ["deer_ode", *name.split(".")][: -node.level]
            module = node.module.split(".") if node.module else []
            base = ".".join(package + module)
            # `from . import x` imports the module `x`, if there is one of that name.
            full = [
                f"{base}.{alias.name}" if find(f"{base}.{alias.name}") else base
                for alias in node.names
            ]
        else:
            continue
        for module in full:
            if module.split(".")[0] == "deer_ode":
                found = find(module)
                assert found is not None, f"{name} imports {module}, which is no file"
                out.append(found)
    return out


def find(full_name: str) -> str | None:
    """`deer_ode._newton` as in `FILES`; a package is its `__init__`."""
    name = full_name.removeprefix("deer_ode").removeprefix(".")
    package = f"{name}.__init__" if name else "__init__"
    return name if name in FILES else package if package in FILES else None


def places() -> dict[str, tuple[int, int]]:
    """Row and column of every module in the picture."""
    return {name: (i, j) for i, row in enumerate(rows()) for j, name in enumerate(row)}


def test_the_picture_holds_every_module_once():
    named = [name for row in rows() for name in row]
    # What only passes names on stands for all that it passes on.
    facades = {name for name in FILES if name.split(".")[-1] == "__init__"}
    assert facades == set(FACADES)
    assert sorted(named) == sorted(set(FILES) - facades)
    assert len(rows()) >= 10


def test_modules_import_only_from_beneath():
    place = places()
    # From outside, a folder is where the last of its modules is.
    for name in FILES:
        folder, _, last = name.rpartition(".")
        if folder and last == "__init__":
            place[name] = max(p for m, p in place.items() if m.startswith(f"{folder}."))
    checked = 0
    for name in place:
        if name.endswith("__init__"):
            continue
        for imported in imports(name):
            assert imported != "__init__", f"{name} imports the package itself"
            assert place[imported] < place[name], (
                f"`{name}` imports `{imported}`, which is not beneath it in the "
                "picture of docs/architecture.md"
            )
            checked += 1
    assert checked >= 40
    # What is parsed is what Python imports.
    assert "_method" in imports("_implicit")
    assert "_recurrence" in imports("_discretisation._step_map")
    assert "_discretisation.__init__" in imports("_solver")
    assert "_demo.__init__" in imports("__main__")


def test_facades_only_pass_names_on():
    for name in FACADES:
        passed_on = 0
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                for alias in node.names:
                    assert alias.asname == alias.name, f"{name}: use `X as X`"
                    passed_on += 1
            assert not isinstance(node, ast.ClassDef | ast.FunctionDef)
        assert passed_on >= (1 if name == "_demo.__init__" else 5)


def test_engine_knows_nothing_of_diffrax():
    names = [row for row in rows() if row[0].startswith("_discretisation.")]
    (first,) = (rows().index(row) for row in names)
    engine = {name for row in rows()[:first] for name in row} - {FOREIGN}
    assert "_newton" in engine and "_implicit" in engine
    of_diffrax = names_of_diffrax()
    assert {"LoopState", "wrap", "run_loop"} <= of_diffrax
    for name in engine:
        assert "diffrax" not in {module.split(".")[0] for module in foreign(name)}
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.ImportFrom) and node.module == FOREIGN:
                assert not of_diffrax & {alias.name for alias in node.names}, name
    assert "diffrax" in foreign("_discretisation._step_map")


def names_of_diffrax() -> set[str]:
    """What `_foreign` has of Diffrax: what it imports, and its last sections."""
    text = FILES[FOREIGN].read_text()
    start = text[: text.index("# --- Diffrax")].count("\n")
    names = set()
    for node in TREES[FOREIGN].body:
        if isinstance(node, ast.ImportFrom) and node.module.startswith("diffrax"):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.lineno > start:
            names.add(node.name)
    return names


# --- other libraries ----------------------------------------------------------------


def foreign(name: str) -> set[str]:
    """Modules of other packages that are imported, `a.b` for `from a import b` too."""
    out = set()
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            out |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            out.add(node.module)
            out |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {module for module in out if module.split(".")[0] != "deer_ode"}


#: Modules that are not private by name, but no more promised.
UNSTABLE = (
    "equinox.internal",
    "jax.extend",
    "jax.experimental.pallas",
    "jaxlib",
)


def is_private(module: str) -> bool:
    """Whether it is `package._module`, or no more promised than that."""
    package, *parts = module.split(".")
    return package != "__future__" and (
        any(re.match(r"_[A-Za-z]", part) for part in parts)
        or module.startswith(UNSTABLE)
    )


def test_private_modules_of_other_libraries_are_imported_in_one_place():
    found = {name for name in FILES if any(is_private(m) for m in foreign(name))}
    assert found == {FOREIGN}
    assert {"diffrax._integrate", "equinox.internal", "jax.extend.core"} <= {
        module for module in foreign(FOREIGN) if is_private(module)
    }
    assert "jax.numpy" in foreign("_newton")


@functools.cache
def defined_names() -> set[str]:
    """All that the package defines: functions, classes, fields, attributes, names."""
    out = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                out.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                out.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                out.add(node.attr)
    return out


def private_attributes(name: str) -> set[str]:
    """Private attributes, `x._name`, of what is not of the package."""
    attributes = {
        node.attr for node in ast.walk(TREES[name]) if isinstance(node, ast.Attribute)
    }
    named_tuple = {"_replace", "_asdict", "_fields", "_make"}
    private = {a for a in attributes if re.match(r"_[A-Za-z]", a)}
    return private - named_tuple - defined_names()


def asks_for_the_kind(node: ast.AST, kinds: set[str]) -> bool:
    """`isinstance(x, Kind)`; or `A.ndim`, which told diagonals from matrices."""
    names = lambda node: {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return node.func.id == "isinstance" and bool(names(node.args[1]) & kinds)
    is_ndim = isinstance(node, ast.Attribute) and node.attr == "ndim"
    return is_ndim and bool(names(node) & {"A", "A_i"})


def test_only_transitions_know_their_kind():
    kinds = {
        node.name
        for node in TREES["_affine._transitions"].body
        if isinstance(node, ast.ClassDef)
    }
    assert {"DenseTransition", "TrailingTransition"} <= kinds
    example = ast.parse("isinstance(A, DenseTransition)", mode="eval").body
    assert asks_for_the_kind(example, kinds)
    # Of `phi_functions` the argument is any matrix.
    for name in set(TREES) - {"_affine._transitions", "_discretisation._phi"}:
        for node in ast.walk(TREES[name]):
            assert not asks_for_the_kind(node, kinds), f"{name}, line {node.lineno}"


def test_private_attributes_of_other_libraries_are_used_in_one_place():
    assert private_attributes(FOREIGN) == {"_loop", "_getframe"}
    for name in set(FILES) - {FOREIGN}:
        assert not private_attributes(name), name
        text = FILES[name].read_text()
        for word in ("jax._src", "diffrax._", "equinox._", "equinox.internal"):
            assert word not in text, f"{name} names `{word}`"


def test_layouts_are_unpacked_in_one_place():
    """The state of a controller and the parameters of a loop in a traced program."""
    for name in set(FILES) - {FOREIGN}:
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple):
                value = ast.unparse(node.value)
                assert not value.endswith("controller_state"), f"{name}: {value}"
            elif isinstance(node, ast.Constant):
                assert node.value not in (
                    "num_consts", "num_carry", "ft_in", "body_jaxpr", "call_jaxpr",
                    "cond_nconsts", "body_nconsts",
                ), f"{name}: {node.value}"  # fmt: skip


def test_the_platform_is_asked_for_in_one_place():
    """`_kernels` looks at the GPU itself, whether its kernels are right there."""
    for name in set(FILES) - {"_plan", "_affine._kernels", FOREIGN}:
        text = FILES[name].read_text()
        for word in ("default_backend", "platform_dependent"):
            assert word not in text, f"{name} asks for the platform by `{word}`"


# --- classes ------------------------------------------------------------------------


def classes() -> dict[str, type]:
    """All classes that the package defines, by module and name."""
    out = {}
    for name, tree in TREES.items():
        module = importlib.import_module(f"deer_ode.{name}".removesuffix(".__init__"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                out[f"{name}.{node.name}"] = getattr(module, node.name)
    return out


def test_classes_are_abstract_or_final():
    found = classes()
    assert {"_newton.Newton", "_solver.DEER", "_recurrence.AbstractRecurrence"} <= set(
        found
    )
    own = set(found.values())
    assert len(own) == len(found) >= 20
    num_abstract_parents = 0
    for name, cls in found.items():
        for parent in cls.__mro__[1:]:
            if parent in own:
                assert parent.__name__.startswith("Abstract"), (
                    f"`{name}` is a subclass of `{parent.__name__}`, which is final"
                )
                num_abstract_parents += 1
    # Dense, Diagonal, three predictors, and the recurrences.
    assert num_abstract_parents >= 7


def test_classes_of_other_libraries_are_extended_where_they_are_abstract():
    """Of Diffrax's classes, too, only the abstract ones are subclassed."""
    parents = {
        parent
        for cls in classes().values()
        for parent in cls.__bases__
        if parent.__module__.split(".")[0] == "diffrax"
    }
    assert len(parents) >= 3
    for parent in parents:
        assert parent.__name__.startswith("Abstract"), parent


def is_abstract(cls: type) -> bool:
    variables = (
        getattr(cls, "__abstractvars__", ()),
        getattr(cls, "__abstractclassvars__", ()),
    )
    return inspect.isabstract(cls) or any(len(v) > 0 for v in variables)


def test_names_say_what_is_abstract():
    for name, cls in classes().items():
        assert is_abstract(cls) == cls.__name__.startswith("Abstract"), name


def test_abstract_classes_are_not_instantiated():
    abstract = {cls.__name__: cls for cls in classes().values() if is_abstract(cls)}
    assert len(abstract) >= 4
    for cls in abstract.values():
        with pytest.raises(TypeError, match="(?i)abstract"):
            cls()
    calls = [
        node.func
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 100
    for func in calls:
        called = func.attr if isinstance(func, ast.Attribute) else None
        called = func.id if isinstance(func, ast.Name) else called
        assert called not in abstract, f"`{called}` is called"


# --- documentation ------------------------------------------------------------------


def public_items() -> dict[str, object]:
    """What the package passes on by `X as X`, by name: `DEER`, `nn.RNN`."""
    out = {}
    for prefix, facade in (("", "__init__"), ("nn.", "nn.__init__")):
        for node in ast.walk(TREES[facade]):
            if isinstance(node, ast.ImportFrom) and node.level > 0:
                for alias in node.names:
                    module = deer_ode.nn if prefix else deer_ode
                    out[prefix + alias.name] = getattr(module, alias.name)
    assert out.pop("nn") is deer_ode.nn
    return out


def test_every_public_name_is_documented():
    items = public_items()
    assert {"DEER", "Newton", "diffeqsolve", "affine_scan", "nn.RNN"} <= set(items)
    pages = ("api.md", "api-choices.md", "api-extension.md")
    api = "".join((ROOT / "docs" / page).read_text() for page in pages)
    entries = re.findall(r"^::: deer_ode\.([\w.]+)$", api, flags=re.MULTILINE)
    assert sorted(entries) == sorted(items)
    for name, item in items.items():
        # Its own, and not that of a parent, or what a dataclass makes up.
        doc = vars(item)["__doc__"] if inspect.isclass(item) else item.__doc__
        assert doc is not None and doc.strip(), name
        assert not doc.startswith(f"{name}("), name


def test_every_member_of_a_public_abstract_class_is_documented():
    """For those who implement it; what another library asks for it documents."""
    num_members = 0
    for name, cls in public_items().items():
        if not (inspect.isclass(cls) and is_abstract(cls)):
            continue
        for member in getattr(cls, "__abstractvars__", ()):
            assert f"`{member}`" in (cls.__doc__ or ""), f"{name}.{member}"
        for member, value in vars(cls).items():
            is_property = isinstance(value, property)
            function = value.fget if is_property else value
            is_public = member == "__call__" or not member.startswith("_")
            if not is_public or not inspect.isfunction(inspect.unwrap(function)):
                continue
            inherited = any(hasattr(parent, member) for parent in cls.__mro__[1:])
            assert value.__doc__ or inherited, f"{name}.{member}"
            num_members += 1
    assert num_members >= 30


def test_every_argument_of_a_public_class_is_documented():
    num_arguments = 0
    for name, item in public_items().items():
        if not inspect.isclass(item) or is_abstract(item):
            continue
        # What is returned is documented by its fields.
        is_result = "**Fields:**" in (item.__doc__ or "") or issubclass(item, tuple)
        doc = item.__doc__ if is_result else item.__init__.__doc__
        for argument in inspect.signature(item).parameters:
            assert f"`{argument}`" in (doc or ""), f"{name}.{argument}"
            num_arguments += 1
    assert num_arguments >= 30


def test_checklists_name_what_there_is():
    """Modules and tables of tests, for each kind of part."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    parts = text.split("## Adding a part")[1].split("\n### ")[1:]
    assert len(parts) == 6
    for part in parts:
        (modules,) = re.findall("^- Module: (.*)$", part, flags=re.MULTILINE)
        (tables,) = re.findall("^- Table: (.*)$", part, flags=re.MULTILINE)
        paths = re.findall(r"`(deer_ode/[\w/.]+)`", modules)
        assert paths and all((ROOT / path).exists() for path in paths), paths
        named = re.findall(r"`(\w+)` in `(tests/\w+\.py)`", tables)
        assert named
        for table, path in named:
            place = rf"^(def )?{table}\b"
            source = (ROOT / path).read_text()
            assert re.search(place, source, flags=re.MULTILINE), (table, path)
        members = re.findall(r"`(Abstract\w+)`", modules)
        for member in members:
            assert any(f"class {member}(" in p.read_text() for p in FILES.values())


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1].split("\n\n")[0]
    pages = re.findall(r": (\S+\.md)$", nav, flags=re.MULTILINE)
    there = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*.md")]
    assert len(there) >= 7
    assert sorted(pages) == sorted(map(str, there))


def test_readme_names_a_test_command():
    readme = (ROOT / "README.md").read_text()
    start, end = "<!-- test-command -->", "<!-- /test-command -->"
    lines = readme.splitlines()
    assert lines.count(start) == lines.count(end) == 1
    block = lines[lines.index(start) + 1 : lines.index(end)]
    commands = [line for line in block if line.strip() and not line.startswith("```")]
    assert len(commands) == 1
    assert "pip install" in commands[0] and "python -m pytest" in commands[0]


def test_files_are_short():
    lengths = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    assert sum(lengths.values()) > 1000
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES}
    assert not too_long, f"past {MAX_LINES} lines, look for a seam: {too_long}"
