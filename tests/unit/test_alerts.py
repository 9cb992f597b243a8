"""The alerts: that they fire when they should and at no other time, and that somebody who gets one can read about it.

The cases are files for `promtool test rules` in data/alerts; the rules are the role's, rendered by Ansible for the
shipped inventories. promtool has to be in the PATH (Debian: package prometheus).
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import BUNDLE
from test_templates import rendered

CASES = sorted((BUNDLE / "tests/unit/data/alerts").glob("*.yml"))
RUNBOOK = (BUNDLE / "docs/runbook.md").read_text()
FOLDER = "/etc/prometheus/hothouse"
PATIENCE_SECONDS = 120
# An open door has no time to wait, and what has happened does not mend itself.
AT_ONCE = {"DoorOpen", "RedisFailedOver", "ServiceHung"}


def rules(inventory: str = "local", host: str = "local1", name: str = "alerts") -> dict[str, Any]:
    """A file of rules as Prometheus on this host would read it."""
    document: dict[str, Any] = yaml.safe_load(rendered(inventory)[host][f"{FOLDER}/{name}.yml"])
    return document


def alerts() -> list[dict[str, Any]]:
    return [rule for group in rules()["groups"] for rule in group["rules"]]


def names() -> set[str]:
    return {rule["alert"] for rule in alerts()}


def cases() -> list[dict[str, Any]]:
    """What the files ask of single alerts; every value a string, for 0x9 is no number there."""
    tests = [test for path in CASES for test in yaml.load(path.read_text(), yaml.BaseLoader)["tests"]]
    return [case for test in tests for case in test.get("alert_rule_test", [])]


def promtool(*words: str | Path) -> None:
    assert shutil.which("promtool"), "promtool is not in the PATH; it is in Debian's package prometheus"
    done = subprocess.run(["promtool", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rules and the cases side by side, of one host and, as prod-NAME.yml, of an environment with three of Redis.

    Only the summary of an alert has values of the moment in it, see below.
    """
    folder = tmp_path_factory.mktemp("alerts")
    for inventory, host, prefix in (("local", "local1", ""), ("prod", "monitor1", "prod-")):
        document = rules(inventory, host)
        for rule in (rule for group in document["groups"] for rule in group["rules"]):
            rule["annotations"] = {"summary": rule["annotations"]["summary"]}
        (folder / f"{prefix}alerts.yml").write_text(yaml.safe_dump(document))
        (folder / f"{prefix}records.yml").write_text(yaml.safe_dump(rules(inventory, host, "records")))
    # promtool takes groups in any order unless told; Prometheus evaluates each every few seconds.
    order = ["hothouse", *(group["name"] for group in document["groups"])]
    for path in CASES:
        (folder / path.name).write_text(f"{path.read_text()}\ngroup_eval_order: {order}\n")
    return folder


@pytest.mark.parametrize(("inventory", "host"), [("local", "local1"), ("prod", "monitor1")])
def test_prometheus_takes_the_rules(tmp_path: Path, inventory: str, host: str) -> None:
    for name in ("records", "alerts"):
        (tmp_path / f"{name}.yml").write_text(rendered(inventory)[host][f"{FOLDER}/{name}.yml"])
        promtool("check", "rules", tmp_path / f"{name}.yml")


@pytest.mark.parametrize("name", [path.stem for path in CASES])
def test_alerts_fire_when_they_should_and_at_no_other_time(folder: Path, name: str) -> None:
    promtool("test", "rules", folder / f"{name}.yml")


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    assert {case["alertname"] for case in cases() if case["exp_alerts"]} == names()
    assert {case["alertname"] for case in cases() if not case["exp_alerts"]} == names()


def test_every_alert_has_a_section_in_the_runbook_and_every_section_an_alert() -> None:
    sections = re.findall(r"^## ([A-Z]\w+)$", RUNBOOK, re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert set(sections) == names()


def test_every_alert_leads_to_its_section() -> None:
    for rule in alerts():
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook_url"] == f"https://localhost:8443/runbook.html#{anchor}"
    for rule in (rule for group in rules("prod", "monitor1")["groups"] for rule in group["rules"]):
        assert rule["annotations"]["runbook_url"].startswith("https://ops.example.com/runbook.html#")


def test_every_alert_says_how_bad_it_is_and_waits_for_what_mends_itself() -> None:
    for rule in alerts():
        assert rule["labels"]["severity"] in ("critical", "warning"), rule["alert"]
        patience = None if rule["alert"] in AT_ONCE else f"{PATIENCE_SECONDS}s"
        assert rule.get("for") == patience, rule["alert"]


def test_the_description_of_an_alert_is_the_same_each_time() -> None:
    """The files of cases compare summaries alone. Those have the values, descriptions what they may be."""
    for rule in alerts():
        assert "{{" not in rule["annotations"]["description"], rule["alert"]
        assert "\n" not in "".join(rule["annotations"].values()).strip(), rule["alert"]


LIMITS = {
    "success_percent": "TaskSuccessLow",
    "failure_percent": "TaskFailures",
    "backlog_messages": "QueueLong",
    "backlog_seconds": "QueueOld",
    "unacked_seconds": "UnackedStuck",
    "beat_late_seconds": "BeatLate",
    "dead_letters": "DeadLetters",
    "reply_queues": "ReplyQueuesOrphaned",
    "redis_memory_percent": "RedisMemoryHigh",
    "certificate_days": "CertificateExpiring",
    "disk_percent": "DiskFull",
    "reboot_days": "RebootNeeded",
    "clock_skew_seconds": "ClockSkew",
}


def test_every_limit_of_the_inventory_is_in_its_alert_and_in_the_text_of_it() -> None:
    records = [rule for group in rules(name="records")["groups"] for rule in group["rules"]]
    found = {
        rule["labels"]["name"]: rule["expr"] for rule in records if rule["record"] == "hothouse_threshold"
    }
    assert found.keys() == LIMITS.keys()
    for name, alert in LIMITS.items():
        number = found[name].removeprefix("vector(").removesuffix(")")
        rule = next(rule for rule in alerts() if rule["alert"] == alert)
        assert re.search(rf"[<>] {number}\b", rule["expr"]), alert
        assert re.search(rf"\b{number}\b", rule["annotations"]["description"]), alert


def test_the_limit_of_a_task_is_in_its_alert_and_in_the_text_of_it() -> None:
    slow = [rule for rule in alerts() if rule["alert"] == "TaskSlow"]
    assert [rule["expr"].partition("{")[2] for rule in slow] == ['task="campaigns.tasks.send_batch"} > 10']
    assert slow[0]["expr"].endswith(" > 10") and " 10 s" in slow[0]["annotations"]["description"]
