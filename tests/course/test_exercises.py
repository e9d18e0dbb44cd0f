"""Checks of exercises: what a learner reads for a missing, a wrong and a right answer."""

import numpy as np
import pytest
import torch

from lib.course.notebook import check, differs

DOUBLES = [((2,), 4), ((5,), 10)]
ROWS = [((torch.ones(2, 3),), torch.full((2, 3), 2.0))]


def double(x):
    return 2 * x


def wrong(attempt, cases, **options):
    with pytest.raises(AssertionError) as caught:
        check(attempt, cases, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_not_attempted(capsys):
    def stub(x):
        raise NotImplementedError

    check(stub, DOUBLES)
    assert capsys.readouterr().out == "not attempted yet\n"


def test_what_a_library_does_not_implement_is_shown(capsys):
    def attempt(x):
        return torch.nn.Module()(x)

    check(attempt, DOUBLES)
    assert "forward" in capsys.readouterr().out


def test_right(capsys):
    check(double, DOUBLES)
    check(double, ROWS)
    assert capsys.readouterr().out == "right: 2 cases\nright: 1 case\n"


def test_wrong_value_shows_input_yours_and_expected():
    def attempt(x):
        return x + 2  # right for the first case only

    assert wrong(attempt, DOUBLES) == "attempt(5): yours 7, expected 10"
    text = wrong(attempt, ROWS)
    assert "yours [[3, 3, 3], [3, 3, 3]], expected [[2, 2, 2], [2, 2, 2]]" in text


def test_a_large_tensor_is_not_printed():
    expected = torch.zeros(20, 30)
    yours = expected.clone()
    yours[4, 7] = 1
    assert differs(yours, expected) == (
        "yours float32 (20, 30), expected float32 (20, 30); largest difference 1")


def test_wrong_shape_and_wrong_kind_of_number():
    assert "expected [[2, 2, 2], [2, 2, 2]]" in wrong(lambda x: 2 * x.T, ROWS)
    assert "yours 2," in wrong(lambda x: torch.tensor(2.0), ROWS)
    codes = torch.tensor([1, 2], dtype=torch.int8)
    assert differs(codes.float(), codes).endswith("(float32 and int8)")
    assert not differs(codes.long(), codes)


def test_nothing_returned():
    for expected in (4, lambda answer: ""):
        text = wrong(lambda x: None, [((2,), expected)])
        assert text == "<lambda>(2): yours None: is the return missing?"


@pytest.mark.parametrize("error", [ValueError, KeyError, AssertionError, TypeError])
def test_another_error_goes_through(error):
    def attempt(x):
        raise error("mine")

    with pytest.raises(error, match="^'?mine'?$"):
        check(attempt, DOUBLES)


def test_property(capsys):
    def even(answer):
        return "" if answer % 2 == 0 else f"{answer} is odd"

    check(double, [((3,), even)])
    assert capsys.readouterr().out == "right: 1 case\n"
    assert wrong(lambda x: x, [((3,), even)]) == "<lambda>(3): 3 is odd"


def test_arguments_are_copies():
    def attempt(x):
        return x.mul_(2)

    check(attempt, ROWS)
    check(attempt, ROWS)
    assert torch.equal(ROWS[0][0][0], torch.ones(2, 3))


def test_tolerance():
    near = [((1.0,), 2.0 + 1e-4)]
    assert "yours 2, expected 2.0001" in wrong(double, near)
    check(double, near, tolerance=1e-3)
    assert wrong(lambda x: x * 8_388_608 + 1, [((2,), 16_777_216)], tolerance=1e-3)


def test_not_a_number_is_wrong():
    assert differs(float("nan"), 1.0)
    assert differs(torch.tensor([0.0, float("nan")]), torch.zeros(2))


@pytest.mark.parametrize(("yours", "expected"), [
    (4, 4.0), (torch.tensor(4.0), 4), (np.float32(4), 4.0), ([1, 2], (1, 2)),
    ((torch.ones(2), "a"), (torch.ones(2), "a")), (b"ab", b"ab"),
    ({"a": 1, "b": 2.0}, {"b": 2.0, "a": 1}), (np.ones(3, "<f4"), torch.ones(3)),
    (np.frombuffer(b"\1\2", np.int8), np.array([1, 2]))])
def test_equal(yours, expected, recwarn):
    assert differs(yours, expected) == ""
    assert not recwarn.list


@pytest.mark.parametrize(("yours", "expected", "text"), [
    ([1, 2], [1, 3], "part 1: yours 2, expected 3"),
    ({"shape": (1, 2)}, {"shape": (1, 3)}, "shape: part 1: yours 2, expected 3"),
    ([1], [1, 3], "yours [1], expected [1, 3]"),
    ({"a": 1}, {"b": 1}, "yours {'a': 1}, expected {'b': 1}"),
    ({"a": 1}, {"a": 2}, "a: yours 1, expected 2"),
    ("a", "b", "yours 'a', expected 'b'"), (1, "a", "yours 1, expected 'a'"),
    ("x" * 500, "", f"yours '{'x' * 116}..., expected ''")])
def test_different(yours, expected, text):
    assert differs(yours, expected) == text
