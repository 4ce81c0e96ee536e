"""Inputs of a call as arrays, and back."""

from __future__ import annotations

import pytest
import torch

from detr_conformance.cases import Recipe, build
from detr_fixtures import arrays
from detr_reference.options import options_of


def same(one, other):
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.parametrize("profile", ["detr", "grounding-dino"])
def test_a_call_comes_back_as_it_was(profile):
    case = build(Recipe(3, (2, 0, 1), 4, aux=2, encoder_queries=5), options_of(profile), frozenset())
    packed = arrays.to_bytes(arrays.flat(case.outputs, case.targets))

    outputs, targets = arrays.nested(arrays.from_bytes(packed))

    assert same(dict(case.outputs), outputs)
    assert same(list(map(dict, case.targets)), targets)
    assert packed == arrays.to_bytes(arrays.from_bytes(packed))


def test_half_precision_and_infinities_come_back():
    outputs = {"pred_logits": torch.tensor([[[-torch.inf, 1.1]]]).bfloat16(), "dn_meta": {"pad_size": 6}}
    found, targets = arrays.nested(arrays.from_bytes(arrays.to_bytes(arrays.flat(outputs, []))))
    assert same(outputs, found)
    assert targets == []


def test_what_cannot_be_stored_is_named():
    with pytest.raises(TypeError, match="targets/0/labels is a str"):
        arrays.flat({}, [{"labels": "cat"}])
    with pytest.raises(ValueError, match=r"not a whole \.npz file"):
        arrays.from_bytes(arrays.to_bytes(arrays.flat({"a": torch.ones(3)}, []))[:-9])
