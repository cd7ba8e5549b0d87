"""Margin and entropy: 0 and 1 where they must be, and scipy's in between."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import entropy as entropy_of

from service.inference.questions import entropy, margin


def test_an_undecided_softmax_has_entropy_1_and_margin_0():
    logits = torch.full((5,), 3.0)
    assert entropy(logits, "softmax") == pytest.approx(1)
    assert margin(logits.softmax(0)) == 0


def test_a_certain_softmax_has_entropy_0_also_where_probabilities_underflow():
    logits = torch.tensor([400.0, 0.0, -400.0])
    assert entropy(logits, "softmax") == 0
    assert margin(logits.softmax(0)) == 1


def test_in_between_it_is_the_entropy_by_the_largest():
    logits = torch.tensor([2.0, 1.0, -1.0, 0.3])
    expected = entropy_of(logits.softmax(0).numpy(), base=4)
    assert entropy(logits, "softmax") == pytest.approx(expected, abs=1e-6)
    assert entropy(logits, "none") == entropy(logits, "softmax")


def test_sigmoids_are_a_distribution_each():
    logits = torch.tensor([0.0, 100.0])
    assert entropy(logits, "sigmoid") == pytest.approx(0.5)
    assert entropy(torch.tensor([-1000.0]), "sigmoid") == 0
    assert margin(torch.tensor([0.7])) == pytest.approx(0.7)
