"""What bin/docs writes: a dashboard that Grafana and Prometheus can read, and a runbook that alerts can link to."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE

OVERVIEW = BUNDLE / "roles/nginx/files/overview"
DASHBOARD: dict[str, Any] = json.loads((BUNDLE / "docs/grafana/hothouse.json").read_text())
PLOTS: list[dict[str, Any]] = json.loads((OVERVIEW / "plots.json").read_text())
RUNBOOK = (BUNDLE / "docs/runbook.md").read_text()


def queries() -> list[tuple[str, dict[str, Any]]]:
    """A name of its own and the query, for each of the dashboard."""
    return [
        (f"panel_{panel['id']}_{query['refId']}", query)
        for panel in DASHBOARD["panels"]
        for query in panel["targets"]
    ]


class Page(HTMLParser):
    """What the tests ask of a page: its tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def attributes(self, name: str) -> list[str]:
        return [value for _, values in self.tags if (value := values.get(name)) is not None]


@pytest.fixture(scope="module")
def page() -> Page:
    return Page((OVERVIEW / "runbook.html").read_text())


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """What bin/docs reads and writes, to be changed."""
    for name in ("bin", "docs", "roles"):
        shutil.copytree(BUNDLE / name, tmp_path / name)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "stale"),
    [
        ("roles/nginx/files/overview/plots.json", "docs/grafana/hothouse.json"),
        ("bin/lib/dashboard.yml", "docs/grafana/hothouse.json"),
        ("docs/runbook.md", "roles/nginx/files/overview/runbook.html"),
        ("roles/flower/meta/argument_specs.yml", "roles/flower/README.md"),
    ],
)
def test_a_file_that_is_out_of_date_is_named(copy: Path, changed: str, stale: str) -> None:
    text = (copy / changed).read_text()
    (copy / changed).write_text(
        text.replace("Backlog", "Pile").replace("Workers", "Hands").replace("Flower", "Bud")
    )
    check = [sys.executable, copy / "bin/docs", "--check"]
    done = subprocess.run(check, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.split(" differs", 1)[0]) == (1, stale)
    subprocess.run([sys.executable, copy / "bin/docs"], check=True)
    assert subprocess.run(check, check=False).returncode == 0


def test_every_plot_of_the_overview_is_in_the_dashboard() -> None:
    assert PLOTS
    for plot in PLOTS:
        panel = next(panel for panel in DASHBOARD["panels"] if panel["title"] == plot["title"])
        assert panel["type"] == "timeseries"
        wanted = [one["expr"] for one in plot["series"] + plot["thresholds"]]
        assert [query["expr"] for query in panel["targets"]] == wanted


def test_panels_have_ids_of_their_own_and_do_not_lie_on_each_other() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (place["x"] + x, place["y"] + y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["w"])
        for y in range(place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_every_query_asks_the_data_source_that_was_chosen() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["type"], variable["query"]) == ("datasource", "prometheus")
    for one in (*DASHBOARD["panels"], *(query for _, query in queries())):
        assert one["datasource"] == {"type": "prometheus", "uid": f"${{{variable['name']}}}"}


def test_every_expression_of_the_dashboard_can_be_parsed(tmp_path: Path) -> None:
    rules = [
        {
            "record": name,
            "expr": query["expr"].replace("$__rate_interval", "1m").replace("$__interval", "15s"),
        }
        for name, query in queries()
    ]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(rules)} rules found" in done.stdout


def test_every_column_of_a_table_has_a_name_and_a_place() -> None:
    tables = [
        panel for panel in DASHBOARD["panels"] if len(panel["targets"]) > 1 and panel["type"] == "table"
    ]
    assert tables
    for panel in tables:
        columns = {f"Value #{query['refId']}" for query in panel["targets"]}
        overrides = panel["fieldConfig"]["overrides"]
        names = [override["properties"][0]["value"] for override in overrides]
        assert {override["matcher"]["options"] for override in overrides} == columns
        assert len(set(names)) == len(names), panel["title"]
        assert columns < set(panel["transformations"][1]["options"]["indexByName"])


def test_the_example_for_grafana_holds_no_secret() -> None:
    example = yaml.safe_load((BUNDLE / "docs/grafana/provisioning.yml").read_text())
    (source,) = example["datasources"]
    assert source["url"] == "https://DOMAIN/prometheus/"
    assert source["basicAuth"] is True
    secrets = [source["basicAuthUser"], *source["secureJsonData"].values()]
    assert all(re.fullmatch(r"\$__file\{/etc/grafana/hothouse/[\w.]+\}", secret) for secret in secrets)
    assert len(example["providers"]) == 1


def test_every_section_of_the_runbook_can_be_linked_to(page: Page) -> None:
    """That of an alert under its name in small letters: the link in each mail."""
    ids = page.attributes("id")
    assert len(set(ids)) == len(ids)
    headings = [values.get("id") for tag, values in page.tags if tag == "h2"]
    assert len(headings) == len(re.findall("^## ", RUNBOOK, re.MULTILINE))
    alerts = re.findall(r"^## ([A-Z]\w+)$", RUNBOOK, re.MULTILINE)
    assert len(alerts) > 20
    assert {name.lower() for name in alerts} <= set(headings)


def test_every_link_of_the_runbook_leads_somewhere(page: Page) -> None:
    """nginx serves the page's own folder, Flower and the monitoring; nothing else of docs/ is there."""
    ids = page.attributes("id")
    for link in page.attributes("href") + page.attributes("src"):
        if link.startswith("#"):
            assert link[1:] in ids, link
        elif not link.startswith("https://"):
            assert link in ("./", "flower/") or (OVERVIEW / link).is_file(), link


def test_the_runbook_keeps_to_the_policy_of_its_server(page: Page) -> None:
    """Content-Security-Policy: default-src 'none', and styles of its own files alone."""
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "style", "iframe", "object", "form"}
    assert not page.attributes("style")
    assert not [name for _, values in page.tags for name in values if name.startswith("on")]
    loaded = [values.get("href") for tag, values in page.tags if tag == "link"] + page.attributes("src")
    assert all(name and (OVERVIEW / name).is_file() for name in loaded)


def test_nginx_gets_every_file_that_the_runbook_needs(page: Page) -> None:
    variables = yaml.safe_load((BUNDLE / "roles/nginx/vars/main.yml").read_text())
    needed = [values["href"] for tag, values in page.tags if tag == "link"] + page.attributes("src")
    assert {"runbook.html", *needed} <= set(variables["__nginx_overview_names"])
