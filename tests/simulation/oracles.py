"""
What must be true of every history, however bad the weather was.

Each oracle is a function of the history and of what was found on the disks at the end, and returns what is wrong as
sentences. What the documents exempt is exempted here, as narrowly as can be, and nothing else is.

A result is followed by its id, from the commit (``kept``) to the backend (``stored``) or to a dead letter. A command,
and an event that an agent makes by itself, has a tag that nothing else in the world has, for the ids of commands may
repeat in plain backends.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

from tests.simulation.history import AgentEnd, DeadLetter, History, Record
from tests.simulation.setting import CONCURRENCY, REPEATABLE

LATE = 30.0
"""Seconds for which a request may be on its way that nobody waits for any more, once the way was bad."""

UNDER_WAY = 1.0
"""Seconds that a state may take from the spool to the backend in good weather."""

MOVING = 2.0
"""Seconds that the way from one backend to another may take in good weather."""

REPORTS = "reports-of-"
"""What the ids of commands begin with that nobody gave: an agent's own events answer them."""

Ends: TypeAlias = dict[str, AgentEnd]
Oracle: TypeAlias = Callable[[History, Ends], list[str]]


def accepted_is_delivered(history: History, ends: Ends) -> list[str]:
    """
    A result that was accepted has arrived, or is a dead letter for a good reason; none waits for ever.

    Where dead letters had to give way to newer ones, which is counted, so many may be missing. A state that the agent
    made just before it was stopped for the last time may be left: there is no next start that would send it.
    """
    arrived = {record.subject for record in history.all("stored")}
    ending = _ending(history)
    wrong = []
    for agent, end in ends.items():
        kept = {record.subject: record for record in history.all("kept", agent)}
        dead = {letter.id for letter in end.dead}
        missing = [record for name, record in kept.items() if name not in arrived and name not in dead]
        if len(missing) > sum(_lost(history, agent, end)[name] for name in ("evicted command_result",)):
            wrong += [
                f"{agent}: the result {record.subject} of {record.facts['command']}"
                f" was accepted at {record.at:.3f} and is lost"
                for record in missing
            ]
        wrong += [
            f"{agent}: {record.subject} is said to be durable at {record.at:.3f} and was not stored"
            for record in history.all("accepted", agent)
            if record.facts["id"] not in kept
        ]
        wrong += [
            f"{agent}: {letter.id} was given up, and not with reason: {letter.reason}"
            for letter in end.dead
            if not _is_justified(history, letter, kept.get(letter.id))
        ]
        wrong += [f"{agent}: event {name} was never delivered" for name in end.waiting]
        handed = {record.subject: record.at for record in history.all("handed", agent)}
        wrong += [
            f"{agent}: state {name} was never delivered"
            for name in end.states
            if handed.get(name, 0.0) < ending - UNDER_WAY
        ]
    return wrong


def _ending(history: History) -> float:
    """Return when everything began to be stopped."""
    return next((record.at for record in history.all("ending")), float("inf"))


def _is_justified(history: History, letter: DeadLetter, kept: Record | None) -> bool:
    """Say whether a message was rightly given up: over its own time, or refused for good as a fault had it."""
    if letter.reason == "expired":
        # What was stored by a disk that seemed to fail nobody was told of.
        ttl = float(kept.facts["ttl"]) if kept is not None else 0.0
        return ttl >= 0 and letter.died_at >= letter.accepted_at + ttl
    return any(
        letter.reason.startswith(f"refused: {nack.facts['code']}") and nack.facts["fault"] and not nack.facts["later"]
        for nack in history.all("declined")
        if nack.subject == letter.id
    )


