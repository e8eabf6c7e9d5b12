"""The words of refusals are kept: what `conftest.pytest_runtest_call` compares with tests/fixtures/refusals.json."""

import ast

import pytest

from tests import refusal


def test_the_tests_that_are_recorded_are_there():
    """A test that is renamed takes its record along."""
    wanted = {tuple(test.partition("[")[0].split("::")) for test in refusal.recorded()}
    for path in {path for path, _ in wanted}:
        nodes = ast.walk(ast.parse((refusal.ROOT / path).read_text(encoding="utf-8")))
        names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
        assert {name for other, name in wanted if other == path} <= names


@pytest.mark.parametrize("change", [lambda words: [words[0] + "."], lambda words: [], lambda words: words * 2])
def test_changed_words_are_shown_beside_those_recorded(change):
    test = "tests/test_bad_input.py::test_merge_refuses_an_unknown_dtype"
    words = refusal.recorded()[test]
    refusal.assert_worded_as_recorded(test, list(words))
    with pytest.raises(AssertionError, match="worded anew"):
        refusal.assert_worded_as_recorded(test, change(words))


def test_what_differs_from_run_to_run_is_left_out(tmp_path, session_folder):
    text = f"{tmp_path}/a.json, {session_folder}/checkpoints12/glm3, {refusal.ROOT}/data: process 7 on host.x"
    expected = "<tmp>/a.json, <checkpoints>/glm3, <root>/data: process <number> on <host>"
    assert refusal.normalised(text, session_folder, tmp_path) == expected
