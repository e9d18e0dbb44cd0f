"""Exercises of the notebooks: an attempt is missing, wrong (yours beside expected) or right."""

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch


def check(attempt: Callable[..., Any], cases: Sequence[tuple[Any, Any]],
          tolerance: float = 1e-6) -> None:
    """Print `right: N cases`, or `not attempted yet` after a NotImplementedError.

    Args:
        attempt: the learner's function; it gets copies of the arguments.
        cases: (arguments, expected) each. An `expected` that can be called
            gets the answer and says what is wrong with it ("" for nothing).
        tolerance: of floats, relative and absolute.

    Raises:
        AssertionError: a wrong answer, in one line. Other errors go through.
    """
    for arguments, expected in cases:
        try:
            answer = attempt(*copy.deepcopy(arguments))
        except NotImplementedError as error:
            return print("not attempted yet", *error.args)
        if said := _judged(answer, expected, tolerance):
            raise AssertionError(f"{attempt.__name__}{shown(tuple(arguments), 0)}: {said}")
    print(f"right: {len(cases)} case{'s' * (len(cases) > 1)}")


def _judged(answer: Any, expected: Any, tolerance: float) -> str:
    if answer is None:
        return f"yours None, expected {'?' if callable(expected) else shown(expected)}: no return?"
    try:
        return expected(answer) if callable(expected) else differs(answer, expected, tolerance)
    except Exception as error:
        return f"yours {shown(answer)} has another form than asked for ({shown(str(error))})"


def differs(yours: Any, expected: Any, tolerance: float = 1e-6) -> str:
    """How two values differ, in words; "" if they do not. Parts of a dict go by their names."""
    both = _beside(yours, expected)
    mine, wanted = ({f"part {i}": part for i, part in enumerate(x)}
                    if isinstance(x, list | tuple) else x for x in (yours, expected))
    if isinstance(wanted, dict):
        if not isinstance(mine, dict) or mine.keys() != wanted.keys():
            return both
        parts = ((name, differs(mine[name], wanted[name], tolerance)) for name in wanted)
        said = next((f"{name}: {what}" for name, what in parts if what), "")
        return both if said and wanted is not expected and "..." not in both else said
    if isinstance(wanted, str | bytes) or isinstance(mine, str | bytes | dict):
        return "" if mine == wanted else both
    left, right = (torch.as_tensor(x if isinstance(x, torch.Tensor) else np.array(x)).detach().cpu()
                   for x in (mine, wanted))
    floats = right.is_floating_point()
    if left.shape != right.shape or (left.dim() and left.is_floating_point() != floats):
        return both
    if torch.allclose(left.double(), right.double(), tolerance * floats, tolerance * floats):
        return ""
    at = np.unravel_index(int((left.double() - right.double()).abs().argmax()), left.shape)
    most = f"; most at {list(map(int, at))}: {shown(left[at])}, expected {shown(right[at])}"
    return both + most * (left.numel() > 12)


def _beside(yours: Any, expected: Any) -> str:
    """Both on one line; where they look the same, with their kinds or in all digits."""
    both = (yours, expected)
    texts = [shown(x) for x in both]
    if texts[0] == texts[1]:
        kinds = [getattr(x, "dtype", type(x).__name__) for x in both]
        if kinds[0] != kinds[1]:
            texts = [f"{text} ({kind})" for text, kind in zip(texts, kinds, strict=True)]
        elif "..." not in texts[0]:  # of a large one the largest difference is shown
            texts = [repr(x.tolist() if hasattr(x, "tolist") else x) for x in both]
    return f"yours {texts[0]}, expected {texts[1]}"


def shown(value: Any, first: int = 4) -> str:
    """A value on one line; of a large tensor its type, its shape and the first numbers."""
    if isinstance(value, torch.Tensor | np.ndarray | np.generic):
        if np.prod(value.shape) > 12:
            some = f" {shown(value.reshape(-1)[:first].tolist())[:-1]}, ...]" * (first > 0)
            return f"{value.dtype} {tuple(value.shape)}{some}".removeprefix("torch.")
        value = value.tolist()
    if isinstance(value, list | tuple):
        text = ", ".join(shown(x, first) for x in value[:8]) + ", ..." * (len(value) > 8)
        return f"[{text}]" if isinstance(value, list) else f"({text})"
    text = " ".join((f"{value:.6g}" if isinstance(value, float) else repr(value)).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
