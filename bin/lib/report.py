"""Print "ID STATE DONE SIZE SENT" of the campaign whose name is the argument, from `campaigns list --json` on stdin."""

import json
import sys

for report in json.load(sys.stdin):
    if report["name"] == sys.argv[1]:
        counts = report["counts"]
        done = counts["sent"] + counts["failed"] + counts["ambiguous"]
        print(report["id"], report["state"], done, report["size"], counts["sent"])
        break
