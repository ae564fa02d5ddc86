"""What a stage has already finished, so that a killed run goes on where it stopped.

`ledger.jsonl` beside the data: the first line carries the identity of the work (digest of configuration, inputs and
revision), each further line one finished piece. A line that a crash cut short counts as not written.
"""

import json
import os
from pathlib import Path

from circuitmill.stores.files import canonical_json, sync_folder


class Ledger:
    """Finished pieces of one output folder."""

    FILE = "ledger.jsonl"

    def __init__(self, folder: Path, identity: str) -> None:
        self._path = folder / self.FILE
        self._entries: dict[str, dict] = {}
        self.continued = False
        """Whether work of an earlier, interrupted run with the same identity was found."""
        lines = self._read()
        if lines and lines[0] == {"identity": identity}:
            self.continued = True
            self._entries = {entry["key"]: entry["info"] for entry in lines[1:]}
        self._rewrite(identity)

    @staticmethod
    def identity_in(folder: Path) -> str | None:
        """The identity of the work in a folder, or None if it has no readable ledger."""
        path = folder / Ledger.FILE
        if not path.exists():
            return None
        first = path.read_text().split("\n", 1)[0]
        try:
            return json.loads(first).get("identity")
        except (json.JSONDecodeError, AttributeError):
            return None

    def _read(self) -> list[dict]:
        if not self._path.exists():
            return []
        lines = []
        for line in self._path.read_text().split("\n"):
            try:
                lines.append(json.loads(line))
            except json.JSONDecodeError:
                break
        return lines

    def _rewrite(self, identity: str) -> None:
        lines = [canonical_json({"identity": identity})]
        lines += [canonical_json({"key": key, "info": info}) for key, info in self._entries.items()]
        with self._path.open("w") as file:
            file.write("\n".join(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())
        sync_folder(self._path.parent)

    def get(self, key: str) -> dict | None:
        """What was recorded of a finished piece, or None if it is not finished."""
        return self._entries.get(key)

    def keys(self) -> tuple[str, ...]:
        """Every finished piece, in the order they were finished."""
        return tuple(self._entries)

    def put(self, key: str, **info: object) -> None:
        """Record that a piece is finished; its files must be complete and durable before."""
        self._entries[key] = info
        with self._path.open("a") as file:
            file.write(canonical_json({"key": key, "info": info}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def delete(self) -> None:
        """The work is finished as a whole."""
        self._path.unlink(missing_ok=True)
