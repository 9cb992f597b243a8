"""Print pytest's closing line for several runs together; fail if anything failed or nothing ran.

Arguments: milliseconds taken, how many stages failed (linters too), pytest's JUnit files.
"""

import sys
from xml.etree import ElementTree

milliseconds, broken = int(sys.argv[1]), int(sys.argv[2])
total = failed = skipped = 0
for path in sys.argv[3:]:
    for suite in ElementTree.parse(path).getroot().iter("testsuite"):
        total += int(suite.attrib["tests"])
        failed += int(suite.attrib["failures"]) + int(suite.attrib["errors"])
        skipped += int(suite.attrib["skipped"])

counts = {"failed": failed, "passed": total - failed - skipped, "skipped": skipped, "stages failed": broken}
words = [f"{count} {word}" for word, count in counts.items() if count] or ["no tests ran"]
print(f"===== {', '.join(words)} in {milliseconds / 1000:.1f}s =====")
sys.exit(bool(failed or broken or not counts["passed"]))
