"""Generate the Python stubs beside the .proto files: `python protos/generate.py [--check]`.

`--check` writes nothing and exits with 1 when a stub differs from what its .proto gives.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).resolve().parent


def generate(out: Path) -> list[Path]:
    """Write stubs for every .proto under `out`; returns their paths relative to it."""
    sources = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("flume_protos/*/*.proto"))
    include = Path(protoc.__file__).parent / "_proto"
    flags = [
        f"-I{ROOT}",
        f"-I{include}",
        f"--python_out={out}",
        f"--pyi_out={out}",
        f"--grpc_python_out={out}",
    ]
    if protoc.main(["protoc", *flags, *sources]) != 0:
        raise SystemExit("protoc failed")
    return sorted(path.relative_to(out) for path in out.rglob("*_pb2*"))


def main() -> int:
    if "--check" not in sys.argv:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        stale = [
            str(path)
            for path in generate(out)
            if not (ROOT / path).exists() or (ROOT / path).read_bytes() != (out / path).read_bytes()
        ]
    if stale:
        print(f"stale stubs, run `make protos`: {', '.join(stale)}", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
