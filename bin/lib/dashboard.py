"""The Grafana dashboard: the plots of the overview page (plots.json) and the numbers and tables of dashboard.yml."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

TABLE = Path(__file__).with_suffix(".yml")
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
UNITS = {"per second": "suffix:/s", "seconds": "s", "messages": "short", "percent": "percent"}
WIDTH = 24  # columns of Grafana's grid
DASHED = {"id": "custom.lineStyle", "value": {"fill": "dash", "dash": [8, 6]}}
RED = {"id": "color", "value": {"mode": "fixed", "fixedColor": "red"}}
FIRING = 'ALERTS{alertstate="firing"}'


def query(letter: str, expression: str, legend: str = "", table: bool = False) -> dict[str, Any]:
    """A range of values, or with `table` those of now."""
    return {
        "refId": letter,
        "datasource": SOURCE,
        "editorMode": "code",
        "expr": expression,
        "legendFormat": legend or "__auto",
        "format": "table" if table else "time_series",
        "instant": table,
        "range": not table,
    }


def panel(kind: str, title: str, width: int, height: int, queries: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "type": kind,
        "title": title,
        "datasource": SOURCE,
        "gridPos": {"w": width, "h": height},
        "targets": queries,
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {},
    }


def plot(definition: dict[str, Any]) -> dict[str, Any]:
    """A plot over time; limits are dashed red lines."""
    series = [query(f"S{i}", one["expr"], one["legend"]) for i, one in enumerate(definition["series"])]
    limits = [
        query(f"L{i}", one["expr"], f"limit: {one['legend']}")
        for i, one in enumerate(definition["thresholds"])
    ]
    result = panel("timeseries", definition["title"], WIDTH // 2, 8, series + limits)
    result["options"] = {
        "legend": {
            "displayMode": "table",
            "placement": "bottom",
            "showLegend": True,
            "calcs": ["lastNotNull", "max"],
        },
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    result["fieldConfig"]["defaults"] = {
        "unit": UNITS[definition["unit"]],
        "min": 0,
        "custom": {"drawStyle": "line", "lineWidth": 2, "fillOpacity": 0, "showPoints": "never"},
    }
    styles = {f"S{i}": [DASHED] for i, one in enumerate(definition["series"]) if one.get("dashed")}
    styles |= {limit["refId"]: [DASHED, RED, {"id": "custom.lineWidth", "value": 1}] for limit in limits}
    result["fieldConfig"]["overrides"] = [
        {"matcher": {"id": "byFrameRefID", "options": letter}, "properties": properties}
        for letter, properties in styles.items()
    ]
    return result


def stat(definition: dict[str, Any], width: int) -> dict[str, Any]:
    """One or more numbers of now."""
    queries = [query(f"A{i}", text, legend) for i, (legend, text) in enumerate(definition["numbers"].items())]
    for one in queries:
        one |= {"instant": True, "range": False}
    result = panel("stat", definition["title"], width, 4, queries)
    result["options"] = {
        "colorMode": "value",
        "graphMode": "none",
        "reduceOptions": {"calcs": ["lastNotNull"]},
        "textMode": "auto" if len(queries) > 1 else "value",
    }
    steps: list[dict[str, Any]] = [{"value": None, "color": "green" if "red" in definition else "text"}]
    if "red" in definition:
        # A step begins at its value.
        steps.append({"value": definition["red"] + 1, "color": "red"})
    result["fieldConfig"]["defaults"] = {
        "unit": UNITS[definition.get("unit", "messages")],
        "decimals": 0,
        "noValue": "none",
        "thresholds": {"mode": "absolute", "steps": steps},
    }
    return result


def table(definition: dict[str, Any]) -> dict[str, Any]:
    """A row per value of a label, and a column per expression; Grafana calls the values of query X `Value #X`."""
    columns = {f"C{i}": column for i, column in enumerate(definition["columns"])}
    queries = [query(letter, column["expr"], table=True) for letter, column in columns.items()]
    result = panel("table", definition["title"], definition["width"], 8, queries)
    result["transformations"] = [
        {"id": "merge", "options": {}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {"Time": True},
                "indexByName": {definition["row"]: 0} | {f"Value #{x}": i for i, x in enumerate(columns, 1)},
                "renameByName": {},
            },
        },
    ]
    states = [
        {"type": "value", "options": {"0": {"text": "✓ as it should be", "color": "green"}}},
        {
            "type": "range",
            "options": {"from": 1, "to": None, "result": {"text": "✖ over the limit", "color": "red"}},
        },
    ]
    for letter, column in columns.items():
        properties: list[dict[str, Any]] = [
            {"id": "displayName", "value": column["name"]},
            {"id": "unit", "value": UNITS[column.get("unit", "messages")]},
        ]
        if column["name"] == "State":
            properties += [
                {"id": "mappings", "value": states},
                {"id": "custom.cellOptions", "value": {"type": "color-text"}},
            ]
        matcher = {"id": "byName", "options": f"Value #{letter}"}
        result["fieldConfig"]["overrides"].append({"matcher": matcher, "properties": properties})
    return result


def alerts() -> dict[str, Any]:
    """What fires now, with all its labels."""
    result = panel("table", "Alerts firing", WIDTH, 6, [query("A", FIRING, table=True)])
    hidden = ("Time", "Value", "__name__", "alertstate")
    order = ("alertname", "severity", "instance", "worker", "queue", "task")
    result["transformations"] = [
        {
            "id": "organize",
            "options": {
                "excludeByName": dict.fromkeys(hidden, True),
                "indexByName": {name: i for i, name in enumerate(order)},
                "renameByName": {"alertname": "alert"},
            },
        }
    ]
    result["fieldConfig"]["defaults"] = {"noValue": "No alert is firing."}
    return result


def placed(panels: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The panels with their ids, in rows from left to right."""
    x = y = height = 0
    for number, one in enumerate(panels, 1):
        place = one["gridPos"]
        if x + place["w"] > WIDTH:
            x, y = 0, y + height
            height = 0
        yield one | {"id": number, "gridPos": place | {"x": x, "y": y}}
        x, height = x + place["w"], max(height, place["h"])


def dashboard(plots: list[dict[str, Any]]) -> str:
    """The file for Grafana."""
    own = yaml.safe_load(TABLE.read_text())
    panels = [stat(one, WIDTH // 6) for one in own["stats"]]
    panels += [alerts(), *map(table, own["tables"]), *map(plot, plots)]
    document = {
        "uid": "hothouse",
        "title": "Hothouse",
        "description": "Workers, queues and task types against their limits. Made by bin/docs of Hothouse.",
        "tags": ["celery", "hothouse"],
        "schemaVersion": 42,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "30s",
        "time": {"from": "now-1h", "to": "now"},
        "timezone": "browser",
        "annotations": {"list": []},
        "links": [],
        "templating": {
            "list": [
                {
                    "name": "datasource",
                    "label": "Prometheus",
                    "type": "datasource",
                    "query": "prometheus",
                    "current": {},
                    "hide": 0,
                    "includeAll": False,
                    "multi": False,
                    "options": [],
                    "refresh": 1,
                    "regex": "",
                }
            ]
        },
        "panels": list(placed(panels)),
    }
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"
