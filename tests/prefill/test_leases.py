from prefill.leases import LeaseAccount


def test_a_customers_handles_are_its_own() -> None:
    account = LeaseAccount()
    account.hand_out(0, "router a", "x/1/p", b"a", 30)
    account.hand_out(0, "router b", "x/1/p", b"b", 30)
    assert account.take("router a", "x/1/p") == b"a"
    assert account.take("router a", "x/1/p") is None
    assert account.take_all("router a") == []
    assert account.take_all("router b") == [b"b"]
    assert len(account) == 0


def test_leases_past_their_deadline_are_forgotten() -> None:
    account = LeaseAccount()
    account.hand_out(0, "r", "x", b"x", 30)
    account.hand_out(29, "r", "y", b"y", 30)
    assert account.take("r", "x") == b"x"
    account.hand_out(60, "r", "z", b"z", 30)
    assert account.take_all("r") == [b"z"]


def test_the_account_is_bounded_and_drops_the_oldest() -> None:
    account = LeaseAccount(entries_max=2)
    for leg in "xyz":
        account.hand_out(0, "r", leg, leg.encode(), 30)
    assert account.take_all("r") == [b"y", b"z"]
