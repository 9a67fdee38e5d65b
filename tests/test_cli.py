import pytest

from cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_its_options_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([name, "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: standin {name}" in shown
    assert "\n  " + COMMANDS[name].example.splitlines()[0] in shown


def test_unknown_command_is_refused_with_the_list():
    with pytest.raises(SystemExit, match=r"no command 'prepair'(.|\n)*prepare"):
        main(["prepair"])


def test_error_of_a_command_is_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"standin prepare: .*patient"):
        main(["prepare", str(tmp_path), str(tmp_path / "out")])
