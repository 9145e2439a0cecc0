"""The embedded user, its replies late: `python benchmarks/slow_user.py SECONDS` serves until stdin closes."""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import simulator  # noqa: E402


def main(seconds: float) -> None:
    """Serve on a free port; requests wait side by side, as they do in front of a server that batches them."""

    def answer_late(raw: bytes) -> dict:
        time.sleep(seconds)
        return simulator.complete(raw)

    simulator.main(["--port", "0", "--until-stdin-closes"], answer_late)


if __name__ == "__main__":
    main(float(sys.argv[1]))
