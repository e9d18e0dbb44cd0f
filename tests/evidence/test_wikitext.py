"""Perplexity, divergence, copies of a model, and what forgetting measures."""

import math

import pytest
import torch
from conftest import with_adapter

from data.evidence import forgetting, wikitext
from data.evidence.copies import COPIES
from lib.base.model import load_model
from lib.quantize.formats import fitting, round_trip


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 49000, (3, 24), generator=torch.Generator().manual_seed(0))


def test_a_model_does_not_diverge_from_itself(tiny, ids):
    kept = ids, wikitext.last_states(tiny, ids), tiny.lm_head.weight.clone()
    rows = wikitext.measure(tiny, *kept)
    assert max(map(abs, rows["kl"])) < 1e-6 and rows["same_top"] == [1.0] * 3
    true = [tiny(input_ids=row[None], labels=row[None]).loss.item() for row in ids]
    assert rows["loss"] == pytest.approx(true, abs=1e-4)
    assert wikitext.summary(rows)["ratio"]["value"] == pytest.approx(1, abs=1e-5)
    wikitext.of_type("Q4_0", tiny)
    worse = wikitext.measure(tiny, *kept)
    assert min(worse["kl"]) > 1e-4 and worse["reference"] == rows["reference"]


def test_uniform_logits_have_the_vocabularys_perplexity(tiny, ids):
    kept = ids, wikitext.last_states(tiny, ids), tiny.lm_head.weight.clone()
    tiny.lm_head.weight.data.zero_()
    found = wikitext.summary(wikitext.measure(tiny, *kept))
    assert found["perplexity"]["value"] == pytest.approx(49152, rel=1e-4)
    # KL(p || uniform) = log V - entropy of p.
    p = (kept[1] @ kept[2].T).log_softmax(-1)
    entropy = -(p.exp() * p).sum(-1).mean().item()
    assert found["kl"]["value"] == pytest.approx(math.log(49152) - entropy, abs=1e-3)


@pytest.mark.parametrize("name", COPIES)
def test_a_copy_computes_the_same_from_other_numbers(name, make_tiny, ids):
    ours, copy = make_tiny(), COPIES[name](make_tiny())
    true, own = (model(input_ids=ids).logits for model in (ours, copy))
    assert (own - true).abs().max() < wikitext.EXACT * true.abs().max()
    for old, new in zip(ours.model.layers[0].mlp.parameters(),
                        copy.model.layers[0].mlp.parameters(), strict=True):
        assert not torch.allclose(old, new)
        same = torch.equal(old.flatten().sort().values, new.flatten().sort().values)
        assert same == (name == "shuffled")


def test_all_matrices_are_rounded_once(tiny):
    before = {name: w.clone() for name, w in wikitext.matrices(tiny).items()}
    assert len(before) == 15
    wikitext.of_type("Q4_K", tiny)
    for name, w in wikitext.matrices(tiny).items():
        assert torch.equal(w, round_trip(before[name], fitting("Q4_K", w.shape[1])))


def test_what_is_measured_in_training_has_the_adapter(tiny_directory, ids):
    adapted = with_adapter(load_model(tiny_directory, dtype=torch.float32))
    plain = forgetting.folded(adapted, tiny_directory)
    own, true = plain(input_ids=ids).logits, adapted(input_ids=ids).logits
    torch.testing.assert_close(own, true, atol=1e-4, rtol=1e-4)
    base = load_model(tiny_directory, dtype=torch.float32)
    assert not torch.allclose(own, base(input_ids=ids).logits, atol=1e-2)
    torch.testing.assert_close(forgetting.folded(plain, tiny_directory)(input_ids=ids).logits, own)
