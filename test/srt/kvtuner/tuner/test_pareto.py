"""Pruning pairs and grouping layers."""

import pytest

from sglang.srt.kvtuner.config.preset import LayerBits
from sglang.srt.kvtuner.tuner.pareto import LayerGroup, group_layers, pareto_front
from sglang.srt.kvtuner.tuner.recipe import ALL_PAIRS

K8V8, K8V4, K4V8, K4V4, K2V2 = (LayerBits(*p) for p in ((8, 8), (8, 4), (4, 8), (4, 4), (2, 2)))


def test_a_pair_stays_unless_another_is_as_cheap_and_as_good():
    errors = {K8V8: 0.01, K8V4: 0.02, K4V8: 0.3, K4V4: 0.3, K2V2: 0.9}
    assert pareto_front(errors) == (K2V2, K4V4, K8V4, K8V8)


def test_more_bits_that_do_not_help_go():
    assert pareto_front({K8V8: 0.1, K8V4: 0.1, K4V4: 0.1, K2V2: 0.2}) == (K2V2, K4V4)


def test_of_equal_pairs_the_one_with_more_key_bits_stays():
    assert pareto_front({K4V8: 0.1, K8V4: 0.1}) == (K8V4,)


def test_no_pair_left_over_beats_another():
    errors = {pair: 1 / (3 * pair.key + pair.value) for pair in ALL_PAIRS}
    front = pareto_front(errors)
    bits = [pair.key + pair.value for pair in front]
    assert bits == sorted(set(bits)) and [errors[p] for p in front] == sorted((errors[p] for p in front), reverse=True)
    for pair in set(ALL_PAIRS) - set(front):
        assert any(b.key + b.value <= pair.key + pair.value and errors[b] <= errors[pair] for b in front)


FRONT, OTHER = (K4V4, K8V8), (K2V2, K8V8)


def errors(first, second):
    return {K4V4: first, K2V2: first, K8V8: second}


def test_layers_of_different_fronts_are_never_one_group():
    groups = group_layers([FRONT, OTHER, FRONT], [errors(0.5, 0.1)] * 3, most=1)
    assert groups == (LayerGroup((0, 2), FRONT), LayerGroup((1,), OTHER))


@pytest.mark.parametrize(
    "most, layers",
    [(4, [(0,), (1,), (2,), (3,)]), (3, [(0, 2), (1,), (3,)]), (2, [(0, 2, 3), (1,)]), (1, [(0, 1, 2, 3)])],
)
def test_similar_layers_come_together_first(most, layers):
    measured = [errors(0.50, 0.10), errors(0.01, 0.001), errors(0.52, 0.10), errors(0.7, 0.15)]
    groups = group_layers([FRONT] * 4, measured, most=most)
    assert [group.layers for group in groups] == layers


def test_an_error_of_nothing_is_no_obstacle():
    groups = group_layers([FRONT] * 2, [errors(0.0, 0.0), errors(0.0, 0.0)], most=1)
    assert groups == (LayerGroup((0, 1), FRONT),)
