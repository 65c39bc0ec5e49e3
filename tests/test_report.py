"""The documents' tables are those of the stored results."""

import re

import pytest

from benchmarks import report


def test_the_documents_hold_the_stored_results(capsys):
    assert report.main(["--check"]) == 0, f"{capsys.readouterr().out}run python -m benchmarks.report"


def test_a_changed_number_is_found(tmp_path, monkeypatch, capsys):
    document = tmp_path / "README.md"
    monkeypatch.setattr(report, "ROOT", tmp_path)
    monkeypatch.setattr(report, "DOCUMENTS", (document,))
    monkeypatch.setattr(report, "IMAGES", tmp_path / "images")
    document.write_text("before\n<!-- table static -->\n| kernel |\n<!-- end -->\nafter\n", encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert report.main([]) == 0 and report.main(["--check"]) == 0
    text = document.read_text(encoding="utf-8")
    assert text.startswith("before\n<!-- table static -->\n| kernel | cases |") and text.endswith("\nafter\n")
    document.write_text(re.sub(r"\d", lambda digit: str(9 - int(digit[0])), text, count=1), encoding="utf-8")
    assert report.main(["--check"]) == 1
    assert "README.md: differs from the stored results" in capsys.readouterr().out


def test_an_unknown_table_is_an_error(tmp_path, monkeypatch):
    with pytest.raises(KeyError, match="speed"):
        report.filled("<!-- table speed -->\n<!-- end -->")
