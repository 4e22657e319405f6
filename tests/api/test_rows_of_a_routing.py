"""`arrivals` and `slot_weights`: what a handle says of the rows that its dispatch brought."""

from __future__ import annotations

import pytest
import torch

from expertlink import DispatchLayout, InputError
from support.small_calls import H, good, make


@pytest.mark.parametrize("layout", list(DispatchLayout), ids=lambda layout: layout.value)
def test_what_a_routing_says_of_its_rows(layout: DispatchLayout) -> None:
    fields = good()
    ids, weights = fields["topk_ids"], fields["weights"]
    with make(output_layout=layout) as comm:
        received, handle = comm.dispatch(**fields)
        arrivals = comm.arrivals(handle)  # one rank: tokens in their order
        assert torch.equal(arrivals >= 0, ids >= 0)
        if not layout.expanded:
            assert torch.equal(arrivals, ids)
            with pytest.raises(InputError, match="slot_weights needs a layout with a row per"):
                comm.slot_weights(handle)
            return
        rows = received.tokens.reshape(-1, H)
        slot_weights = comm.slot_weights(handle)
        assert slot_weights is not None
        assert slot_weights.shape == received.tokens.shape[:-1]
        filled = slot_weights.reshape(-1)
        for token, lane in (ids >= 0).nonzero().tolist():
            row = arrivals[token, lane]
            assert torch.equal(rows[row], fields["input"][token])
            assert filled[row] == weights[token, lane]
        assert torch.count_nonzero(filled) == (ids >= 0).sum()
        _, unweighted = comm.dispatch(fields["input"], ids)
        assert comm.slot_weights(unweighted) is None
