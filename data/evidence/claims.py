"""The ledger of claims: every claim of the sources with its verdict, as a file.

Numbers and verdicts come from rules on stored results. A result that changes changes them.
"""

import collections

# The rules enter themselves in the ledger when these are imported.
from data.evidence import (
    claims_field,  # noqa: F401
    claims_paper,  # noqa: F401
    claims_tutorial,  # noqa: F401
)
from data.evidence.ledger import CLAIMS, Stored, entries
from lib.files import write_json


def write_claims() -> None:
    """Write `data/claims.json` and print it in short."""
    claims = entries(Stored())
    write_json(CLAIMS, claims)
    for claim in claims:
        print(f"{claim['id']:4}{claim['verdict']:14}{claim['headline']}")
    print(dict(collections.Counter(claim["verdict"] for claim in claims)))
