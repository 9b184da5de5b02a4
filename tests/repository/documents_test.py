#!/usr/bin/env python3
"""Checks the documents: links between files lead somewhere, scripts are executable, data stays small.

Usage: documents_test.py REPOSITORY
"""

import os
import pathlib
import re
import sys

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
DATA_BYTES_MAX = 20_000_000
BINARY = {".safetensors", ".bin", ".png"}
SKIP = {"build", ".git"}


def files(root):
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f not in SKIP and not f.startswith("build-")]
        for name in names:
            yield pathlib.Path(folder) / name


def problems(root):
    data_bytes = 0
    for path in files(root):
        if path.suffix in BINARY:
            data_bytes += path.stat().st_size
        if path.suffix == ".md":
            for match in LINK.finditer(path.read_text()):
                target = match.group(1)
                if "://" in target or target.startswith("mailto:"):
                    continue
                if not (path.parent / target).exists():
                    yield f"{path.relative_to(root)}: dead link {target}"
        if path.suffix == ".sh" or path == root / ".ci" / "run":
            if not os.access(path, os.X_OK):
                yield f"{path.relative_to(root)}: not executable"
    if data_bytes > DATA_BYTES_MAX:
        yield f"binary data weighs {data_bytes} bytes, more than {DATA_BYTES_MAX}"
    for needed in ("README.md", "CHANGELOG.md", "LICENSE", "CONTRIBUTING.md", "docs/architecture.md", "docs/protocol.md"):
        if not (root / needed).exists():
            yield f"{needed} is missing"


def main():
    found = list(problems(pathlib.Path(sys.argv[1])))
    for line in found:
        print(line)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
