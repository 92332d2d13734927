"""What preflight looks for: each check is a function that yields findings, in one list."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..base.names import Row
from ..base.words import counted
from ..batch.tokenizer_coverage import Coverage
from ..data.image_files import Leak
from ..data.ledger import Ledger, names_of
from ..data.look_alikes import LookAlikes
from ..model.freeze import NEW_ROWS, part_of
from ..rows.boxes import has_typed_boxes
from ..rows.messages import answers_of, row_key
from ..templates.literals import find_markers, role_markers
from .freeze_proof import Proof
from .memory import too_large

ERROR, WARNING, NOTE = "error", "warning", "note"
EXAMPLES = 3
# One answer to so large a share of at least so many rows is learnt without looking at the image.
MOST_COMMON, FEWEST_ROWS = 0.3, 20
MOST_REPEATED = 0.01  # share of rows that say and show what another row does


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that a person should know.

    Attributes:
        level: `error` where training will fail or teach nothing, `warning`, or `note`.
        sentence: What is wrong.
        mend: How to mend it.
        where: Ids of rows, or names of tensors: the first few.
    """

    level: str
    sentence: str
    mend: str = ""
    where: Sequence[str] = ()

    def __str__(self) -> str:
        """One line for the terminal."""
        where = f" ({', '.join(self.where)})" if self.where else ""
        return f"{self.level}: {self.sentence} {self.mend}".rstrip() + where


@dataclass
class Evidence:
    """What was found out; what was not looked at is None or empty.

    Attributes:
        ledgers: `train`, `eval` → the ledger.
        failed: Why no rows could be mixed, or None.
        rows: Training rows that were looked at, none twice.
        template: The chat template's source.
        ends_with: What the template puts after an answer.
        box_notation: How boxes are written.
        as_written: Sources whose typed boxes are meant to stay text.
        coverage: Language → how well the tokenizer knows it.
        leaks: Training images that are held-out ones.
        look_alikes: Training images that look like held-out ones.
        proof: What real steps showed.
        stopped: Why the real steps ended before their time, or None.
        memory: Bytes that are estimated for a device, and that it has; or None.
    """

    ledgers: dict[str, Ledger] = field(default_factory=dict)
    failed: str | None = None
    rows: list[Row] = field(default_factory=list)
    template: str = ""
    ends_with: str = ""
    box_notation: str = ""
    as_written: frozenset[str] = frozenset()
    coverage: dict[str, Coverage] = field(default_factory=dict)
    leaks: list[Leak] = field(default_factory=list)
    look_alikes: LookAlikes | None = None
    proof: Proof | None = None
    stopped: str | None = None
    memory: tuple[int, int] | None = None

    def answers(self) -> list[tuple[str, str]]:
        """(id of the row, text) of every answer that was looked at."""
        return [(row["id"], text) for row in self.rows for text in answers_of(row)]


def check(evidence: Evidence) -> list[Finding]:
    """Runs every check; errors come first."""
    found = [finding for each in CHECKS for finding in each(evidence)]
    return sorted(found, key=lambda finding: (ERROR, WARNING, NOTE).index(finding.level))


def rejected_rows(evidence: Evidence) -> Iterator[Finding]:
    """Rows that cannot be trained on: an error above `data.max_rejected`, below it a warning."""
    for name, ledger in evidence.ledgers.items():
        if (problem := ledger.problem()) is not None:
            yield Finding(ERROR, f"{name}: {problem}", "Mend the rows, or raise data.max_rejected to leave them out.")
        elif lost := sum(source.lost for source in ledger.sources.values()):
            yield Finding(WARNING, f"{name}: {counted(lost, 'row')} will be left out; the reasons stand below.")
    if evidence.failed and not any(ledger.problem() for ledger in evidence.ledgers.values()):
        yield Finding(ERROR, evidence.failed)


def shortened_rows(evidence: Evidence) -> Iterator[Finding]:
    """Rows that lose turns to fit `sft.max_length`."""
    for name, ledger in evidence.ledgers.items():
        if short := sum(source.truncated for source in ledger.sources.values()):
            turns = sum(source.turns_lost for source in ledger.sources.values())
            who = f"{name}: {counted(short, 'row')} {'loses' if short == 1 else 'lose'}"
            sentence = f"{who} {turns:,} turns to fit max_length."
            yield Finding(WARNING, sentence, "Raise sft.max_length if the memory allows it.")


