"""The embedded user, its replies late: `python -m benchmarks.slow_user SECONDS` serves until stdin closes."""

import sys
import time

import simulator


def main(seconds: float) -> None:
    """Serve on a free port; requests wait side by side, as they do in front of a server that batches them."""

    def answer_late(raw: bytes) -> dict:
        time.sleep(seconds)
        return simulator.complete(raw)

    simulator.main(["--port", "0", "--until-stdin-closes"], answer_late)


if __name__ == "__main__":
    main(float(sys.argv[1]))
