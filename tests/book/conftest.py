"""Lets the tests import the book's tools and extensions, which are no package."""

import sys
from pathlib import Path

BOOK = Path(__file__).resolve().parents[2] / "book"
sys.path += [str(BOOK / "tools"), str(BOOK / "extensions")]
