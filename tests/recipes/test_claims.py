"""What the papers say, as pairs of rows: verdicts follow from intervals, and every pair can be trained."""

import warnings
from math import inf

import pytest
from scipy.stats import ttest_1samp

from recipes.studies import claims
from recipes.studies.compare_training import options


@pytest.mark.parametrize(
    "difference, words",
    [
        ((-0.2, 0.1), "holds here"),
        ((0.2, 0.1), "the other way round here"),
        ((-0.2, 0.2), "not decidable here"),
        ((-0.2, inf), "not decidable here"),  # one seed
        ((inf, inf), "one of them diverged"),
        (None, "not tried"),
    ],
)
def test_a_verdict_is_where_the_interval_lies(difference, words):
    assert claims.verdict(difference) == words


def test_rows_have_one_name_each_and_options_that_their_methods_take():
    rows = claims.rows()
    named = {(row.method, str(dict(row.options)), row.betas) for c in claims.CLAIMS for row in (c.first, c.second)}
    assert len({row.name for row in rows}) == len(rows) == len(named)
    for row in rows:
        given = options(row, "tiny")
        assert given["rank"] == 4 and given.get("update_proj_gap", claims.GAP) == claims.GAP, row.name


def test_chances_are_those_of_a_paired_t_test_and_corrected_by_holm():
    """By scipy's own test; Holm's own example would need a table, so by its definition on four values."""
    differences = [0.02, 0.05, -0.01, 0.04, 0.03]
    second = dict(enumerate([3.0, 3.25, 2.5, 4.0, 3.5]))
    first = {seed: loss + difference for (seed, loss), difference in zip(second.items(), differences, strict=True)}
    expected = ttest_1samp(differences, 0.0).pvalue
    assert claims.chance({**first, 7: 0.0}, second) == pytest.approx(expected, rel=1e-9)
    assert claims.chance({}, second) == claims.chance({0: 3.1}, second) == claims.chance(second, second) == 1
    assert claims.chance({**first, 0: inf}, second) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, that there is no spread
        assert claims.chance({seed: loss + 0.125 for seed, loss in second.items()}, second) == 0
    assert claims.corrected([0.04, 0.01, 0.03, 0.5]) == pytest.approx([0.09, 0.04, 0.09, 0.5])


def test_of_nothing_recorded_nothing_is_said(tmp_path):
    text = claims.table(claims.Record(tmp_path / "none.jsonl"), "small", 300)
    assert text.count("not tried") == len(claims.CLAIMS)


def test_the_page_has_the_table_of_the_recorded_runs():
    page = claims.FILE.with_name("README.md").read_text()
    assert claims.table(claims.Record(claims.FILE), "small", 300) in page
