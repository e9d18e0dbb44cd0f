"""Every claim of the two sources with its verdict, from the stored results.

`python data/results/claims.py` writes `data/claims.json`. Numbers and verdicts come
from rules on stored results, so a result that changes changes them. The README's
table is made of that file by `python data/results/make.py readme`.
"""

import collections
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
# So that this file can also be loaded from elsewhere.
sys.path.append(str(Path(__file__).resolve().parent))

# The rules enter themselves when they are imported.
import claims_paper  # noqa: F401
import claims_tutorial  # noqa: F401
from ledger import CLAIMS, Stored, entries

from lib.artifacts import write_json

if __name__ == "__main__":
    found = entries(Stored())
    write_json(CLAIMS, found)
    for one in found:
        print(f"{one['id']:4}{one['verdict']:20}{one['finding']}")
    print(dict(collections.Counter(one["verdict"] for one in found)))
