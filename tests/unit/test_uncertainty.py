"""Margin and entropy: 0 and 1 where they must be, and numpy's and scipy's in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import expit
from scipy.stats import entropy as entropy_of

from service.inference.questions import entropy, margin


def test_an_undecided_softmax_has_entropy_1_and_margin_0():
    logits = torch.full((5,), 3.0)
    assert entropy(logits, "softmax") == pytest.approx(1)
    assert margin(logits, "softmax") == 0


def test_a_certain_softmax_has_entropy_0_also_where_probabilities_underflow():
    logits = torch.tensor([400.0, 0.0, -400.0])
    assert entropy(logits, "softmax") == 0
    assert margin(logits, "softmax") == 1


def test_in_between_they_are_those_of_the_probabilities():
    """Also where the scores are the logits: the probabilities are the softmax."""
    logits = torch.tensor([2.0, 1.0, -1.0, 0.3])
    probabilities = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum()
    second, first = np.sort(probabilities)[-2:]
    for output in ("softmax", "none"):
        assert margin(logits, output) == pytest.approx(first - second, abs=1e-6)
        expected = entropy_of(probabilities, base=4)
        assert entropy(logits, output) == pytest.approx(expected, abs=1e-6)


def test_sigmoids_are_a_distribution_each_and_the_least_decided_one_is_the_margin():
    logits = torch.tensor([4.0, -0.5, -6.0])
    present = expit(logits.numpy().astype(float))
    each = np.stack([present, 1 - present])
    assert margin(logits, "sigmoid") == pytest.approx(np.ptp(each, axis=0).min(), abs=1e-6)
    assert entropy(logits, "sigmoid") == pytest.approx(entropy_of(each, base=2).mean(), abs=1e-6)


def test_sigmoids_that_are_undecided_or_certain():
    assert margin(torch.tensor([0.0, 100.0]), "sigmoid") == 0
    assert entropy(torch.tensor([0.0, 100.0]), "sigmoid") == pytest.approx(0.5)
    assert margin(torch.tensor([-1000.0, 1000.0]), "sigmoid") == 1
    assert entropy(torch.tensor([-1000.0]), "sigmoid") == 0


def test_one_logit_as_two_classes_has_the_margin_of_both():
    """A binary model gives a logit and its negative, as sigmoids."""
    pair = torch.tensor([-0.7, 0.7])
    assert margin(pair, "sigmoid") == pytest.approx(2 * expit(0.7) - 1, abs=1e-6)


def test_a_single_class_is_certain():
    assert margin(torch.tensor([3.0]), "softmax") == 1
    assert entropy(torch.tensor([3.0]), "softmax") == 0
