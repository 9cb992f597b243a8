"""The whole of it: real workers that are stopped and killed while they send."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import SENDER, TEMPLATE, MailServer, Redis, people, wait_until

from campaigns.store import Ledger
from campaigns.tasks import check_scheduled_campaigns

TESTS = str(Path(__file__).parent)


@contextmanager
def worker(log: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "celery", "-A", "deployment", "worker", "-Q", "default,email_senders"]
    command += ["-P", "threads", "-c", "4", "-l", "INFO", "--without-gossip", "--without-mingle"]
    with log.open("a") as output:
        environment = {**os.environ, "PYTHONPATH": TESTS}
        with subprocess.Popen(command, stdout=output, stderr=output, env=environment) as process:
            try:
                yield process
            finally:
                process.kill()


def test_whatever_is_killed_nobody_gets_two_mails_and_nobody_is_lost(
    book: Ledger,
    celery: Any,
    redis_server: Redis,
    mail_server: MailServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("CLAIM", "REPLY", "REQUEUE"):
        monkeypatch.setenv(f"CAMPAIGNS_{name}_SECONDS", "2")
    count, log = 600, tmp_path / "worker.log"
    campaign_id = book.create("Test", SENDER, TEMPLATE, people(count), 20)

    def mails(number: int) -> Callable[[], bool]:
        return lambda: len(mail_server.mails) >= number

    with worker(log) as first:
        check_scheduled_campaigns()
        wait_until(mails(100))
        first.send_signal(signal.SIGKILL)
    redis_server.admin.delete("q:email_senders")  # what was queued is lost as well
    with worker(log) as second:
        # The queue is lost, so only what the ledger knows can bring the rest.
        wait_until(lambda: check_scheduled_campaigns()["batches"])
        wait_until(mails(200))
        second.send_signal(signal.SIGTERM)
        assert second.wait(20) == 0
    with worker(log):
        wait_until(lambda: check_scheduled_campaigns() and book.campaign(campaign_id).finished_at, 40)

    counts = book.counts(campaign_id)
    assert counts["sent"] + counts["ambiguous"] == count
    assert counts["ambiguous"] <= 4, "no more than were on their way when the first worker was killed"
    received = mail_server.received()
    assert set(received.values()) == {1}
    assert counts["sent"] <= len(received) <= count
    assert "Traceback" not in log.read_text()