def held_is_answered(history: History, ends: Ends) -> list[str]:
    """
    A command that a backend holds is answered, and with what can have become of it.

    ``interrupted`` may be what was run, and at each end of the agent's life so many more as it runs at once: they were
    about to be handed out. It may never be what is safe to repeat. Nothing that a backend holds is ``rejected``.
    """
    given: dict[str, list[Record]] = defaultdict(list)
    for record in history.all("gave"):
        given[str(record.facts["id"])].append(record)
    results = [*history.all("kept"), *history.all("stored")]
    answered = {str(record.facts["command"]) for record in results}
    answered |= {letter.command_id for end in ends.values() for letter in end.dead}
    wrong = [
        f"command {name} ({record.subject}) given at {record.at:.3f} was never answered"
        for name, records in given.items()
        for record in records
        if record.facts["held"] and name not in answered
    ]
    for agent, end in ends.items():
        wrong += [f"{agent}: command {name} is still open" for name in end.open_commands]
        began = {record.subject: record.at for record in reversed(list(history.all("ran", agent)))}
        not_begun = 0
        lives = _ends_of_life(history, agent)
        for record in sorted({each.subject: each for each in reversed(results)}.values(), key=lambda each: each.at):
            commands = [each for each in given[str(record.facts["command"])] if each.facts["agent"] == agent]
            status, at = record.facts["status"], record.at
            if not commands or record.facts.get("short"):
                continue
            types = {str(each.facts["type"]) for each in commands}
            named = f"{agent}: {', '.join(each.subject for each in commands)}"
            if status == "interrupted":
                if types == {REPEATABLE}:
                    wrong.append(f"{named} was reported interrupted at {at:.3f} and is safe to repeat")
                elif not any(began.get(each.subject, at) < at for each in commands):
                    not_begun += 1
                    if not_begun > CONCURRENCY * sum(life < at for life in lives):
                        wrong.append(f"{named} was reported interrupted at {at:.3f} and had never begun")
            elif status == "rejected":
                if any(each.facts["held"] for each in commands):
                    wrong.append(f"{named} was rejected at {at:.3f} although the backend holds it")
            elif (status == "error" and "fail" not in types) or (status == "success" and types == {"fail"}):
                wrong.append(f"{named} has the status {status} at {at:.3f}")
    return wrong


def _ends_of_life(history: History, agent: str) -> list[float]:
    return [record.at for record in history.records if record.who == agent and record.what in ("died", "stopped")]


def effective_once(history: History, ends: Ends) -> list[str]:
    """
    However often a command comes, it has one result; whatever comes again under an id is what came first.

    A plain backend that sends a command to a full agent is told each time that it is rejected. Of a command whose
    result is not remembered any more the agent says so, each time that it comes again.
    """
    kept = {record.subject: record for record in history.all("kept")}
    results: dict[str, dict[str, Record]] = defaultdict(dict)
    first: dict[str, Record] = {}
    wrong = []
    for record in history.all("stored"):
        before = first.setdefault(record.subject, kept.get(record.subject, record))
        if any(before.facts[name] != record.facts[name] for name in ("command", "status", "digest")):
            wrong.append(f"result {record.subject} came with another content at {record.at:.3f}")
        results[str(record.facts["command"])].setdefault(record.subject, record)
    given = Counter(str(record.facts["id"]) for record in history.all("gave"))
    sent = given + Counter(record.subject for record in history.all("sent-again"))
    forgotten = Counter(record.subject for record in history.all("known") if record.facts["missing"])
    for command, different in results.items():
        if command.startswith(REPORTS):
            continue
        short = sum(bool(record.facts["short"]) for record in different.values())
        rejected = sum(record.facts["status"] == "rejected" for record in different.values()) if given[command] else 0
        real = len(different) - short - rejected
        # Commands of plain backends may share an id. One that was rejected may be taken when it is sent again.
        if real > given[command] or real + rejected > sent[command] or short > forgotten[command]:
            said = ", ".join(f"{name} {record.facts['status']}" for name, record in different.items())
            wrong.append(f"command {command}, sent {sent[command]} times, has {len(different)} results: {said}")
    tags: dict[str, set[str]] = defaultdict(set)
    for record in history.all("stored"):
        if record.facts["tag"]:
            tags[str(record.facts["tag"])].add(record.subject)
    wrong += [f"{tag} has {len(names)} results" for tag, names in tags.items() if len(names) > 1]
    return wrong


