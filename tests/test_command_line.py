"""The command line prints from the catalog and from info()."""

import pytest

from regularizers.__main__ import main


def test_list_shows_one_family(capsys):
    assert main(["list", "--family", "dropout"]) == 0
    output = capsys.readouterr().out
    assert "30  implemented  MultiSampleDropout" in output
    assert "transport" not in output


def test_list_filters_by_status(capsys):
    assert main(["list", "--status", "implemented"]) == 0
    assert "planned" not in capsys.readouterr().out


def test_show_prints_source_status_and_names(capsys):
    assert main(["show", "multi-sample", "dropout"]) == 0
    output = capsys.readouterr().out
    for part in (
        "[30]",
        "arXiv 1905.09788",
        "implemented",
        "regularizers.dropout.MultiSampleDropout",
    ):
        assert part in output


def test_show_says_when_nothing_was_found(capsys):
    assert main(["show", "xyzzy"]) == 1
    assert "nothing found for 'xyzzy'" in capsys.readouterr().err


def test_info_tells_what_serves_each_operator(capsys):
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert "multi_sample_dropout_cross_entropy" in output
    assert "cpu: cpp" in output


def test_unknown_command_is_an_error(capsys):
    with pytest.raises(SystemExit):
        main(["fly"])
    assert "invalid choice" in capsys.readouterr().err
