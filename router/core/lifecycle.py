"""The life of a request, as a table.

           submit
             |
             v     order_prefill           prefilled               fetched
          QUEUED ---------------> PREFILLING -------> HANDING_OFF ---------> DECODING
           ^ |                        |                    |                    ^ |
           | '------------------------(--- order_whole ----(--------------------' |
           '----------- retry --------'------ retry -------'------- retry --------'

    any of the four  --finish-->  FINISHED     the answer is complete
                     --refuse-->  REFUSED      nothing was begun: a limit, nobody to serve it (QUEUED only)
                     --cancel-->  CANCELLED    the client went away
                     --expire-->  EXPIRED      the deadline came first
                     --fail---->  FAILED       attempts ran out, or no worker can do it

QUEUED       waits in its pool's queue; no leg is open. After a retry it may hold its decode slot.
PREFILLING   a prefill leg is open and a decode slot is held.
HANDING_OFF  the prompt's KV is under a lease at the prefill worker; the decode leg is open and fetches it.
DECODING     the decode leg is open and needs nobody else. Whole requests (computed at one worker) begin here.

A request may finish in any state: an edge can find a stop string in tokens that came before a retry.
A pair that is not in the table is a fault of ours and raises.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HANDING_OFF = "handing_off"
    DECODING = "decoding"
    FINISHED = "finished"
    REFUSED = "refused"
    CANCELLED = "cancelled"
    EXPIRED = "expired"
    FAILED = "failed"


class Trigger(Enum):
    ORDER_PREFILL = "order_prefill"
    ORDER_WHOLE = "order_whole"
    PREFILLED = "prefilled"
    FETCHED = "fetched"
    RETRY = "retry"
    FINISH = "finish"
    REFUSE = "refuse"
    CANCEL = "cancel"
    EXPIRE = "expire"
    FAIL = "fail"


OPEN = (State.QUEUED, State.PREFILLING, State.HANDING_OFF, State.DECODING)
ENDS = (State.FINISHED, State.REFUSED, State.CANCELLED, State.EXPIRED, State.FAILED)

_TABLE: dict[tuple[State, Trigger], State] = {
    (State.QUEUED, Trigger.ORDER_PREFILL): State.PREFILLING,
    (State.QUEUED, Trigger.ORDER_WHOLE): State.DECODING,
    (State.QUEUED, Trigger.REFUSE): State.REFUSED,
    (State.PREFILLING, Trigger.PREFILLED): State.HANDING_OFF,
    (State.HANDING_OFF, Trigger.FETCHED): State.DECODING,
    (State.PREFILLING, Trigger.RETRY): State.QUEUED,
    (State.HANDING_OFF, Trigger.RETRY): State.QUEUED,
    (State.DECODING, Trigger.RETRY): State.QUEUED,
    **{(state, Trigger.FINISH): State.FINISHED for state in OPEN},
    **{(state, Trigger.CANCEL): State.CANCELLED for state in OPEN},
    **{(state, Trigger.EXPIRE): State.EXPIRED for state in OPEN},
    **{(state, Trigger.FAIL): State.FAILED for state in OPEN},
}


class IllegalTransition(Exception):
    """A pair that the table does not have. Carries the request's story."""


def next_state(state: State, trigger: Trigger, story: str = "") -> State:
    try:
        return _TABLE[state, trigger]
    except KeyError:
        raise IllegalTransition(f"{trigger.value} in {state.value}\n{story}") from None
