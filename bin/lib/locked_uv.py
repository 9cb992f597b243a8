"""Print the version of uv that uv.lock names, and the hash of each of its wheels, in pip's notation."""

import tomllib
from pathlib import Path

lock = tomllib.loads(Path("uv.lock").read_text(encoding="utf-8"))
uv = next(package for package in lock["package"] if package["name"] == "uv")
print(uv["version"], *("--hash=" + wheel["hash"] for wheel in uv["wheels"]))
