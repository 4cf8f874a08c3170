"""Who may be asked for what when a slot changes hands."""

from sglang.srt.kvtuner.cache.residual_window import RingLedger


class TestRingLedger:
    def test_a_new_request_starts_where_its_prefix_ends(self):
        ledger = RingLedger(3)
        assert ledger.start(1, generation=1, prefix_len=64) == 64

    def test_the_start_stays_while_the_request_does(self):
        ledger = RingLedger(3)
        ledger.start(1, generation=1, prefix_len=64)
        assert [ledger.start(1, generation=1, prefix_len=prefix_len) for prefix_len in (100, 101, 200)] == [64] * 3

    def test_the_next_request_of_a_slot_starts_anew(self):
        ledger = RingLedger(3)
        ledger.start(2, generation=1, prefix_len=0)
        ledger.start(2, generation=1, prefix_len=500)
        assert ledger.start(2, generation=2, prefix_len=128) == 128
        assert ledger.start(2, generation=5, prefix_len=0) == 0  # generations may be skipped

    def test_slots_are_independent(self):
        ledger = RingLedger(3)
        ledger.start(1, generation=1, prefix_len=16)
        ledger.start(2, generation=1, prefix_len=32)
        assert ledger.start(1, generation=1, prefix_len=40) == 16
        assert ledger.start(2, generation=1, prefix_len=40) == 32

    def test_the_first_generation_counts_as_new(self):
        """Upstream's padding row keeps generation 0 for ever."""
        assert RingLedger(1).start(0, generation=0, prefix_len=48) == 48
