"""The size and shape of the program, measured by parsing its files: what the README claims of them cannot
rot."""
import ast
import re
from collections import Counter

import pytest
from conftest import ROOT

LIMITS = dict(modules=15, imports=45, lines=3600, columns=110, function=60)
FILES = sorted(path for kind in ("py", "html", "js") for pattern in ("*", "ldm/**/*")
               for path in ROOT.glob(f"{pattern}.{kind}"))
SOURCE = {path: path.read_text(encoding="utf-8") for path in FILES}
TREES = {path: ast.parse(text) for path, text in SOURCE.items() if path.suffix == ".py"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)

def name_of(path):
    """ldm/vae.py -> ldm.vae"""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

# Modules with code; an __init__.py that is only a docstring is none.
MODULES = {name_of(path): tree for path, tree in TREES.items() if len(tree.body) > 1}

def imports_of(module, tree):
    """The modules of the program that a module imports."""
    found = set()
    package = module.split(".")[:-1] if module != "ldm" else module.split(".")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[:len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *filter(None, [node.module])])
            found |= {origin} | {f"{origin}.{alias.name}" for alias in node.names}
    return found & MODULES.keys() - {module}

IMPORTS = {module: imports_of(module, tree) for module, tree in MODULES.items()}

def test_there_are_few_modules_and_few_imports_between_them():
    print(f"{len(MODULES)} modules, {sum(map(len, IMPORTS.values()))} imports between them")
    assert len(MODULES) <= LIMITS["modules"]
    assert sum(map(len, IMPORTS.values())) <= LIMITS["imports"]

def test_nothing_in_ldm_imports_the_top_level_but_the_report():
    upward = {module for module, found in IMPORTS.items() if module.startswith("ldm.")
              and any("." not in f for f in found)}
    assert upward <= {"ldm.report"}

def test_no_module_imports_itself_by_way_of_others():
    done = set()
    while rest := {module for module in MODULES if module not in done and IMPORTS[module] <= done}:
        done |= rest
    assert done == MODULES.keys()

def test_the_program_is_short_in_lines_columns_and_functions():
    lines = sum(len(text.splitlines()) for text in SOURCE.values())
    print(f"{lines} lines")
    assert lines <= LIMITS["lines"]
    long = [f"{path.name}:{i}" for path, text in SOURCE.items()
            for i, line in enumerate(text.splitlines(), 1) if len(line) > LIMITS["columns"]]
    assert not long
    functions = {f"{name_of(path)}.{node.name}": node.end_lineno - node.lineno + 1
                 for path, tree in TREES.items() for node in ast.walk(tree) if isinstance(node, FUNCTIONS)}
    assert {name: n for name, n in functions.items() if n > LIMITS["function"]} == {}

def test_no_public_name_is_defined_twice():
    """At the top of two modules; each program has its main and its parse_args."""
    names = Counter(node.name for tree in TREES.values() for node in tree.body
                    if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and not node.name.startswith("_"))
    assert {name for name, n in names.items() if n > 1} <= {"main", "parse_args"}

@pytest.mark.parametrize("kind", ["test", "bench", "peers", "memory"])
def test_the_tests_keep_the_bars_of_their_own(kind):
    paths = sorted((ROOT / "tests").glob(f"{kind}*.py"))
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {n.name for n in ast.walk(tree) if isinstance(n, FUNCTIONS)
                    and n.end_lineno - n.lineno >= LIMITS["function"]}
        others = {p.stem for p in paths} - {path.stem}
        assert not others & {n.module for n in ast.walk(tree)
                             if isinstance(n, ast.ImportFrom)}, f"{path.name} imports a test file"

def test_the_readme_lists_every_file_and_its_claim_of_size_holds():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    table = readme.split("## Read the code")[1].split("\n## ")[0]
    for path in FILES:
        if path not in TREES or len(TREES[path].body) > 1:
            name = path.relative_to(ROOT).as_posix()
            assert name in table or f"{path.parent.relative_to(ROOT).as_posix()}/" in table, name
    claimed = int(re.search(r"about ([\d,]+) lines", table)[1].replace(",", ""))
    assert abs(claimed - sum(len(text.splitlines()) for text in SOURCE.values())) <= 100
