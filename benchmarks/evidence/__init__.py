"""`make evidence`: loss against bytes, for every method, on real data, over real ranks.

Read in this order: ``runs.py`` (what a run is, where its result is kept), ``methods.py`` (the table
of methods), ``plan.py`` (which runs), ``train.py`` (one run), ``page.py`` (docs/results.md).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
DOCS = ROOT / "docs"

# The language model and its text are the example's: text.py, transformer.py.
sys.path.append(str(ROOT / "examples"))
