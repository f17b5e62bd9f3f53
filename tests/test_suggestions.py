"""A misspelt name is answered with what was meant: the same words in another order, then the same letters."""

import doctest

import pytest
from torch import nn

from hf_lowrank import target_parameters
from hf_lowrank.methods import resolve, suggestions
from hf_lowrank.methods.suggestions import LONG, suggest
from hf_lowrank.methods.table import METHODS


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("galore_adamw_i3s", "galore_i3s_adamw"),  # words in another order
        ("adamw-i3s-galore", "galore_i3s_adamw"),
        ("fira_i3s", "fira_i3s_adamw"),  # a word left out: of equally near names the first of the table
        ("fira", "fira_adamw"),
        ("apollo", "apollo_random_adamw"),
        ("galor_i3s_adamw", "galore_i3s_adamw"),  # letters
        ("galore_i3sadamw", "galore_i3s_adamw"),
        ("ldadm", "ldadam"),
        ("Fira_I3S_AdamW", "fira_i3s_adamw"),
        ("galore_i3s_adam_8bit", "galore_i3s_adamw"),  # an ending is no word of the name
        ("subtrack++", "subtrack_adamw"),
        ("muon", "full_muon"),  # the method itself, before others that have it in them
        ("muon_layerwise", "full_muon"),
        ("adamw", "full_adamw"),
        ("adafactor", "full_adafactor"),
    ],
)
def test_the_nearest_method(given, meant):
    with pytest.raises(ValueError, match=f"unknown method .*; did you mean '{meant}'"):
        resolve.split(given)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("galore_adamw", "galore_dominant_adamw"),
        ("galore_adamw_8bit", "galore_dominant_adamw_8bit"),
        ("galore_adamw_layerwise", "galore_dominant_adamw_layerwise"),
        ("galore_adafactor", "galore_dominant_adafactor"),
        ("apollo_adamw", "apollo_random_adamw"),
        ("apollo_adamw_layerwise", "apollo_random_adamw_layerwise"),
    ],
)
def test_a_name_of_transformers_is_called_so_and_ours_is_named(theirs, ours):
    with pytest.raises(ValueError, match=f"transformers' own.*the method here is '{ours}'"):
        resolve.split(theirs)
    assert ours in resolve.names()


def test_of_a_method_that_transformers_has_too_ours_is_what_was_meant():
    assert suggest("galore", ["galore_adamw", *resolve.names()]).startswith("; did you mean 'galore_dominant_adamw'?")


def test_a_name_of_transformers_means_nothing_among_other_names():
    assert "transformers" not in suggest("galore_adamw", ["rank", "scale"])


@pytest.mark.parametrize(
    ("given", "meant"),
    [("rnak", "rank"), ("gap_proj_update", "update_proj_gap"), ("gap", "update_proj_gap"), ("scal", "scale")],
)
def test_the_nearest_option(given, meant):
    with pytest.raises(ValueError, match=f"no option '{given}'; did you mean '{meant}'"):
        resolve.complete("galore_i3s_adamw", {given: 1})


def test_a_long_list_is_left_out_where_a_name_is_near_and_only_there():
    assert len(METHODS) > LONG
    assert "Valid" not in suggest("galor_i3s_adamw", METHODS)
    assert suggest("zzz", METHODS) == f". Valid: {', '.join(METHODS)}"
    assert suggest("clasifier", ["classifier", "pooler"]) == "; did you mean 'classifier'? Valid: classifier, pooler"
    assert suggest("anything", []) == ". Valid: none"


def test_what_is_like_nothing_is_not_guessed():
    options = resolve.complete("galore_i3s_adamw", {})
    for word in ("lr", "weight_decay", "learning_rate", "momentum", "rank_rank_rank", "", "_"):
        assert "did you mean" not in suggest(word, options), word


def test_the_examples():
    assert doctest.testmod(suggestions) == (0, 1)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Linear(8, 16), "the model is one Linear without a name of its own; leave the option out"),
        (nn.Conv2d(3, 4, 3), "matches no trainable matrix: Conv2d has none"),
        (nn.Sequential(nn.Linear(8, 16)), "matches no trainable matrix. Valid: 0"),
    ],
)
def test_a_pattern_that_matches_nothing_says_what_there_is(model, says):
    with pytest.raises(ValueError) as refused:
        target_parameters(model, rank=2, target_modules="q_proj")
    assert says in str(refused.value) and "none" not in str(refused.value).replace("has none", "")