def run_once(history: History, ends: Ends) -> list[str]:
    """
    No command is run twice, unless it is safe to repeat, marked as redelivered, had no result, and the agent's life
    has ended in between; and none is run by an agent that it was not given to.
    """
    addressee = {record.subject: record.facts["agent"] for record in history.all("gave")}
    wrong = []
    for agent in ends:
        ran: dict[str, float] = {}
        done = {}
        lives = _ends_of_life(history, agent)
        for record in history.records:
            if record.who != agent:
                continue
            tag, at = record.subject, record.at
            if record.what == "kept":
                done[record.facts["key"]] = at
            elif record.what == "ran":
                again = tag in ran
                allowed = record.facts["repeatable"] and record.facts["redelivered"]
                if addressee.get(tag, agent) != agent:
                    wrong.append(f"{agent}: {tag} was run at {at:.3f} and is for {addressee[tag]}")
                elif record.facts["key"] in done:
                    wrong.append(f"{agent}: {tag} was run at {at:.3f} although it had a result")
                elif again and not (allowed and any(ran[tag] <= life <= at for life in lives)):
                    wrong.append(f"{agent}: {tag} was run again at {at:.3f}")
                elif record.facts["redelivered"] and not record.facts["repeatable"]:
                    wrong.append(f"{agent}: {tag} was offered again at {at:.3f} and is not safe to repeat")
                ran[tag] = at
    return wrong


def in_order(history: History, ends: Ends) -> list[str]:
    """
    Results arrive in the order in which they were accepted.

    Exempt is a result that a backend wanted later (a nack with a time), and one that was given up: it arrives all the
    same when its command comes again, or when the agent dies before it is a dead letter.
    """
    put_off = {record.subject for record in history.all("declined") if record.facts["later"] or record.facts["fault"]}
    arrived: dict[str, float] = {}
    for record in history.all("stored"):
        arrived.setdefault(record.subject, record.at)
    wrong = []
    for agent, end in ends.items():
        exempt = put_off | {letter.id for letter in end.dead}
        place = {record.subject: number for number, record in enumerate(history.all("kept", agent))}
        latest = ""
        for name, at in arrived.items():
            if name in exempt or name not in place:
                continue
            if latest and place[name] < place[latest]:
                wrong.append(f"{agent}: {name} arrived at {at:.3f} after {latest}, which was accepted later")
            else:
                latest = name
    return wrong


def states_are_latest(history: History, ends: Ends) -> list[str]:
    """
    Inventories arrive in the order of their making, and the last one that was accepted, or a later one, is the last.

    Exempt is a request that the agent has given up and that was slow on its way: it may arrive after its successor,
    :data:`LATE` seconds after a time in which something held messages up. It may be the last where the agent is not
    told which one its backend has. Exempt, too, is what was accepted before one that is a dead letter, or is left: that
    one has replaced it.
    """
    slow = _slow_times(history)
    wrong = []
    for agent, end in ends.items():
        arrived: list[int] = []
        for record in history.all("inventory"):
            if record.subject == agent:
                number = int(record.facts["number"])
                late = any(begun <= record.at <= over + LATE for begun, over in slow)
                if arrived and number < max(arrived):
                    if not late:
                        wrong.append(f"{agent}: inventory {number} arrived at {record.at:.3f} after {max(arrived)}")
                    elif not record.facts["told"]:
                        continue
                arrived.append(number)
        gone = {letter.id for letter in end.dead} | set(end.states)
        stock = {record.subject for record in history.all("stock", agent)}
        accepted = 0
        for record in history.all("handed", agent):
            if record.subject in gone:
                accepted = 0
            elif record.subject in stock:
                accepted = max(accepted, int(record.facts["number"]))
        last = arrived[-1] if arrived else 0
        if max(accepted, *arrived, 0) > last:
            wrong.append(f"{agent}: inventory {max(accepted, *arrived, 0)} is the latest, the last to arrive is {last}")
    return wrong


_SLOW = ("slow", "hang", "blackhole", "one-way")


def _slow_times(history: History) -> list[tuple[float, float]]:
    over = {record.facts["number"]: record.at for record in history.all("over")}
    return [
        (record.at, over.get(record.facts["number"], float("inf")))
        for record in history.all("fault")
        if record.subject in _SLOW or record.facts.get("fault") in _SLOW
    ]


def within_bounds(history: History, ends: Ends) -> list[str]:
    """Nothing ever held more than it may."""
    return [
        f"{agent}: {end.highest[name]} {name} were held, {bound} may be"
        for agent, end in ends.items()
        for name, bound in end.bounds.items()
        if end.highest.get(name, 0) > bound
    ]


def totals_are_right(history: History, ends: Ends) -> list[str]:
    """What an agent's spool says that it holds is what it holds."""
    return [
        f"{agent}: {said} {name} are counted, {true} are there"
        for agent, end in ends.items()
        for name, (said, true) in end.totals.items()
        if said != true
    ]


