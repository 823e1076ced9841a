from __future__ import annotations

import pytest

from effdet.cli.main import _COMMANDS
from effdet.version import __version__


@pytest.mark.parametrize("command", _COMMANDS)
def test_help_explains_and_shows_examples(cli, command):
    result = cli(command, "--help")
    assert result.code == 0
    assert f"effdet {command}" in result.out
    assert "example" in result.out


def test_version(cli):
    result = cli("--version")
    assert (result.code, result.out) == (0, f"effdet {__version__}\n")


def test_help_lists_every_command(cli):
    result = cli("--help")
    assert result.code == 0
    assert all(f"\n    {command} " in result.out for command in _COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["paint"], "invalid choice: 'paint'"),
        (["detect"], "INPUT"),
        (["detect", "a.png", "--score", "2"], "'2' takes a number from 0 to 1"),
        (["detect", "a.png", "--iou", "1.5"], "--iou: '1.5' takes a number from 0 to 1"),
        (["detect", "a.png", "--sigma", "0"], "--sigma: '0' takes a number above 0"),
        (["eval", "data", "--max-per-class", "0"], "--max-per-class: '0' takes an integer >= 1"),
        (["detect", "a.png", "--size", "12"], "'12' is too small"),
        (["detect", "a.png", "--size", "axb"], "'axb' is no size"),
        (["train", "data", "--epochs", "0"], "'0' takes an integer >= 1"),
        (["train", "--out", "run"], "DATA is missing"),
        (["train", "data"], "OUT is missing"),
        (["scenes", "out", "--seed", "-1"], "takes an integer >= 0"),
    ],
)
def test_wrong_usage_exits_with_2(cli, arguments, says):
    result = cli(*arguments)
    assert result.code == 2
    assert says in result.err


def test_a_bug_is_not_swallowed(cli, monkeypatch):
    def broken(args):
        return {}["missing"]

    monkeypatch.setattr("effdet.cli.info_command.run", broken)
    with pytest.raises(KeyError):
        cli("info")


def test_traceback_option_shows_the_error_itself(cli, tmp_path):
    assert cli("eval", tmp_path / "none").code == 1
    with pytest.raises((ValueError, OSError)):
        cli("--traceback", "eval", tmp_path / "none")
