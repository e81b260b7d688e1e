"""What the rows of a results.json say, and numbers as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .cases import MODES, Setting

Content = dict[str, Any]
Row = dict[str, Any]

# A heading, and lines of cells.
Table = tuple[list[str], list[list[str]]]


def setting_of(row: Row) -> Setting:
    return Setting(**row["setting"])


def median(row: Row, key: str) -> float | None:
    """Seconds, or None where the variant has no number."""
    found = row["variants"].get(key)
    return None if found is None else found["median_s"]


def ratio(row: Row, key: str, to: str) -> float | None:
    ours, theirs = median(row, key), median(row, to)
    return None if ours is None or theirs is None else ours / theirs


def label(content: Content, key: str) -> str:
    """What the report calls a variant, also one that this run did not measure."""
    found = content["variants"].get(key)
    return key if found is None else found["label"]


def rates(content: Content, row: Row, key: str) -> dict[str, float] | None:
    """tokens/s, TFLOP/s, GB/s and the share of the roofline, from :meth:`Setting.work`."""
    seconds = median(row, key)
    if seconds is None:
        return None
    setting, work = setting_of(row), row["work"][content["variants"][key]["work"]]
    roof = content["roofline"]
    least = max(
        work["flop"] / roof["gemm_flop_per_s"][setting.dtype],
        work["bytes"] / roof["copy_bytes_per_s"],
    )
    return {
        "tokens": setting.m / seconds,
        "tflops": work["flop"] / seconds / 1e12,
        "gbps": work["bytes"] / seconds / 1e9,
        "share": least / seconds,
    }


def plans(row: Row, key: str = "fused") -> str:
    """ "cpu: native, packed" or "cpu: vendor", or operator by operator where they differ."""
    answered = {
        op.removeprefix("lora_linear_"): plan for op, plan in row["plans"].get(key, {}).items()
    }
    if not answered:
        return "-"
    packed = ", packed" if row.get("packed_copies", {}).get(key) else ""
    if len(set(answered.values())) == 1:
        return f"{row['backend']}: {next(iter(answered.values()))}{packed}"
    each = ", ".join(f"{op} {plan}" for op, plan in answered.items())
    return f"{row['backend']}: {each}{packed}"


def groups(content: Content) -> dict[str, list[Row]]:
    """{title: rows} of the same dtype, dropout and mode."""
    found: dict[str, list[Row]] = {}
    for row in content["rows"]:
        setting = setting_of(row)
        title = f"{setting.dtype}, {MODES[setting.mode]}, dropout {setting.p:g}"
        found.setdefault(title, []).append(row)
    return found


def by_shape(rows: Sequence[Row]) -> dict[str, dict[int, Row]]:
    """{shape: {rank: row}} of one group."""
    found: dict[str, dict[int, Row]] = {}
    for row in rows:
        setting = setting_of(row)
        found.setdefault(setting.shape, {})[setting.r] = row
    return found


def ranks_of(rows: Sequence[Row]) -> list[int]:
    return sorted({row["setting"]["r"] for row in rows})


def is_grid(rows: Sequence[Row]) -> bool:
    """Whether most shapes of a group were measured at most of its ranks, several of them."""
    ranks = len(ranks_of(rows))
    return ranks > 1 and 2 * len(rows) > len(by_shape(rows)) * ranks


def number(value: float | None) -> str:
    """Three significant digits, without an exponent."""
    if value is None:
        return "-"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * 1e3)


def quotient(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
