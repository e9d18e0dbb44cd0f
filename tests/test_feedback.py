"""Rounding with feedback: levels of the type, found again, and a smaller error of the outputs."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.feedback import KIND, round_layers, with_feedback
from lib.quantize import rounded


def case(rows: int = 24, columns: int = 64, many: int = 2, seed: int = 0):
    """Weights, and roots of inputs that have much in common."""
    torch.manual_seed(seed)
    x = torch.randn(many, 200, columns) @ torch.randn(many, columns, columns)
    moments = x.mT @ x / 200 + 1e-2 * torch.eye(columns)
    return torch.randn(many, rows, columns), torch.linalg.cholesky(moments)


@given(st.integers(0, 10_000), st.floats(-4, 3))
def test_what_is_written_is_what_was_chosen(seed, size):
    weight, root = case(4, 64, 1, seed)
    found = with_feedback(weight * 10**size, root)[0]
    assert torch.equal(rounded(found, KIND), found)


def test_the_outputs_err_less():
    weight, root = case()
    plain = torch.stack([rounded(w, KIND) for w in weight])
    ours = with_feedback(weight, root)
    ours, theirs = (((q - weight) @ root).norm() for q in (ours, plain))
    assert ours < 0.8 * theirs


def test_inputs_without_correlation_leave_plain_rounding():
    weight, _ = case(many=1)
    found = with_feedback(weight, torch.eye(64)[None])[0]
    # The file's writer rounds by the scale before it is halved, so ties may fall otherwise.
    same = (found - rounded(weight[0], KIND)).abs() < 1e-6
    assert same.float().mean() > 0.99


def test_one_column_after_another_by_hand():
    """GPTQ's own loop, with the inverse updated by elimination instead of a Cholesky factor."""
    weight, root = case(3, 32, 1)
    left, inverse = weight[0].clone(), (root[0] @ root[0].T).inverse()
    grid = rounded(weight[0], "Q4_0")
    step = (grid.gather(1, weight[0].abs().argmax(1, keepdim=True)) / -8)[:, 0]
    top = weight[0].abs().argmax(1)
    for j in range(32):
        codes = torch.where(top == j, -8, (left[:, j] / step).add(8.5).floor().clamp(0, 15) - 8)
        error = (left[:, j] - codes * step) / inverse[j, j]
        left = left - error[:, None] * inverse[j]
        left[:, j] = codes * step
        inverse = inverse - inverse[:, j:j + 1] @ inverse[j:j + 1] / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    assert torch.allclose(with_feedback(weight, root)[0], left, atol=1e-4)


def test_zeros_stay_zeros():
    _, root = case(many=1)
    assert not with_feedback(torch.zeros(1, 2, 64), root).any()


def test_layers_of_one_shape_go_together():
    weight, root = case()
    other, its = case(rows=8, many=1)
    found = round_layers({"a": weight[0], "c": other[0], "b": weight[1]},
                         {"a": root[0], "b": root[1], "c": its[0]})
    for name, one, with_root in (("a", weight[:1], root[:1]), ("b", weight[1:], root[1:]),
                                 ("c", other, its)):
        assert torch.equal(found[name], with_feedback(one, with_root)[0])
