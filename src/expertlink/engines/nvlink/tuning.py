"""Numbers of the nvlink engine that were chosen by measurement, each with its source.

A quoted name is a row of docs/tried.md. "SMs" is docs/tuning.md.
All figures are of 4 x H200, H=7168, K=8, E=256, unless the row says otherwise. "Not measured" says
that a number is a bound or a first choice, which nobody has compared with others.
"""

from __future__ import annotations

# -- both modes -----------------------------------------------------------------------------------

SHARED_BYTES = 227 * 1024
"""Shared memory of a block. The hardware's limit on sm_90 and later."""

STATIC_BYTES = 10 * 1024
"""Part of it for barriers and small tables. A bound that the tests of the kernels hold."""

# -- ht -------------------------------------------------------------------------------------------

HT_LEAST_SMS = 24
"""SMs of a dispatch or combine that asks for no number, at least. SMs."""

HT_MOST_SMS = 64
"""The same, at most ("SMs of expanded layouts, ht")."""

HT_SMS_STEP = 8
"""The number is a multiple of this. Not measured."""

HT_WIRE_GBPS = 318.0
"""What the wire takes in a direction. SMs."""

HT_PUT_GBPS = 41.0
"""What an SM sends. SMs."""

HT_READ_GBPS = 116.0
"""What an SM reads to place it, each row once: with the next number, what explains a cached
dispatch on 2 ranks and 24 SMs ("SMs of expanded layouts, ht")."""

HT_WRITE_GBPS = 53.0
"""What an SM writes to placed rows (the same row)."""

HT_MAX_WARPS = 15
"""Warps of a block that move rows; one more announces them ("arrival flags, combine")."""

HT_MOST_BATCH = 8
"""Most rows that a warp of a dispatch moves at a time, a power of two: four with K=8, since a row
takes a lane for every choice ("rows of one dispatch under way in a warp")."""

HT_LEAST_WARPS = 12
"""Warps of a dispatch's block, at least, where short rows share the memory of a warp (the same
row). Other numbers were not measured."""

HT_MAILBOX_DEPTH = 2
"""Batches of a warp that may wait to be announced. Not measured."""

HT_SUM_WARPS = 23
"""Warps of a combine's block in expanded layouts, which sum before they send: 80 registers each are
enough ("warps of a combine that sum")."""

HT_SUM_STAGES = 4
"""Stages of a warp's shared memory in a sum of up to four rows: three are being loaded, one is
added up ("sums of `FLAT` combine"). Other numbers were not measured."""

HT_SHARED_SLOTS = 512
"""First slots of groups that placing keeps in shared memory. Not measured."""

HT_SHARED_TABLE = 16 * 1024
"""Words of count rows that planning keeps in shared memory. Not measured."""

HT_DISPATCH_SENDERS = 0.36
"""Share of a dispatch's blocks that send. SMs; "who does what" and "blocks that have sent
everything": blocks take work, so the share decides little."""

HT_DISPATCH_SENDERS_SHORT_ROWS = 0.42
"""The same where rows have at most half the bytes of unquantized ones. SMs."""

HT_DISPATCH_SENDERS_EXPANDED = 0.34
"""The same in expanded layouts. SMs."""

HT_ZERO_COPY_PLACERS = 12
"""With zero copy one block of so many places; the others send. SMs."""

HT_COMBINE_SENDERS = 0.6
"""Share of a combine's blocks that send. SMs."""

HT_COMBINE_SENDERS_SHORT_ROWS = 0.72
"""The same where rows that go back share the memory of a warp ("blocks of a combine that send")."""

HT_COMBINE_SENDERS_EXPANDED = 0.78
"""The same in expanded layouts, where senders also sum. SMs."""

HT_COMBINE_SENDERS_EXPANDED_TWO_RANKS = 0.86
"""The same where a token has at most two partial sums, so that little is added up in the end (the
same row)."""

HT_OUTPUT_SLACK = 32
"""Outputs are made a 32nd larger than recent calls needed ("memory of the output"). The part
itself was not measured."""

HT_CALLS_REMEMBERED = 8
"""How many recent calls that looks at. Not measured."""

# -- ll -------------------------------------------------------------------------------------------

