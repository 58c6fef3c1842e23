"""What spec/check.py runs: the models, and a mutant for each row of the table of "Proof" in the design."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["MODELS", "MUTANTS", "ROWS", "Model", "Mutant"]

# What is wrong, and the words of the verifier that say so: a mutant caught by something else is not understood.
STALL: Final = "invalid end state"
WRONG: Final = "!(cares)||(mem=="
TWICE: Final = "copies<=1"
HIDDEN: Final = "!((must&"


@dataclass(frozen=True)
class Model:
    """A configuration of a .pml file in which nothing bad may be found."""

    file: str
    name: str
    defines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mutant:
    """A rule taken out of a model, and what must be found then.

    Attributes
    ----------
    row : int or None
        Its row of the design's table, from 1; None for the rules that the table does not name.
    macro : str
        ``MUTANT_`` and this name takes the rule out.
    file, defines
        As in `Model`.
    taken_out, happens : str
        For people.
    found : str
        What the verifier says.
    """

    row: int | None
    macro: str
    file: str
    taken_out: str
    happens: str
    found: str
    defines: tuple[str, ...] = ()


# The first column of the design's table.
ROWS: Final = (
    "the hinted plane",
    "hint epochs (S4)",
    "recovery reload (S9)",
    'claims, with "just resend and ignore EEXIST"',
    "check at commit (D3, D5)",
    "armed-or-held (S3)",
    "mark after a VMM's own write (S12)",
    "round barrier (W5), two streams",
    "switch barrier (W5)",
    "`released` for ever (D3)",
    "wake when a copy is dropped (D3, D10)",
    "`again` (S7, D8)",
    "settled bitmap only after the acknowledged switch (S9)",
    "fetch, re-arm, publish (S2) with the ring",
    "epoch after re-arm (S4)",
    "side plane of `mark` (S12)",
    "lists after quiet senders (S8)",
    "`zero` only where nothing was stored (D0)",
    "COMPLETE (D16)",
)

MODELS: Final = (
    Model("source", "one-step dirty log", ("LOG_ONE_STEP",)),
    Model("source", "two-step dirty log", ("LOG_TWO_STEP",)),
    Model("source", "lazy dirty log, held promise", ("LOG_LAZY",)),
    Model("rounds", "two streams"),
    Model("destination", "strict peer, two discards", ("DISCARDS=2", "FAILS=0")),
    Model("destination", "strict peer, three touches", ("TOUCHES=3",)),
    Model("destination", "tolerant peer, resending source", ("TOLERANT", "TOUCHES=3", "FAILS=0")),
    Model("switch", "to COMPLETE"),
    Model("recovery", "one loss of the link"),
    Model("summary", "two writers, a cleaner, a scan"),
    Model("summary", "one writer, two cleaners, a scan", ("WRITERS=1", "CLEANERS=2")),
)

MUTANTS: Final = (
    Mutant(1, "HINTED_PLANE", "switch", ROWS[0], "stall", STALL),
    Mutant(2, "EPOCHS", "source", ROWS[1], "stale content", "!(cares)", ("WRITES=1", "DMAS=0")),
    Mutant(3, "RELOAD", "recovery", ROWS[2], "stall", STALL),
    Mutant(4, "CLAIMS", "destination", ROWS[3], "old data over zeros", WRONG, ("TOLERANT",)),
    Mutant(5, "CHECK_EARLY", "destination", ROWS[4], "old data over zeros", WRONG),
    Mutant(6, "PROMISE", "source", ROWS[5], "lost write", "!(cares)", ("LOG_LAZY", "ROUNDS=1")),
    Mutant(7, "MARK", "source", ROWS[6], "stale content", "dmem==smem", ("ROUNDS=1",)),
    Mutant(8, "ROUND_BARRIER", "rounds", ROWS[7], "stale content", "dmem==smem"),
    Mutant(9, "SWITCH_BARRIER", "rounds", ROWS[8], "stale content", "dmem==smem"),
    Mutant(10, "FILL_CLEARS", "destination", ROWS[9], "old data returns", WRONG),
    Mutant(11, "WAKE_DROPPED", "destination", ROWS[10], "stall", STALL),
    Mutant(12, "AGAIN", "destination", ROWS[11], "stall", STALL),
    Mutant(13, "SETTLED_EARLY", "recovery", ROWS[12], "stale content", "dmem==smem"),
    Mutant(14, "PUBLISH_FIRST", "source", ROWS[13], "lost write", "dmem==smem", ("LOG_TWO_STEP", "ROUNDS=1")),
    Mutant(15, "EPOCH_EARLY", "source", ROWS[14], "lost write", "!(cares)", ("LOG_TWO_STEP", "ROUNDS=1", "DMAS=0")),
    Mutant(16, "SIDE_PLANE", "source", ROWS[15], "lost write", "!(cares)", ("ROUNDS=1",)),
    Mutant(17, "QUIET", "switch", ROWS[16], "stale content", WRONG),
    Mutant(18, "ZERO_PLANE", "rounds", ROWS[17], "stale content", "dmem==smem"),
    Mutant(19, "COMPLETE", "switch", ROWS[18], "zeros", "smem==0"),
    # Rules that the table does not name.
    Mutant(None, "READ_FIRST", "source", "clear, then read (S1)", "lost write", "dmem==smem", ("ROUNDS=1",)),
    Mutant(
        None,
        "TAKER_CLEARS",
        "source",
        "takers leave `hinted` alone (S3)",
        "nobody sends the page",
        "assertion violated dmem",
        ("ROUNDS=1",),
    ),
    Mutant(
        None,
        "CLEAR_UNSEEN",
        "source",
        "CLEAR what was seen, once (S11)",
        "lost write",
        "dmem==smem",
        ("LOG_LAZY", "ROUNDS=1"),
    ),
    Mutant(None, "SETTLE_OWED", "switch", "what is owed is not free (S8)", "content and fill for one request", TWICE),
    Mutant(None, "FILL", "switch", "owed where the peer cannot fill (S6, S8)", "zeros for poison", WRONG),
    Mutant(
        None, "RESOLVE_APART", "switch", "an answer looks and clears in one step (S7)", "the page comes twice", TWICE
    ),
    Mutant(None, "STRICT_AGAIN", "switch", "`again` is no duplicate (S7)", "a strict peer fails", TWICE, ("FAILS=0",)),
    Mutant(
        None, "RECEIVED_EARLY", "destination", "received after the kernel accepted (D8)", "the page is lost", "present"
    ),
    Mutant(
        None, "OLD_FRAMES", "recovery", "frames of an older generation are refused (W6)", "stale content", "dmem==smem"
    ),
    Mutant(None, "RUN_QUEUED", "recovery", "a denied RUN is never executed (S9)", "two guests run", "source_runs&&"),
    Mutant(None, "RUN_TWICE", "recovery", "RUN handed over is for good (S9)", "two guests run", "source_runs&&"),
    Mutant(None, "PLACERS", "recovery", "placers quiet before the report (S9)", "the page comes twice", "!(claimed)"),
    Mutant(None, "REASK", "recovery", "what is still requested is asked again (D9)", "stall", STALL),
    Mutant(None, "OWE_HINTED", "recovery", "hinted pages are owed, too (S9)", "lost write", "dmem==smem"),
    Mutant(
        None,
        "BACK_UNACKNOWLEDGED",
        "recovery",
        "back to precopy is acknowledged (S9)",
        "placed as one of the old switch",
        "!(claimed)",
    ),
    Mutant(None, "WRITER_FENCE", "summary", "the writer's fence between bit and mark", "a hidden bit", HIDDEN),
    Mutant(None, "CLEANER_FENCE", "summary", "the cleaner's fence between marks and lines", "a hidden bit", HIDDEN),
    Mutant(None, "MARKS_FIRST", "summary", "marks are looked at after the bit is set", "a hidden bit", HIDDEN),
    Mutant(None, "TAKE_FIRST", "summary", "marks are taken before the lines", "a hidden bit", HIDDEN),
    Mutant(None, "RECHECK", "summary", "a scan looks at the generation again", "a hidden bit", HIDDEN),
    Mutant(None, "ODD", "summary", "the generation is odd while marks are taken", "a hidden bit", HIDDEN),
    Mutant(
        None, "ONE_CLEANER", "summary", "one cleaner at a time", "a hidden bit", HIDDEN, ("WRITERS=1", "CLEANERS=2")
    ),
    Mutant(None, "ONLY_NEW", "summary", "a bit that another writer set is marked, too", "a hidden bit", HIDDEN),
)
