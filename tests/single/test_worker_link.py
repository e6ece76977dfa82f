"""What a worker's link makes of messages that come at awkward moments, without a coordinator."""

from __future__ import annotations

import pytest

from ringps.config import Timeouts
from ringps.errors import RingChangedError, RingpsError
from ringps.membership import WorkerLink
from ringps.ring.topology import Generation
from ringps.transport.keys import JobKey
from ringps.wire.control import AllLeft, Form, Joiners, Leaving, Message, Prepare
from ringps.wire.rules import Seat
from ringps.worker_env import WorkerEnv


class Deaf:
    def on_lost(self, error: RingpsError) -> None: ...
    def on_changed(self, error: RingChangedError) -> None: ...
    def on_left(self, rank: int, completed: int) -> None: ...
    def on_verdict(self, sequence: int, calls: tuple[str, ...]) -> None: ...
    def on_inquiry(self, sequence: int) -> str:
        return ""


def link() -> WorkerLink:
    env = WorkerEnv(
        coordinator="127.0.0.1:9",
        key_file=None,
        worker_id=0,
        host="here",
        address="127.0.0.1",
        local_rank=0,
        local_world_size=1,
    )
    return WorkerLink(env, Timeouts(), Deaf())


def form(one: WorkerLink, number: int, *then: Joiners) -> Generation:
    """All that the coordinator says of a generation comes before the worker looks at any of it."""
    token = JobKey.generate()
    prepare = Prepare(
        generation=number,
        reason="for a test",
        members=(Seat(0, "here", 1),),
        token_public=token.public.decode(),
        token_secret=token.secret.decode(),
        encrypt=False,
    )
    one.on_message(prepare)
    one.on_message(Form(generation=number, addresses=("a",)))
    for message in then:
        one.on_message(message)
    return one.next_generation(lambda token, encrypt: _said_again(one, prepare, number))


def _said_again(one: WorkerLink, prepare: Prepare, number: int) -> str:
    one.on_message(prepare)  # as after a broken connection
    return "a"


def test_word_of_joiners_may_come_before_the_worker_has_entered_the_generation() -> None:
    one = link()
    assert form(one, 1, Joiners(generation=1, worker_ids=(3,))).number == 1
    assert one.joiners == (3,)
    assert form(one, 2).number == 2
    assert one.joiners == ()
    one.on_message(Joiners(generation=1, worker_ids=(4,)))
    assert one.joiners == ()
    one.on_message(Joiners(generation=2, worker_ids=(5,)))
    assert one.joiners == (5,)


@pytest.mark.parametrize("suspended", [True, False])
def test_whoever_leaves_says_whether_the_job_stops_at_a_checkpoint(
    suspended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = link()
    form(one, 1)
    said: list[Message] = []
    greetings: list[Message] = []
    monkeypatch.setattr(one._channel, "send", said.append)
    monkeypatch.setattr(one._channel, "greet_with", lambda *messages: greetings.extend(messages))
    one.on_message(AllLeft(generation=1))
    one.leave(7, suspended=suspended)
    leaving = Leaving(generation=1, completed=7, suspended=suspended)
    assert said == [leaving]
    assert greetings[-1] == leaving, "for a coordinator that is away now"