def unused_keys(evidence: Evidence) -> Iterator[Finding]:
    """Keys of rows that mean nothing in their format, which nothing is trained on."""
    for name, ledger in evidence.ledgers.items():
        for source, of in ledger.sources.items():
            if of.unused:
                sentence = f'{name}: the source "{source}" has keys that are not used: {names_of(of.unused)}.'
                yield Finding(NOTE, sentence, "If one holds what is to be learnt, map it in `columns`.")


def boxes_taken(evidence: Evidence) -> Iterator[Finding]:
    """What the numbers of boxes were taken for, and boxes that stay text because nobody says what they count."""
    found: dict[str, Counter[str]] = {}
    typed: dict[str, list[str]] = {}
    for row in evidence.rows:
        parts = [part for message in row["messages"] for part in message["content"]]
        if scales := {part["scale"] for part in parts if part["type"] == "box"}:
            found.setdefault(row["source"], Counter()).update(scales)
        unsaid = not scales and row["images"] and row["source"] not in evidence.as_written
        if unsaid and any(part["type"] == "text" and has_typed_boxes(part["text"]) for part in parts):
            typed.setdefault(row["source"], []).append(row["id"])
    for source, counts in found.items():
        taken = " and ".join(f"{scale} in {counted(rows, 'row')}" for scale, rows in counts.items())
        written = f"they are written in the notation {evidence.box_notation}"
        yield Finding(NOTE, f'The numbers of boxes in the source "{source}" are taken for {taken}; {written}.')
    mend = "Set the source's `boxes` to what their numbers count, or to as_written if the text is right for the model."
    for source, rows in typed.items():
        who = f'{counted(len(rows), "row")} of the source "{source}" {"holds" if len(rows) == 1 else "hold"}'
        yield Finding(WARNING, f"{who} boxes typed in text, which stay text.", mend, rows[:EXAMPLES])


def foreign_markers(evidence: Evidence) -> Iterator[Finding]:
    """Answers that hold the role markers of a chat template: a conversation that was not split into its turns."""
    answers = evidence.answers()
    for marker, rows in find_markers(answers, role_markers(evidence.template)).items() if answers else ():
        sentence = f"{_hold(rows, 'answer')} the role marker {marker!r}, which the model would learn to say."
        yield Finding(WARNING, sentence, "Split the conversation into turns, or remove the marker.", rows[:EXAMPLES])


def early_ends(evidence: Evidence) -> Iterator[Finding]:
    """Answers that hold what ends an answer."""
    end = evidence.ends_with
    if rows := [name for name, text in evidence.answers() if end and end in text.strip()]:
        sentence = f"{_hold(rows, 'answer')} {end!r}, where generation stops with this chat template."
        yield Finding(WARNING, sentence, "Use another template, or take it out of the answers.", rows[:EXAMPLES])


def hollow_answers(evidence: Evidence) -> Iterator[Finding]:
    """Answers without a letter or a digit."""
    if rows := [name for name, text in evidence.answers() if not re.search(r"[^\W_]", text)]:
        sentence = f"{counted(len(rows), 'answer')} {'has' if len(rows) == 1 else 'have'} no letter and no digit."
        yield Finding(WARNING, sentence, "Remove the rows.", rows[:EXAMPLES])


def common_answers(evidence: Evidence) -> Iterator[Finding]:
    """One answer for all, or for many."""
    answers = Counter(text for _, text in evidence.answers())
    total = answers.total()
    if total < FEWEST_ROWS:
        return
    text, count = answers.most_common(1)[0]
    shown = text if len(text) <= 60 else f"{text[:59]}…"
    if count == total:
        sentence = f"All {total:,} answers that were looked at are the same: {shown!r}."
        yield Finding(ERROR, sentence, "There is nothing to learn; is the right column mapped in `columns`?")
    elif count > MOST_COMMON * total:
        sentence = f"{count / total:.0%} of the answers are the same: {shown!r}."
        yield Finding(WARNING, sentence, "The model learns to say it without looking; balance the rows.")


def repeated_rows(evidence: Evidence) -> Iterator[Finding]:
    """Rows that are the same, word for word and image for image, beside the repeats that the recipe asks for."""
    again = len(evidence.rows) - len({row_key(row) for row in evidence.rows})
    if again > MOST_REPEATED * max(len(evidence.rows), 1):
        do = "says and shows" if again == 1 else "say and show"
        sentence = f"{counted(again, 'row')} of {len(evidence.rows):,} {do} what another one does."
        yield Finding(WARNING, sentence, "Remove them, or ask for them with the source's `repeat`.")


