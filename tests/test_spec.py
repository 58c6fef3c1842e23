"""The mutants of spec/: one for each row of the design's table, each of them in a model. spec/check.py runs them."""

import ast
import importlib.util
import pathlib
import re
import sys

import pytest

SPEC = pathlib.Path(__file__).parent.parent / "spec"
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
MACRO = re.compile(r"\bMUTANT_(\w+)")

if not SPEC.is_dir():
    pytest.skip("the models are not part of this tree", allow_module_level=True)


@pytest.fixture(scope="module")
def table():
    name = "pagecore_spec_table"
    spec = importlib.util.spec_from_file_location(name, SPEC / "table.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        del sys.modules[name]


def text_of(file):
    """A model, with what it includes."""
    text = (SPEC / file).read_text()
    return text + "".join(text_of(name) for name in INCLUDE.findall(text))


def test_every_row_of_the_table_has_a_mutant(table):
    assert [mutant.row for mutant in table.MUTANTS if mutant.row] == list(range(1, len(table.ROWS) + 1))
    for mutant in table.MUTANTS:
        assert mutant.row is None or mutant.taken_out == table.ROWS[mutant.row - 1]


def test_every_mutant_takes_a_rule_out_of_its_model(table):
    for mutant in table.MUTANTS:
        assert mutant.macro in MACRO.findall(text_of(f"{mutant.file}.pml")), mutant


def test_every_mutant_in_a_model_is_run(table):
    run = {mutant.macro for mutant in table.MUTANTS}
    for path in SPEC.glob("*.pml"):
        assert set(MACRO.findall(path.read_text())) <= run, path


def test_every_configuration_is_one_that_its_model_knows(table):
    for one in (*table.MODELS, *table.MUTANTS):
        for define in one.defines:
            assert re.search(rf"\b{define.split('=')[0]}\b", text_of(f"{one.file}.pml")), (one, define)


def test_every_model_is_searched_unmutated(table):
    included = {name for path in SPEC.glob("*.pml") for name in INCLUDE.findall(path.read_text())}
    assert {path.name for path in SPEC.glob("*.pml")} - included == {f"{model.file}.pml" for model in table.MODELS}


def test_the_readme_lists_every_mutant(table):
    readme = (SPEC / "README.md").read_text()
    for mutant in table.MUTANTS:
        number = mutant.row or "-"
        assert f"| {number} | {mutant.taken_out} | `{mutant.macro}` | {mutant.file} |" in readme, mutant


def test_the_checker_needs_no_package():
    tree = ast.parse((SPEC / "check.py").read_text())
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert {name.split(".")[0] for name in names} - {"table"} <= sys.stdlib_module_names
