"""Replicas: what they share with the master and what is their own."""

from __future__ import annotations

import pytest
import torch
from tiny import SmallNet, loaded
from torch import nn
from torch.nn.utils import parametrize, prune

from service.inference.batch import run
from service.inference.questions import InferenceResult, Question
from service.models.pool import ModelPool
from service.models.replicas import replicate

PIXELS = torch.randint(0, 255, (3, 32, 32), dtype=torch.uint8)


def test_a_replica_shares_parameters_and_owns_buffers_and_hooks() -> None:
    master = SmallNet().eval()
    copy = replicate(master)
    shared = zip(master.parameters(), copy.parameters(), strict=True)
    assert all(mine.data_ptr() == theirs.data_ptr() for mine, theirs in shared)
    buffers = zip(master.buffers(), copy.buffers(), strict=True)
    assert all(mine.data_ptr() != theirs.data_ptr() for mine, theirs in buffers)
    copy.features.register_forward_hook(lambda *_: None)
    assert not master.features._forward_hooks


def _weight_norm(model: SmallNet) -> None:
    with pytest.warns(FutureWarning, match="weight_norm"):
        nn.utils.weight_norm(model.head)


def _pruned(model: SmallNet) -> None:
    prune.l1_unstructured(model.features[3], "weight", amount=0.5)


def _parametrised(model: SmallNet) -> None:
    nn.utils.parametrizations.weight_norm(model.head)
    assert parametrize.is_parametrized(model.head)


@pytest.mark.parametrize("prepare", [_weight_norm, _pruned, _parametrised])
def test_a_model_with_hooks_or_computed_weights_of_its_own_is_served(prepare) -> None:
    """Its own hooks stay, and its replicas come back clean."""
    module = SmallNet()
    prepare(module)
    expected = module.eval()(PIXELS[None] / 255)
    pool = ModelPool([loaded(module)], replicas=2)
    for _ in range(2):
        with pool.lease("tiny") as replica:
            (answer,) = run(replica, [Question(PIXELS, top_k=7, layers=("features",))])
        assert isinstance(answer, InferenceResult)
        logits = {p.class_id: p.logit for p in answer.predictions}
        assert [logits[i] for i in range(7)] == pytest.approx(expected[0].tolist(), abs=1e-5)
    assert pool.replaced == {"tiny": 0}
    assert pool.faults() == []


def test_an_old_version_is_freed_when_its_last_user_is_done() -> None:
    """Who holds a version finishes on it; new users get the new one."""
    pool = ModelPool([loaded(SmallNet(seed=0))], replicas=2)
    with pool.use("tiny") as old:
        new = loaded(SmallNet(seed=1))
        pool.put(new)
        assert pool.model("tiny") is new
        with pool.lease(old) as replica:
            assert replica.model is old
            pool.put(loaded(SmallNet(seed=2)))
        assert len(pool._live) == 4
    assert len(pool._live) == 2
    assert pool.faults() == []


def test_a_removed_model_is_served_no_longer_but_to_who_holds_it() -> None:
    pool = ModelPool([loaded(SmallNet())], replicas=1)
    with pool.use("tiny") as model:
        pool.remove("tiny")
        assert not pool.models
        with pool.lease(model) as replica:
            replica.module(torch.zeros(1, 3, 32, 32))
    assert not pool._live
