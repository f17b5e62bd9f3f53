"""Which layers train when: functions of seed and step, with the counts and the frequencies that they promise."""

from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from hf_lowrank import METHODS, modules
from hf_lowrank.layer_sampling import LISA, OPTION, RULES, BAdam, Layers, OwLore, rule_of, take
from hf_lowrank.methods import options, resolve


ORDERS = ("random", "ascending", "descending")


class Layer(nn.Module):
    def __init__(self, width=4):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.experts = nn.ModuleList([nn.Linear(width, 2) for _ in range(9)])


class Net(nn.Module):
    def __init__(self, layers=6):
        super().__init__()
        self.embed, self.norm = nn.Embedding(8, 4), nn.LayerNorm(4)
        self.norms = nn.ModuleList([nn.LayerNorm(4) for _ in range(12)])
        self.layers = nn.ModuleList([Layer() for _ in range(layers)])


def layers_at(rule, count, steps, seed=0, shares=()):
    return [rule.choose(count, step // rule.switch_every, seed, shares) for step in range(steps)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("count, together", [(6, 1), (6, 2), (7, 3), (1, 1)])
def test_badam_gives_every_block_exactly_k_steps_in_every_round(count, together, order):
    rule = BAdam(switch_every=5, sampled_layers=together, layer_order=order)
    turn = 5 * len(range(0, count, together))
    steps = layers_at(rule, count, 3 * turn)
    for start in range(0, len(steps), turn):
        counted = Counter(layer for active in steps[start : start + turn] for layer in active)
        assert counted == {layer: 5 for layer in range(count)}


def test_badams_orders():
    every = dict(switch_every=1)
    assert layers_at(BAdam(layer_order="ascending", **every), 4, 6) == [[0], [1], [2], [3], [0], [1]]
    assert layers_at(BAdam(layer_order="descending", **every), 4, 6) == [[3], [2], [1], [0], [3], [2]]
    random = layers_at(BAdam(**every), 12, 24)
    assert random[:12] != random[12:]  # two orders of 12! alike


def test_lisa_draws_every_set_of_layers_alike():
    """4 sigma of a binomial, for each of the 15 pairs of 6 layers over 3000 intervals."""
    rule, draws = LISA(switch_every=1, sampled_layers=2), 3000
    counted = Counter(map(tuple, layers_at(rule, 6, draws)))
    assert set(counted) == set(combinations(range(6), 2))
    expected = draws / 15
    assert all(abs(n - expected) < 4 * (expected * 14 / 15) ** 0.5 for n in counted.values())


def test_owlore_draws_by_shares_and_never_a_layer_without_outliers():
    """One layer at a time: frequencies are the shares, within 4 sigma."""
    shares, draws = [0.1, 0.0, 0.3, 0.6], 3000
    drawn = [one for (one,) in layers_at(OwLore(switch_every=1, sampled_layers=1), 4, draws, shares=shares)]
    counted = Counter(drawn)
    assert counted[1] == 0
    assert all(abs(counted[i] - draws * p) <= 4 * (draws * p * (1 - p)) ** 0.5 for i, p in enumerate(shares))


def test_equal_shares_draw_what_lisa_draws():
    owlore, lisa = OwLore(switch_every=3, sampled_layers=2), LISA(switch_every=3, sampled_layers=2)
    assert layers_at(owlore, 5, 60, shares=[0.2] * 5) == layers_at(lisa, 5, 60)


@pytest.mark.parametrize("name", RULES)
def test_the_choice_is_a_function_of_seed_and_step(name):
    rule = rule_of(name, {"switch_every": 4, "sampled_layers": 2})
    state = torch.get_rng_state()
    once = layers_at(rule, 9, 80, seed=3, shares=[1.0] * 9)
    torch.rand(5)
    backwards = [rule.choose(9, step // 4, 3, [1.0] * 9) for step in reversed(range(80))]
    assert once == backwards[::-1]
    with torch.device("meta"):  # where torch makes its tensors by default
        assert once == layers_at(rule, 9, 80, seed=3, shares=[1.0] * 9)
    assert once != layers_at(rule, 9, 80, seed=4, shares=[1.0] * 9)
    torch.set_rng_state(state)
    layers_at(rule, 9, 80, shares=[1.0] * 9)
    assert torch.equal(torch.get_rng_state(), state)  # nothing is drawn from the global generator


@pytest.mark.parametrize("rule", [BAdam(sampled_layers=2), LISA(sampled_layers=2)])
def test_the_costliest_choice(rule):
    sizes = [5, 1, 4, 4, 0, 9]
    best = rule.costliest(sizes)
    possible = [rule.choose(6, interval, 0, ()) for interval in range(200)]
    assert best in possible and sum(sizes[i] for i in best) == max(sum(sizes[i] for i in one) for one in possible)


def test_layers_are_what_stands_in_the_outermost_lists_with_matrices():
    net = Net()
    assert modules.layers(net) == list(net.layers)
    two = nn.ModuleDict({"encoder": Net(3), "decoder": Net(5)})
    assert modules.layers(two) == [*two["encoder"].layers, *two["decoder"].layers]


@pytest.mark.parametrize("name", RULES)
def test_what_requires_a_gradient(name):
    net = Net()
    frozen = {net.embed.weight, *net.layers[2].parameters(), net.layers[3].linear.weight}
    for p in frozen:
        p.requires_grad_(False)
    params = [p for p in net.parameters() if p.requires_grad]
    layers = Layers(net, params, rule_of(name, {"sampled_layers": 2}))
    assert len(layers.members) == 5  # one has nothing that trains
    asleep = layers.require_([0, 2])
    inside = {*net.layers[0].parameters(), *net.layers[3].parameters()} - frozen
    outside = {*net.norm.parameters(), *net.norms.parameters()} if name != "badam" else set()
    assert {p for p in net.parameters() if p.requires_grad} == inside | outside
    assert set(asleep) == set(params) - inside - outside


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_are_taken_out_of_those_of_the_optimizer():
    given = {"rank": "4", OPTION: "badam", "switch_every": "7", "layer_order": "ascending"}
    assert take(given) == BAdam(switch_every=7, layer_order="ascending")
    assert given == {"rank": "4"}
    assert take(given) is None


@pytest.mark.parametrize("name", RULES)
def test_the_page_has_every_option_with_its_default(name):
    page = (Path(__file__).parents[1] / "docs" / "layer-sampling.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line[:3] == "| `"]
    column = 1 + list(RULES).index(name)
    shown = {row[0].strip("`"): row[column] for row in rows if len(row) == 5}
    own = {key: item.default for key, item in options.schema(RULES[name]).items()}
    text = {key: f"{value:g}" if isinstance(value, float) else str(value).lower() for key, value in own.items()}
    assert {key: value for key, value in shown.items() if value} == text


def test_no_method_has_an_option_of_these_names():
    own = {OPTION, *(key for rule in RULES.values() for key in options.schema(rule))}
    assert not any(own & set(resolve.complete(name, {})) for name in METHODS)


@pytest.mark.parametrize(
    "given, message",
    [
        ({OPTION: "badm"}, "must be one of badam, lisa, owlore, got 'badm'.*badam"),
        ({OPTION: "badam", "switch_every": "0"}, "layer_sampling=badam: option switch_every must be an integer >= 1"),
        ({OPTION: "lisa", "sampled_layers": "0"}, "sampled_layers must be an integer >= 1"),
        ({OPTION: "lisa", "layer_order": "random"}, "layer_sampling=lisa has no option 'layer_order'"),
        ({OPTION: "owlore", "outlier_threshold": "0"}, "outlier_threshold must be a number > 0"),
        ({"switch_every": "5"}, "switch_every: for layer sampling only; add layer_sampling="),
    ],
)
def test_what_cannot_be_meant_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        take(given)


def test_models_that_have_no_such_layers_are_refused():
    with pytest.raises(ValueError, match="Sequential has no nn.ModuleList of layers with weights that train"):
        net = nn.Sequential(nn.Linear(2, 2))
        Layers(net, net.parameters(), BAdam())
    with pytest.raises(ValueError, match="sampled_layers=5: Net has 3 layers that train"):
        net = Net(3)
        Layers(net, net.parameters(), OwLore())
