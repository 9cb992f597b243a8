"""The runbook as a page beside the overview, so that the link in an alert's mail opens what to do about it."""

from __future__ import annotations

import re

import markdown

PAGE = """<!doctype html>
<!-- Written by bin/docs from docs/runbook.md. -->
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <meta name="color-scheme" content="light dark">
  <title>{title} · Hothouse</title>
  <link rel="icon" href="icon.svg" type="image/svg+xml">
  <link rel="stylesheet" href="overview.css">
  <link rel="stylesheet" href="runbook.css">
</head>
<body>
  <a class="skip" href="#main">Skip to the text</a>

  <header>
    <h1><img src="icon.svg" alt="" width="22" height="22"> Hothouse <span>{title}</span></h1>
    <nav aria-label="Tools">
      <a href="./">Overview</a>
      <a href="flower/">Flower</a>
    </nav>
  </header>

  <main id="main" class="text" tabindex="-1">
{introduction}
<nav class="contents" aria-label="Contents">
<ul>
{contents}
</ul>
</nav>
{sections}
  </main>
</body>
</html>
"""


def page(text: str) -> str:
    """The page of a text whose first line is its title and whose sections are the alerts."""
    title, _, body = text.partition("\n")
    # Other pages of docs/ are not served.
    body = re.sub(r"\[([^]]+)\]\((?!#|https?:)([^)]+)\)", r"\1 (`docs/\2`)", body)
    tables = {"use_align_attribute": True}
    converter = markdown.Markdown(
        extensions=["fenced_code", "tables", "toc"],
        extension_configs={"markdown.extensions.tables": tables, "tables": tables},
        output_format="html",
    )
    # What is wider than a phone is scrolled, with the keyboard as well.
    html = converter.convert(body).replace("<pre>", '<pre tabindex="0">')
    introduction, first, sections = html.partition("<h2")
    entries = [entry for entry in converter.toc_tokens if entry["level"] == 2]
    return PAGE.format(
        title=title.removeprefix("# "),
        introduction=introduction.strip(),
        contents="\n".join(f'<li><a href="#{entry["id"]}">{entry["name"]}</a></li>' for entry in entries),
        sections=first + sections,
    )
