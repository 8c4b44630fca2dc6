"""Commands made wrong by rules answer in one line that names what is right; the proof `whole` runs two hundred."""

import pytest
from bad_commands import BadCommand, bad_commands

from genlight import cli

# another seed than that of the proof, whose commands the checks were mended with
COMMANDS = bad_commands(28, seed=1)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.words))
def test_a_bad_command_names_what_is_right(
    command: BadCommand, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "_run_job", lambda *_: pytest.fail("the command was accepted"))
    monkeypatch.setattr(cli, "accepted", _unless_fine(cli.accepted))
    assert cli.main(list(command.words)) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "Traceback" not in error
    assert any(name in error for name in command.named), f"{error} names none of {command.named}"


def _unless_fine(accepted):
    def guarded(overrides):
        config = accepted(overrides)
        assert config is None, f"{overrides} was accepted"
        return config

    return guarded
