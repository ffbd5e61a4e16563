"""The table that ends every experiment: what the paper claims, what was measured here, and the verdict.

A verdict is prose, but it rests on a condition that is computed live. If the condition fails, the chapter fails: no
page can show a verdict that its own numbers no longer support.
"""

from lowrank_ref.lab.draw.table import Table

__all__ = ["VERDICTS", "Claims"]

VERDICTS = ("holds", "holds in part", "not at this scale", "not confirmed")


class Claims:
    """The claims of one paper.

    Args:
        paper: the paper's key in the registry, for example "galore".

    Example:
        >>> claims = Claims("lora")
        >>> claims.add("r = 4 is enough", where="Table 6", measured="0.95 of 0.97", verdict="holds", holds=0.95 > 0.93)
        >>> claims
        claim            where    measured here  verdict
        ---------------  -------  -------------  -------
        r = 4 is enough  Table 6  0.95 of 0.97   holds
    """

    def __init__(self, paper: str):
        if not paper:
            raise ValueError("paper: got an empty key, wanted the paper's key in the registry")
        self.paper = paper
        self.rows: list[dict[str, str]] = []

    def add(self, claim: str, *, where: str, measured: str, verdict: str, holds: object) -> None:
        """Add a claim with its verdict.

        Args:
            claim: what the paper says, in one sentence.
            where: its place there: table, figure, equation or page.
            measured: what came out here, rounded to what the seeds support.
            verdict: "holds", "holds in part", "not at this scale" or "not confirmed".
            holds: the computed condition on which the verdict rests, whatever the verdict is. For "not confirmed" it
                is the condition that shows the failure.

        Raises:
            ValueError: another verdict, or an empty text.
            TypeError: `holds` is not a single truth value.
            AssertionError: `holds` is False: the numbers no longer support the written verdict.
        """
        if verdict not in VERDICTS:
            raise ValueError(f"verdict: got {verdict!r}, wanted one of {', '.join(VERDICTS)}")
        for name, text in (("claim", claim), ("where", where), ("measured", measured)):
            if not text.strip():
                raise ValueError(f"{name}: got an empty text, wanted words")
        if str(holds) not in ("True", "False", "tensor(True)", "tensor(False)"):
            raise TypeError(f"holds: got {holds!r}, wanted True or False")
        if not holds:
            raise AssertionError(f"the verdict {verdict!r} no longer follows from the numbers: {claim} ({measured})")
        self.rows.append({"claim": claim, "where": where, "measured here": measured, "verdict": verdict})

    def _table(self) -> Table:
        return Table(
            ["claim", "where", "measured here", "verdict"],
            [list(row.values()) for row in self.rows],
            numbers=False,
            css="lr-table claims",
            attributes={"data-paper": self.paper},
            row_attributes=[{"data-verdict": row["verdict"]} for row in self.rows],
        )

    def _repr_html_(self) -> str:
        return self._table()._repr_html_()

    def __repr__(self) -> str:
        return str(self._table())
