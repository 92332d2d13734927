"""What all pages have: escaped texts, and no script but the one whose hash the page names."""

from __future__ import annotations

import base64
import hashlib
import re

from support.browser import EVIL, Elements
from vlm_sft.pages.layout import label, render

CHILD = (
    '{% extends "base.html.jinja" %}{% block title %}{{ text }}{% endblock %}{% block main %}{{ text }}{% endblock %}'
)


def test_texts_are_escaped_and_nothing_may_run(tmp_path):
    (tmp_path / "child.html.jinja").write_text(CHILD)
    page = render(tmp_path / "child.html.jinja", text=EVIL)
    assert page.lstrip().startswith("<!doctype html>")
    assert Elements(page).text.count(EVIL) == 2 and "script" not in {tag for tag, _ in Elements(page).tags}
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'\"" in page


def test_the_pages_own_script_is_allowed_by_its_hash_alone(tmp_path):
    (tmp_path / "child.html.jinja").write_text(CHILD)
    (tmp_path / "own.js").write_text('"use strict"; document.title = "<&>";', encoding="utf-8")
    page = render(tmp_path / "child.html.jinja", tmp_path / "own.js", text=EVIL)
    (code,) = re.findall(r"<script>(.*)</script>", page.replace(str(EVIL), ""))
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    assert code == '"use strict"; document.title = "<&>";' and f"script-src 'sha256-{digest}'" in page
    assert "unsafe-inline" not in page.split("script-src")[1].split('"')[0]


def test_a_label_is_in_both_languages():
    assert label("<b>", "词") == '&lt;b&gt;<span lang="zh">词</span>'
