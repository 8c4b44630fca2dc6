"""What holds for every method, whatever a test is about."""

import json

import pytest
from loops.cards import check_card


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
