"""Rounding with feedback: Q4_0 as gguf writes it, and a smaller error of the outputs."""

import gguf
import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from lib.quantize.correction import codes_with_feedback, encode_with_feedback, pack_q4_0
from lib.quantize.formats import decode, encode, round_trip


def case(rows: int = 24, columns: int = 64, many: int = 2, seed: int = 0):
    """Weights, and roots of inputs that have much in common."""
    torch.manual_seed(seed)
    x = torch.randn(many, 200, columns) @ torch.randn(many, columns, columns)
    moments = x.mT @ x / 200 + 1e-2 * torch.eye(columns)
    return torch.randn(many, rows, columns), torch.linalg.cholesky(moments)


def rounded_with_feedback(weight: torch.Tensor, root: torch.Tensor) -> torch.Tensor:
    return decode(encode_with_feedback({"w": weight}, {"w": root})["w"], "Q4_0")


@given(st.integers(0, 10_000), st.floats(-4, 3))
def test_ggufs_own_quantiser_writes_the_same_bytes(seed, size):
    weight, root = case(4, 64, 1, seed)
    codes, scales = codes_with_feedback(weight * 10**size, root)
    data = pack_q4_0(codes[0], scales[0])
    values = decode(data, "Q4_0")
    steps = scales[0].float().repeat_interleave(32, 1)
    assert torch.equal(values, (codes[0].float() - 8) * steps)
    # A block whose number of largest size has code 0 is one that gguf's own quantiser writes.
    full = (codes[0].view(4, 2, 32) == 0).any(2).numpy()
    theirs = gguf.quants.quantize(values.numpy(), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(theirs.reshape(4, 2, 18)[full], data.reshape(4, 2, 18)[full])


def test_the_outputs_err_less():
    weight, root = case()
    plain, ours = (torch.stack([way(*pair) for pair in zip(weight, root, strict=True)])
                   for way in (lambda w, _: round_trip(w, "Q4_0"), rounded_with_feedback))
    ours, theirs = (((q - weight) @ root).norm() for q in (ours, plain))
    assert ours < 0.7 * theirs


def test_one_column_after_another_by_hand():
    """GPTQ's own loop, with the inverse updated by elimination instead of a Cholesky factor."""
    weight, root = case(3, 32, 1)
    left, inverse = weight[0].clone(), (root[0] @ root[0].T).inverse()
    data = encode(left, "Q4_0", importance=(root[0] @ root[0].T).diagonal())
    step = torch.from_numpy(data[:, :2].copy()).view(torch.float16)[:, 0].float()
    for j in range(32):
        codes = (left[:, j] / step).add(8.5).floor().clamp(0, 15) - 8
        error = (left[:, j] - codes * step) / inverse[j, j]
        left = left - error[:, None] * inverse[j]
        left[:, j] = codes * step
        inverse = inverse - inverse[:, j:j + 1] @ inverse[j:j + 1] / inverse[j, j]
        inverse[j], inverse[:, j] = 0, 0
    assert torch.allclose(rounded_with_feedback(weight[0], root[0]), left, atol=1e-4)


def test_zeros_stay_zeros():
    _, root = case(many=1)
    zeros = torch.zeros(2, 64)
    data = encode_with_feedback({"w": zeros}, {"w": root[0]})["w"]
    assert data.any() and torch.equal(decode(data, "Q4_0"), zeros)


def test_layers_of_one_shape_go_together():
    weight, root = case()
    other, its = case(rows=8, many=1)
    weights = {"a": weight[0], "c": other[0], "b": weight[1]}
    roots = {"a": root[0], "b": root[1], "c": its[0]}
    together = encode_with_feedback(weights, roots)
    for name in weights:
        assert torch.equal(decode(together[name], "Q4_0"),
                           rounded_with_feedback(weights[name], roots[name]))