LL_DISPATCH_SMS = 32
"""SMs of a dispatch that asks for no number. SMs; "rows through shared memory and the copy
engine" has figures of 32 and 64."""

LL_COMBINE_SMS = 64
"""The same of a combine. SMs."""

LL_DISPATCH_SMS_TWO_RANKS = 64
"""The same of a dispatch in expanded layouts where a token goes to at most two ranks: more is
placed than crosses the wire ("SMs of expanded layouts, 2 ranks")."""

LL_COMBINE_SMS_TWO_RANKS = 96
"""The same of a combine (the same row)."""

LL_DISPATCH_WARPS = 16
"""Most warps of a dispatch's block. Not measured."""

LL_COMBINE_WARPS = 12
"""Most warps of a combine's block: fewer warps have more registers ("the same, combine
`RANK_MAJOR`, 64 SMs, 16 warps a block")."""

LL_PUBLISHING_WARPS = 4
"""Warps of a dispatch's block that publish counts and metadata, at least ("who publishes
choices"). Their number was not measured."""

LL_SENDING_WARPS = 260.0
"""Warps of all blocks that begin with sending, where one launch does both halves and a row goes to
one peer. With c peers a c-th of them: so many fill the wire, and more get in the way of warps that
wait for rows ("warps that send", "the same, 2 ranks, T=16 / 128 / 512", "the same, 4 ranks,
K = 2"). More than 4 ranks were not measured."""

LL_QUANTIZING_WARPS = (950.0, 3.2)
"""The same, a and b of a / (b + c), where they quantize: that takes as long as b copies of a row
("warps that begin with sending", "the same, 2 ranks, e4m3")."""

LL_SENDING_WARPS_FEW_ROWS = 192
"""The same where there are fewer steps than warps ("the same, 2 ranks, T=16 / 128 / 512")."""

LL_SEND_DEPTH = 4
"""Steps of a row that a sending warp has in flight. Not measured."""

LL_SEND_DEPTH_QUANTIZED = 3
"""The same where it quantizes. Not measured."""

LL_PLACE_DEPTH = 3
"""Steps of a staged row that a placing warp polls together. Not measured."""

LL_PLACE_PART = 6
"""Steps of a part of a row that is placed, at most. Not measured."""

LL_FEW_STEPS = 8
"""Steps of rows that are short for placing, as those of 4 KB are; twice as many for sums. Other
bounds were not measured."""

LL_PLACE_SHORT = 4
"""Both of these where rows have at most eight steps, which they divide evenly ("parts of short rows
that are placed")."""

LL_SUM_DEPTH = 4
"""Steps of a term that a warp of a combine has in flight ("steps under way in each of these")."""

LL_SUM_DEPTH_EXPANDED = 3
"""The same in expanded layouts ("steps under way in a sum")."""

LL_SUM_DEPTH_EXPANDED_SHORT = 4
"""The same where rows have at most 16 steps ("steps under way in a sum of short rows") and the
compiler finds the registers: up to four ranks, none of which may be left out, no exact sums."""

LL_TERMS_TOGETHER = 4
"""Terms that are in flight together for a part of one step ("sums of longer parts" has the other
parts). The number was not measured."""

LL_DRAWN_FROM = 5
"""Parts per warp from which on they are drawn from a counter; fewer go in turn, which takes no time
("the same, drawn")."""

LL_RETURNING_SHARE = 0.75
"""Share of a combine's warps that begin with returning rows, at most ("warps of 12 that return
rows": 9 of 12)."""

LL_RETURNING_SHARE_EXPANDED = 0.84
"""The same in expanded layouts, where they sum before they send ("warps of 12 that return sums":
10 of 12)."""

LL_RETURNING_WARPS = 256
"""Warps of all blocks that copy rows back; 4 of 12 in each of 64 blocks ("warps of 12 that return
rows")."""

LL_LEAST_RETURNING_WARPS = 4
"""Of these in a block, at least (the same row)."""

LL_MASK_WORDS = 24 * 1024
"""Words of shared memory for masks of experts; experts that do not fit are looked at in turns. Not
measured."""

LL_TABLE_WORDS = 24 * 1024
"""Most words of shared memory for everything else. Not measured."""

LL_CALLS_IN_FLIGHT = 2
"""Calls whose receiving half has not been launched. Three staging sets allow no more."""
