"""report.html: a path is checked without changing what is there."""

from finetune.report.html import check_page_path


def test_checking_the_path_leaves_a_page_that_is_there(tmp_path):
    page = tmp_path / "audit.html"
    page.write_text("before", encoding="utf-8")
    check_page_path(page)
    assert page.read_text(encoding="utf-8") == "before"
    assert list(tmp_path.iterdir()) == [page]
