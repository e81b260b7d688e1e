"""What a report says about the kernels of others: which ran at what version, and why not."""

from __future__ import annotations

from typing import Any

from .rows import Content, Row


def is_peer(variants: dict[str, dict[str, Any]], key: str) -> bool:
    return bool(variants.get(key, {}).get("peer"))


def lines(content: Content) -> list[str]:
    """One for each peer, in the order of the tables; none in a report from before there were
    peers, nor from a CPU."""
    groups = [(content["variants"], content["rows"])]
    if "mixed" in content:
        groups.append((content["mixed"]["variants"], content["mixed"]["rows"]))
    return [
        _line(variants[key], key, rows)
        for variants, rows in groups
        for key in variants
        if is_peer(variants, key) and rows
    ]


def _line(variant: dict[str, Any], key: str, rows: list[Row]) -> str:
    measured = sum(key in row["variants"] for row in rows)
    reasons: dict[str, int] = {}
    for row in rows:
        if key in row["missing"]:
            reason = row["missing"][key]
            reasons[reason] = reasons.get(reason, 0) + 1
    told = f"{variant['label']} ({variant['version']}): measured in {measured} of {len(rows)} rows"
    why = [f"{count} x {reason}" for reason, count in reasons.items()]
    return "; ".join([told, *why])
