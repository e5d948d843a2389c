"""python run.py experiment=NAME [group=choice] [key=value]: compose, check, run one task."""

from __future__ import annotations

import sys

from tasks.launch import launch

if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
