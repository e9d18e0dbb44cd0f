"""Two objectives that pull apart, both to be minimised: bits and loss.

Points are rows (bits a weight, loss). The hypervolume is the area that a set
dominates, up to a reference point worse than all of them (Zitzler, Thiele 1999).
"""

import torch
from torch import Tensor

SEGMENTS, LOW, HIGH = 40, 2.25, 7.25


def non_dominated(points: Tensor) -> Tensor:
    """Rows that no other row beats, being as small in both and smaller in one; (n,) bool."""
    no_worse = (points[:, None] <= points[None]).all(2)
    better = (points[:, None] < points[None]).any(2)
    return ~(no_worse & better).any(0)


def front(points: Tensor) -> Tensor:
    """The non-dominated rows without duplicates, bits ascending and loss descending."""
    return points[non_dominated(points)].unique(dim=0)


def hypervolume(points: Tensor, reference: Tensor) -> float:
    """Exact area dominated by `points` below `reference`; points beyond it add nothing."""
    inside = front(points.double())
    inside = inside[(inside < reference).all(1)]
    if not len(inside):
        return 0.0
    right = torch.cat([inside[1:, 0], reference[:1].double()])
    return float(((right - inside[:, 0]) * (reference[1] - inside[:, 1])).sum())


def segment(bits: Tensor) -> Tensor:
    """The segment of each number of bits: 40 equal ones from 2.25 to 7.25, ends open."""
    return ((bits - LOW) / (HIGH - LOW) * SEGMENTS).floor().long().clamp(0, SEGMENTS - 1)


def front_by_segment(points: Tensor) -> list[int]:
    """Indices of rows not dominated within their own segment, so that all stay covered."""
    where, rows = segment(points[:, 0]), torch.arange(len(points))
    return sorted(int(i) for part in where.unique()
                  for i in rows[where == part][non_dominated(points[where == part])])


def expected_improvement(bits: Tensor, mean: Tensor, spread: Tensor, points: Tensor,
                         reference: Tensor) -> Tensor:
    """Expected hypervolume improvement of candidates whose bits are known exactly.

    Only the loss is uncertain, y ~ N(mean, spread^2). Let f(b) be the least
    loss among the points of at most b bits. A candidate of c bits gains
    int_c^R max(0, f(b) - y) db. As f is constant between the front's points,

    E = sum_i width_i(c) * EI(f_i),  EI(f) = (f - mean) Phi(z) + spread phi(z),

    z = (f - mean) / spread (Emmerich et al. 2011, with one objective exact).

    `bits`, `mean` and `spread` (above 0) of the candidates are (n,), `points` are the (m, 2)
    evaluated ones, `reference` is (2,). Returns (n,), not negative.
    """
    inside = front(points)
    inside = inside[(inside < reference).all(1)]
    left = torch.cat([torch.tensor([-torch.inf], dtype=inside.dtype), inside[:, 0]])
    right = torch.cat([inside[:, 0], reference[:1]])
    least = torch.cat([reference[1:], inside[:, 1]])
    width = (right - torch.maximum(left, bits[:, None])).clamp(min=0)
    gap = least - mean[:, None]
    z = gap / spread[:, None]
    phi = torch.exp(-z.square() / 2) / (2 * torch.pi) ** 0.5
    gain = gap * torch.special.ndtr(z) + spread[:, None] * phi
    return (width * gain.clamp(min=0)).sum(1)