def nothing_complains(history: History, ends: Ends) -> list[str]:
    """No exception escapes, and nothing is logged as an error that is none."""
    return [f"{record.who}: {record.subject}: {record.facts['says']}" for record in history.all("complaint")]


def nothing_is_left(history: History, ends: Ends) -> list[str]:
    """A process that has stopped in order leaves no timer, socket, port, half-made file or lock behind."""
    return [f"{record.who}: left behind: {record.subject}" for record in history.all("leftover")]


def back_in_time(history: History, ends: Ends) -> list[str]:
    """
    Once the faults are over every agent is in touch within the promised time and stays so, and all is settled.

    Exempt is the moment in which an agent goes back to the backend that it prefers.
    """
    wrong = []
    ending = next((record.at for record in history.all("ending")), float("inf"))
    for healed in history.all("healed"):
        agent, within = healed.subject, float(healed.facts["within"])
        apart, moved = True, float("-inf")
        for record in history.records:
            if record.who != agent or record.at >= ending:
                continue
            if record.what == "says" and record.subject == "backends.moved":
                moved = record.at
            elif record.what in ("in-touch", "apart"):
                late = record.at > healed.at + within
                if late and record.what == "in-touch" and apart and record.at > moved + MOVING:
                    wrong.append(
                        f"{agent}: in touch {record.at - healed.at:.1f} s after the faults were over,"
                        f" {within:.1f} s are promised"
                    )
                elif late and record.what == "apart" and record.at > moved + MOVING:
                    wrong.append(f"{agent}: not in touch any more {record.at - healed.at:.1f} s after the faults")
                apart = record.what == "apart"
        if apart and ending > moved + MOVING:
            wrong.append(f"{agent}: not in touch again after the faults were over")
    if not any(True for _ in history.all("settled")):
        wrong.append("not everything was settled in the end")
    return wrong


def losses_are_counted(history: History, ends: Ends) -> list[str]:
    """Whatever was given up is counted once, under its reason, and the backend is told of it once."""
    wrong = []
    for agent, end in ends.items():
        lost = _lost(history, agent, end)
        dead = Counter(f"{letter.reason.partition(':')[0]} {letter.kind}" for letter in end.dead)
        evicted = {name: count for name, count in lost.items() if name.startswith("evicted ")}
        missing = lost - Counter(evicted) - dead
        # A dead letter that had to give way was counted twice: when it died, and when it went.
        if dead - lost or missing.total() != sum(evicted.values()):
            wrong.append(f"{agent}: given up was {_shown(dead)}, counted {_shown(lost)}")
        if sum(end.losses.values()) != end.unreported:
            wrong.append(f"{agent}: {_shown(end.losses)} are counted and not reported, it says {end.unreported}")
    return wrong


def _lost(history: History, agent: str, end: AgentEnd) -> Counter[str]:
    """Return what is counted as lost, at the backend or still with the agent, by reason and kind."""
    lost: Counter[str] = Counter(end.losses)
    for record in history.all("losses"):
        if record.subject == agent:
            lost[f"{record.facts['reason']} {record.facts['kind']}"] += int(record.facts["count"])
    return lost


def _shown(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def duplicates_are_answered(history: History, ends: Ends) -> list[str]:
    """
    A finished command that comes again in good weather is answered with its original result.

    When its result is not remembered any more, a short one says so.
    """
    wrong = []
    for repeated in history.all("gave-again"):
        answers = [record for record in history.all("stored") if record.facts["command"] == repeated.facts["id"]]
        if not any(record.at > repeated.at and (record.facts["again"] or record.facts["short"]) for record in answers):
            wrong.append(f"{repeated.subject} came again at {repeated.at:.3f} and its result did not")
    return wrong


ORACLES: Sequence[Oracle] = (
    accepted_is_delivered,
    held_is_answered,
    effective_once,
    run_once,
    in_order,
    states_are_latest,
    within_bounds,
    totals_are_right,
    nothing_complains,
    nothing_is_left,
    back_in_time,
    losses_are_counted,
    duplicates_are_answered,
)


def judge(history: History, ends: Ends) -> list[str]:
    """Return everything that any oracle has to object, each with the oracle's name."""
    return [f"{oracle.__name__}: {sentence}" for oracle in ORACLES for sentence in oracle(history, ends)]
