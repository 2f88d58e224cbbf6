"""Submits orders: ``python -m examples.worker.submit 20``."""

import os
import random
import sys
from pathlib import Path

from examples.worker.spool import Spool


def submit(spool: Spool, number: int) -> list[str]:
    """Submit some orders: every fifth is express, and a supplier fails now and then; return their ids."""
    return [
        spool.submit(
            {
                "price": round(random.uniform(1.0, 100.0), 2),
                "seconds": round(random.uniform(0.05, 0.5), 3),
                "failures": random.choice([0, 0, 0, 0, 0, 0, 1, 1, 2, 3]),
                "express": n % 5 == 0,
            }
        )
        for n in range(number)
    ]


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    submit(Spool(Path(os.environ.get("WORKER_SPOOL", "spool"))), count)
