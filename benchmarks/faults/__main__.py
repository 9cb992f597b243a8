#!/usr/bin/env python3
"""What is lost, doubled or held up when things break: faults in random order on the hosts of the scenario `faults`.

    molecule --base-config .config/molecule/config.yml converge -s faults
    .venv/bin/python benchmarks/faults [--faults 100] [--recipients 10000] [--rate 40] [--seed 1] [--only NAME…]

Prints a row for each kind of fault, and exits with 1 if anything was lost, or doubled without being listed as
ambiguous, with 2 if something was not broken or mended as it should have been. The same seed gives the same faults in
the same order. What the columns say is in docs/faults.md.
"""

from __future__ import annotations

import argparse
import sys

from catalogue import FAULTS
from collector import Collector
from hosts import Hosts, Unready
from trial import MAIL_PORT, TASKS_PORT, Trial, table


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--recipients", type=int, default=10_000, help="in all")
    parser.add_argument("--rate", type=float, default=40, help="tasks a second")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", nargs="+", default=[], choices=[fault.name for fault in FAULTS])
    arguments = parser.parse_args()
    try:
        hosts = Hosts()
        with Collector(hosts.gateway, TASKS_PORT, MAIL_PORT) as collector:
            each = max(1, arguments.recipients // arguments.faults)
            trial = Trial(hosts, collector, arguments.seed, each, arguments.rate)
            outcome = trial.run(trial.series(arguments.faults, arguments.only))
    except (Unready, TimeoutError) as error:
        print(error, file=sys.stderr)
        return 2
    print(table(outcome))
    for row in outcome.rows.values():
        for line in row.details:
            print(line)
    for number, error in outcome.refused.items():
        print(f"task {number} was refused: {error}")
    if outcome.problems:
        return 2
    return int(any(row.lost or row.duplicated for row in outcome.rows.values()) or bool(outcome.refused))


if __name__ == "__main__":
    sys.exit(main())
