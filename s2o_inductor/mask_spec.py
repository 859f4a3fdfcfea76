"""What an attention mask means, without the mask: a conjunction of terms over (batch, query, key).

A `MaskSpec` is what mask lifting produces, what the ops carry as one string, and what the kernels
run. It holds no tensor. Its expressions are text in a small integer language, so that a spec can be
an operator argument, a cache key and a line of a report at once:

    names       b (batch), q (query position), k (key position), p0, p1, ... (integer parameters:
                sizes and offsets, which may be symbolic), L0[i, ...] (an entry of a leaf tensor)
    operators   + - * // % comparison & | ~ min(a, b) max(a, b) abs(a)

A position is visible when every term that is present holds.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from typing import Literal

EmptyRows = Literal["zero", "mean", "shifted", "nan"]


@dataclasses.dataclass(frozen=True)
class MaskSpec:
    """A visible position (b, q, k) satisfies all terms given; `None` means no restriction.

    Attributes:
        lower: ``k - q >= lower``, an integer expression over parameters only.
        upper: ``k - q <= upper``, likewise. Causal attention is ``upper = "0"``; a causal sliding
            window of w keys is ``lower = "1 - w"`` with ``upper = "0"``.
        keys: boolean expression over (b, k), such as key padding ``"L0[b, k]"``.
        rows: boolean expression over (b, q).
        equal: ``(over (b, q), over (b, k))``, equal where visible: packed documents, chunks.
        at_most: ``(over (b, q), over (b, k))``; the key's value is at most the query's: prefixes,
            cache positions, packed position ids.
        dense: a boolean or additive mask tensor is applied as well (a mask that is not lifted).
        empty: result of a row that sees no key. "zero" is what scaled_dot_product_attention
            defines. "mean", the mean of all values, is what softmax gives when every score was
            replaced by one huge negative number, and "shifted" the same when that number was added
            to every score: equal in value, but gradients still reach q and k. "nan" is what softmax
            gives when every score is -inf.
    """

    lower: str | None = None
    upper: str | None = None
    keys: str | None = None
    rows: str | None = None
    equal: tuple[str, str] | None = None
    at_most: tuple[str, str] | None = None
    dense: bool = False
    empty: EmptyRows = "zero"

    def text(self) -> str:
        """The spec as a canonical string: fields at their default are left out."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        return json.dumps(fields, sort_keys=True, separators=(",", ":"))

    @property
    def is_band(self) -> bool:
        """Whether the visible keys of a row follow from its position alone (no tensor is read)."""
        return not (self.keys or self.rows or self.equal or self.at_most or self.dense)

    @property
    def is_full(self) -> bool:
        """Whether everything is visible."""
        return self.is_band and self.lower is None and self.upper is None

    def terms(self) -> list[str]:
        """Readable names of the terms, for reports."""
        names = []
        if self.upper is not None:
            names.append("causal" if self.upper == "0" else f"k - q <= {self.upper}")
        if self.lower is not None:
            names.append(f"window(k - q >= {self.lower})")
        if self.keys is not None:
            names.append(f"keys({self.keys})")
        if self.rows is not None:
            names.append(f"rows({self.rows})")
        if self.equal is not None:
            names.append(f"segments({self.equal[0]} == {self.equal[1]})")
        if self.at_most is not None:
            names.append(f"at_most({self.at_most[1]} <= {self.at_most[0]})")
        if self.dense:
            names.append("dense")
        return names


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> MaskSpec:
    """The spec that `MaskSpec.text` wrote.

    Raises:
        ValueError: the text is not such a spec.
    """
    try:
        fields = json.loads(text) if text else {}
        for pair in ("equal", "at_most"):
            if pair in fields:
                query_side, key_side = fields[pair]
                fields[pair] = (query_side, key_side)
        return MaskSpec(**fields)
    except (TypeError, ValueError) as error:
        raise ValueError(f"not a mask spec: {text!r} ({error}); write it with MaskSpec.text()") from error
