"""Which model a policy's name stands for, so that work on some is never taken for work on others."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from policies.pretrained.load import BUILT_IN

BESIDE_WEIGHTS = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HASHED_BYTES = 4 << 20  # of each end of a file


def fingerprint(policy: str) -> str | None:
    """12 hex digits of a local policy's config, weights (the two ends of large files), tokenizer, chat template and
    settings of generation; None if it is not local."""
    folder = BUILT_IN.get(policy, Path(policy).expanduser())
    files = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    files += [folder / name for name in BESIDE_WEIGHTS]
    if not files[0].is_file():
        return None
    return _digest(tuple((file, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[Path, int, int], ...]) -> str:
    digest = hashlib.sha256()
    for path, size, _ in files:
        with path.open("rb") as file:
            digest.update(f"{path.name} {size}\n".encode() + file.read(HASHED_BYTES))
            file.seek(max(0, size - HASHED_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:12]
