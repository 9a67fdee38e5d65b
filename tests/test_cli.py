import pytest

from cli import COMMANDS, main


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_shows_its_options_and_an_example(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*name.split(), "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert f"usage: standin {name}" in shown
    assert "\n  " + COMMANDS[name].example.splitlines()[0] in shown


def test_unknown_command_is_refused_with_the_list():
    with pytest.raises(SystemExit, match=r"no command 'prepair'(.|\n)*prepare"):
        main(["prepair"])


@pytest.mark.parametrize("words", [["export"], ["export", "--help"]])
def test_command_with_several_kinds_lists_them(words, capsys):
    main(words)
    shown = capsys.readouterr().out
    assert shown.startswith("usage: standin export KIND ...")
    kinds = [line.split()[1] for line in shown.splitlines() if line.startswith("  export ")]
    assert kinds == ["nnunet", "decathlon", "images", "huggingface", "onnx", "torchscript", "safetensors", "bundle"]
    assert "prepare" not in shown


def test_kind_that_there_is_not_is_refused_with_the_list():
    with pytest.raises(SystemExit, match=r"no command 'export coco'(.|\n)*export nnunet"):
        main(["export", "coco"])


def test_two_words_name_one_command(tmp_path):
    with pytest.raises(SystemExit, match=r"standin export images: Expected a slice set at .*, but it has no dataset"):
        main(["export", "images", str(tmp_path), str(tmp_path / "out")])


def test_error_of_a_command_is_one_message(tmp_path):
    with pytest.raises(SystemExit, match=r"standin prepare: .*patient"):
        main(["prepare", str(tmp_path), str(tmp_path / "out")])
