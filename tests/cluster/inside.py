"""Runs in a pod of each image: tells what the image holds and allows, as one JSON line."""

import json
import os
import shutil
import sys
from importlib.metadata import distributions
from pathlib import Path

bill = json.loads(Path(sys.prefix, "share/sbom.cdx.json").read_text())
listed = {(entry["name"].lower().replace("_", "-"), entry["version"]) for entry in bill["components"]}
installed = {(d.metadata["Name"].lower().replace("_", "-").replace(".", "-"), d.version) for d in distributions()}
modules = Path(sys.prefix).rglob("trimtab_*/**/*.py")
print(
    json.dumps(
        {
            "user": os.getuid(),
            "safePath": sys.flags.safe_path,
            "writable": [
                path for path in ("/", "/opt/trimtab", sys.prefix, str(Path.home())) if os.access(path, os.W_OK)
            ],
            "compilers": [name for name in ("cc", "gcc", "g++", "clang", "nvcc") if shutil.which(name)],
            "uncompiled": [str(f) for f in modules if not list(f.parent.glob(f"__pycache__/{f.stem}.*.pyc"))],
            "notListed": sorted(name for name, _ in installed - listed),
            "notInstalled": sorted(name for name, _ in listed - installed),
            "hashed": all(
                any(reference.get("hashes") for reference in entry.get("externalReferences", []))
                for entry in bill["components"]
            ),
        }
    )
)
