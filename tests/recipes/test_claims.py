"""What the papers say, as pairs of rows: verdicts follow from intervals, and every pair can be trained."""

from math import inf

import pytest

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


def test_of_nothing_recorded_nothing_is_said(tmp_path):
    text = claims.table(claims.Record(tmp_path / "none.jsonl"), "small", 300)
    assert text.count("not tried") == len(claims.CLAIMS)


def test_the_page_has_the_table_of_the_recorded_runs():
    page = claims.FILE.with_name("README.md").read_text()
    assert claims.table(claims.Record(claims.FILE), "small", 300) in page
