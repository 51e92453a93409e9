"""What least-loaded balancing moves, counted exactly: the rows of every rank, chunk and place.

    python benchmarks/balance.py

The routers are those of FEMP's table 8 (arXiv 2609.14306, appendix B.2): 8 ranks with 65,536 tokens
each, 128 experts, top-8, in 10 chunks. Of each rank's tokens the first share goes to the first so
many experts (95% / 16, 80% / 16, 50% / 4), and the others to the rest in turn. Nothing is computed
but the plan and where it sends each row: with the operators that a layer runs.

A *send ratio* is, of one rank and chunk, the most rows that go to one rank over their mean; the
worst is shown, next to the published one of LLEP's plan. The exit status is 1 where one is above
it, where a balanced router moves anything, or where a rank has over the cap.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moptrace import Balance
from moptrace.kernels.balancing import count_pairs, plan_balance, spread_pairs
from moptrace.kernels.chunks import split_contiguous, split_strided
from report import publish

RANKS, EXPERTS, CHOICES, CHUNKS = 8, 128, 8, 10
WEIGHTS = 3 * 7168 * 2048 * 2  # bytes of an expert: three matrices in bfloat16


@dataclass(frozen=True)
class Profile:
    """A share of the tokens goes to the first ``hot`` experts; the published send ratios."""

    name: str
    share: float = 0.0
    hot: int = 0
    strided: float | None = None
    contiguous: float | None = None

    def choices(self, tokens: int) -> Tensor:
        """The experts of one rank's tokens [N, k], which are those of every rank."""
        token, choice = torch.arange(tokens)[:, None], torch.arange(CHOICES)
        cold = self.hot + (token + choice) % (EXPERTS - self.hot)
        is_hot = token < int(self.share * tokens)
        return torch.where(is_hot, choice % max(self.hot, 1), cold)


PROFILES = (
    Profile("balanced", strided=1.00, contiguous=1.02),
    Profile("95% / 16", 0.95, 16, 1.35, 2.63),
    Profile("80% / 16", 0.80, 16, 2.40, 4.00),
    Profile("50% / 4", 0.50, 4, 2.29, 6.00),
    Profile("30% / 16", 0.30, 16),
)


@dataclass(frozen=True)
class Found:
    """The rows of each rank before and after, and of each source, chunk and destination."""

    before: Tensor  # [P]
    after: Tensor  # [P]
    lent: int  # experts, once for each rank where they are guests
    most_guests: int
    moved: float  # share of the rows
    strided: float
    contiguous: float
    seconds: float


def found(profile: Profile, tokens: int, balance: Balance) -> Found:
    sizes = (EXPERTS // RANKS,) * RANKS
    experts, places = profile.choices(tokens), balance.places(sizes)
    counts = count_pairs(experts, EXPERTS)
    table = counts.expand(RANKS, EXPERTS).contiguous()
    limits = balance.threshold, balance.cap, balance.rows
    begin = time.perf_counter()
    shares, hosts = plan_balance(table, sizes, places, *limits)
    seconds = time.perf_counter() - begin
    ranks_of = [spread_pairs(experts, own, hosts, EXPERTS) // places for own in shares]
    guests = hosts.view(RANKS, places)[:, sizes[0] :]
    after = shares.sum(0).view(RANKS, places)
    return Found(
        table.sum(0).view(RANKS, -1).sum(1),
        after.sum(1),
        int((guests >= 0).sum()),
        int((guests >= 0).sum(1).max()),
        float(after[:, sizes[0] :].sum() / after.sum()),
        max(send_ratio(split_strided(own, CHUNKS)) for own in ranks_of),
        max(send_ratio(split_contiguous(own, CHUNKS)) for own in ranks_of),
        seconds,
    )


def send_ratio(chunks: Sequence[Tensor]) -> float:
    """The most rows of a chunk that go to one rank, over the mean."""
    loads = torch.stack([ranks.flatten().bincount(minlength=RANKS) for ranks in chunks])
    return float((loads.max(1).values * RANKS / loads.sum(1)).max())


def over_mean(loads: Tensor) -> float:
    return float(loads.max() * len(loads) / loads.sum())


def failures_of(profile: Profile, it: Found, balance: Balance) -> list[str]:
    said: list[str] = []
    for order, published in (("strided", profile.strided), ("contiguous", profile.contiguous)):
        ratio = getattr(it, order)
        if published is not None and round(ratio, 2) > published:
            said.append(f"{profile.name}, {order}: {ratio:.2f}, published {published:.2f}")
    if it.lent and over_mean(it.before) <= balance.threshold:
        said.append(f"{profile.name}: {it.lent} experts move below the threshold")
    if over_mean(it.before) > balance.threshold and over_mean(it.after) > balance.cap + 1e-3:
        said.append(f"{profile.name}: a rank has {over_mean(it.after):.3f} of the mean")
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_536, help="of each rank")
    given: Any = parser.parse_args()
    balance = Balance()
    shown = Table(
        title=f"{RANKS} ranks of {given.tokens:,} tokens, {EXPERTS} experts, top-{CHOICES}, "
        f"{CHUNKS} chunks"
    )
    shown.add_column("router")
    for column in (
        "max/mean rows", "balanced", "rows that move", "experts lent", "most guests",
        "most MiB to a rank", "strided", "published", "contiguous", "published ", "plan ms",
    ):  # fmt: skip
        shown.add_column(column, justify="right")
    failures: list[str] = []
    for profile in PROFILES:
        it = found(profile, given.tokens, balance)
        failures += failures_of(profile, it, balance)
        published = [f"{x:.2f}" if x else "" for x in (profile.strided, profile.contiguous)]
        shown.add_row(
            profile.name,
            f"{over_mean(it.before):.3f}",
            f"{over_mean(it.after):.3f}",
            f"{it.moved:.1%}",
            str(it.lent),
            str(it.most_guests),
            f"{it.most_guests * WEIGHTS / 2**20:,.0f}",
            f"{it.strided:.2f}",
            published[0],
            f"{it.contiguous:.2f}",
            published[1],
            f"{it.seconds * 1e3:.1f}",
        )
    facts = [
        f"plan: {balance}",
        "every rank has the same tokens; max/mean are of the rows that a layer computes",
        f"an expert is {WEIGHTS / 2**20:,.0f} MiB: three matrices of 7,168 by 2,048 in bfloat16",
        "published: send ratios of LLEP's plan in strided and contiguous chunks (FEMP, table 8)",
    ]
    title = "Balancing by lent experts"
    publish(Console(width=160), "balance", title, facts, [shown], failures)


if __name__ == "__main__":
    main()