def leaked_images(evidence: Evidence) -> Iterator[Finding]:
    """Training images that are held out for evaluation as well."""
    if leaks := evidence.leaks:
        are = f"{counted(len(leaks), 'training image')} {'is' if len(leaks) == 1 else 'are'}"
        sentence = f"{are} among the evaluation images, byte for byte."
        where = [f"{leak.train} = {leak.held_out}" for leak in leaks[:EXAMPLES]]
        yield Finding(WARNING, sentence, "Evaluation would look better than it is: take them out of one.", where)


def look_alike_images(evidence: Evidence) -> Iterator[Finding]:
    """Training images that look like held-out ones: copies that were resized, saved anew, cut or mirrored."""
    if (found := evidence.look_alikes) is None or not (pairs := found.pairs):
        return
    ours, theirs = len(pairs), found.held_out_found
    sentence = (
        f"{counted(ours, 'training image')} ({ours / found.train.looked_at:.1%}) "
        f"{'looks' if ours == 1 else 'look'} like {counted(theirs, 'held-out image')} "
        f"({theirs / found.held_out.looked_at:.1%}) with other bytes."
    )
    mend = "Look at the pairs below; evaluation would look better than it is: take copies out of one."
    yield Finding(WARNING, sentence, mend, list(map(str, pairs[:EXAMPLES])))


def poor_coverage(evidence: Evidence) -> Iterator[Finding]:
    """Languages that the tokenizer hardly knows."""
    for language, found in evidence.coverage.items():
        if problems := found.problems():
            sentence = f"The tokenizer hardly knows the answers in {language!r}: {'; '.join(problems)}."
            yield Finding(WARNING, sentence, "Take a language model with a vocabulary for it, or more max_length.")


def unproven_tensors(evidence: Evidence) -> Iterator[Finding]:
    """Trained tensors that did not move, frozen ones that did, a loss that is no number."""
    if evidence.stopped:
        yield Finding(ERROR, f"The first training step failed: {evidence.stopped}")
    if (proof := evidence.proof) is None:
        return
    if not proof.finite:
        yield Finding(ERROR, f"The loss is not a number: {proof.losses}.", "Lower the rate, or use bf16 for fp16.")
    if proof.still:
        who, why = f"{counted(len(proof.still), 'tensor')} that should learn", next(iter(proof.still.values()))
        sentence = f"{who} did not move in {proof.steps} steps: {why}."
        yield Finding(ERROR, sentence, "", list(proof.still)[:EXAMPLES])
    if proof.changed:
        sentence = f"{counted(len(proof.changed), 'tensor')} that should be frozen changed."
        yield Finding(ERROR, sentence, "This is a mistake of vlm_sft or of a callback.", proof.changed[:EXAMPLES])
    idle = {part_of(name) for name in proof.unused} - {part_of(name) for name in proof.moved}
    if proof.unused:
        level = ERROR if idle else NOTE
        are = "is" if len(proof.unused) == 1 else "are"
        sentence = f"{counted(len(proof.unused), 'tensor')} of trained parts {are} not used."
        hint = "Nothing flows through what lies behind `feature_layer`."
        if any(NEW_ROWS in name for name in proof.unused):
            hint = "No row that was tried has the new words of `lora.add_tokens`."
        yield Finding(level, sentence, hint, proof.unused[:EXAMPLES])


def tight_memory(evidence: Evidence) -> Iterator[Finding]:
    """More memory than the device has, or almost."""
    if evidence.memory is None:
        return
    needs, has = evidence.memory
    if sentence := too_large(needs, has):
        mend = "Lower per_device_train_batch_size, use activation_checkpointing, or quantise; see docs/memory.md."
        yield Finding(ERROR if needs > has else WARNING, sentence, mend)


CHECKS = (
    rejected_rows, shortened_rows, unused_keys, boxes_taken, foreign_markers, early_ends, hollow_answers,
    common_answers, repeated_rows, leaked_images, look_alike_images, poor_coverage, unproven_tensors, tight_memory,
)  # fmt: skip


def _hold(rows: Sequence[str], noun: str) -> str:
    """`1 row holds`, `2 rows hold`."""
    return f"{counted(len(rows), noun)} {'holds' if len(rows) == 1 else 'hold'}"
