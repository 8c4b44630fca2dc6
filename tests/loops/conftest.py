"""What holds for every method, whatever a test is about."""

import json
import re
from collections import defaultdict

import pytest
from loops.cards import check_card

from genlight.loops import checkpoint_work
from genlight.reports import finishing


@pytest.fixture(scope="module", autouse=True)
def every_artifact_has_a_card(tmp_path_factory):
    """After the tests of a file: the artifacts that `validate` left with a report and a table have cards."""

    def reports():
        return set(tmp_path_factory.getbasetemp().glob("**/validate/report.json"))

    before = reports()
    yield
    for report in sorted(reports() - before):
        if (report.parent / "artifact").is_dir() and json.loads(report.read_text())["table"]:
            check_card(report.parent / "artifact")


@pytest.fixture(scope="module", autouse=True)
def few_of_what_is_alike():
    """LCSC begins with two averages of each kind, where it has sixty that each search measures; and a picture is drawn
    twice, not three times, to know how long that takes.
    """
    every = checkpoint_work.baseline_candidates

    def two_of_each_kind(*arguments):
        kinds = defaultdict(list)
        for name, candidate in every(*arguments).items():
            kinds[re.match("[a-z ]*", name)[0]].append((name, candidate))
        return dict(each for kind in kinds.values() for each in kind[:2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_work, "baseline_candidates", two_of_each_kind)
        patch.setattr(finishing, "_DRAWN", 2)
        yield
