"""A volume through the service, with nothing but what `pip install .` brings: .ci/run calls this in an
environment made from a wheelhouse where there is no network."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from client import Client
from serving import png, volume

import server
import settings


def main() -> int:
    """Exit status 1 unless the job succeeds."""
    with (
        tempfile.TemporaryDirectory() as root,
        server.Service(settings.Config(storage_root=Path(root), port=0)) as service,
    ):
        client = Client(service.url)
        client.upload("v.zip", [volume({"1.png": png(), "2.png": png(shade=1)})])
        state = client.watch(client.submit("v.zip"))[0][-1]
        print(state.status, state.last_error or "", client.call("GET", "/").status)
    return 0 if state.status == "SUCCESS" and state.processed == 2 else 1


if __name__ == "__main__":
    sys.exit(main())
