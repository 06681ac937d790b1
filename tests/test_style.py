"""Budgets of train_gpt.py: short and flat functions, contents that are true, ASCII, and few bytes in the submission."""

from __future__ import annotations

import ast
import re

import pytest
from support import ROOT

import train_gpt

SOURCE = (ROOT / "train_gpt.py").read_text()
TREE = ast.parse(SOURCE)
FUNCTIONS = [n for n in ast.walk(TREE) if isinstance(n, ast.FunctionDef)]
MODULES = sorted(p.name for p in ROOT.glob("*.py"))
FLOW = (ast.For, ast.While, ast.If, ast.With, ast.Try, ast.Match)


def length(f: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = f.body[0] if ast.get_docstring(f) is not None else None
    return f.end_lineno - f.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1 if docstring else 0)


def depth(node: ast.AST) -> int:
    """Levels of control flow; an elif is on the level of its if."""
    deepest = 0
    for child in ast.iter_child_nodes(node):
        chained = isinstance(node, ast.If) and isinstance(child, ast.If) and node.orelse == [child]
        deepest = max(deepest, depth(child) + (isinstance(child, FLOW) and not chained))
    return deepest


def test_no_function_is_longer_than_60_lines() -> None:
    assert {f.name: length(f) for f in FUNCTIONS if length(f) > 60} == {}


def test_no_function_is_nested_deeper_than_5() -> None:
    assert {f.name: depth(f) for f in FUNCTIONS if depth(f) > 5} == {}


def test_functions_are_short_on_average() -> None:
    assert sum(map(length, FUNCTIONS)) / len(FUNCTIONS) < 18


def test_contents_are_the_sections() -> None:
    contents = re.findall(r"^ {4}[ \d]\d\. (.+)$", ast.get_docstring(TREE, clean=False), re.M)
    banners = re.findall(r"^# -{100,}\n# (\d+)\. ([^:\n]+)(?::.*)?\n(?:# .*\n)*# -{100,}$", SOURCE, re.M)
    assert [int(number) for number, _ in banners] == list(range(1, len(banners) + 1))
    assert [title for _, title in banners] == [title.upper() for title in contents]


@pytest.mark.parametrize("name", MODULES)
def test_files_are_ascii(name: str) -> None:
    odd = [(i, line) for i, line in enumerate((ROOT / name).read_text().splitlines(), 1) if not line.isascii()]
    assert odd == []


def test_signatures_are_annotated() -> None:
    """Except where autograd and Triton fix them."""
    bare = []
    for f in FUNCTIONS:
        decorators = " ".join(map(ast.unparse, f.decorator_list))
        free = re.search(r"staticmethod|jit", decorators)
        arguments = [a for a in (*f.args.args, *f.args.kwonlyargs) if a.arg not in ("self", "cls")]
        returns = f.returns is not None or f.name == "__init__"
        if not free and not (returns and all(a.annotation for a in arguments)):
            bare.append(f.name)
    assert bare == []


def test_import_has_no_globals_and_no_side_effects() -> None:
    assert not any(isinstance(n, ast.Global) for n in ast.walk(TREE))
    loose = [ast.unparse(n)[:60] for n in TREE.body if isinstance(n, ast.For | ast.While | ast.With)]
    assert loose == []


def test_only_training_imports_torch_and_no_file_imports_training() -> None:
    imported: dict[str, set[str | None]] = {}
    for name in MODULES:
        nodes = list(ast.walk(ast.parse((ROOT / name).read_text())))
        imported[name] = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        imported[name] |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    for name in ("ablate.py", "lossless_caps.py", "prepare_caseops_data.py", "read_logs.py"):
        assert not imported[name] & {"torch", "train_gpt"}, name
    assert not imported["train_gpt.py"] & {"ablate", "lossless_caps", "prepare_caseops_data", "read_logs"}


def test_the_submitted_code_is_small(minified: str) -> None:
    size = len(train_gpt.self_extracting(minified))
    assert 1000 < size < 47_000
