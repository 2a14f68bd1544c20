"""Cases that are still read wrongly: kind -> what is wrong, and the seeds. Each has to fail."""

from __future__ import annotations

_WRONG: dict[str, tuple[str, str]] = {}
KNOWN = {
    (kind, int(seed)): wrong for kind, (wrong, seeds) in _WRONG.items() for seed in seeds.split()
}
