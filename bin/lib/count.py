"""Print pytest's closing line for several runs together; fail if anything failed or nothing ran.

Arguments: milliseconds taken, how many stages failed (linters too), pytest's JUnit files.
"""

import sys
from xml.etree import ElementTree

milliseconds, broken = int(sys.argv[1]), int(sys.argv[2])
total = failed = skipped = 0
empty = []
for path in sys.argv[3:]:
    ran = 0
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        total += int(suite.attrib["tests"])
        failed += int(suite.attrib["failures"]) + int(suite.attrib["errors"])
        skipped += int(suite.attrib["skipped"])
        ran += int(suite.attrib["tests"]) - int(suite.attrib["skipped"])
    if not ran:
        empty.append(path)

counts = {"failed": failed, "passed": total - failed - skipped, "skipped": skipped, "stages failed": broken}
for path in empty:
    print(f"{path} holds no test that ran")
words = [f"{count} {word}" for word, count in counts.items() if count] or ["no tests ran"]
print(f"===== {', '.join(words)} in {milliseconds / 1000:.1f}s =====")
sys.exit(bool(failed or broken or empty or not counts["passed"]))
