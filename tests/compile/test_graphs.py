"""What may be in a graph, on one rank: handles, micro-batches, checkpoints, exports, refusals."""

from __future__ import annotations

import functools
import gc
import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import Unsupported
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from expertlink import ClosedError, HandleError, InputError, MoECommunicator, graph_names
from expertlink.ops import COMBINE_OPS, DISPATCH_OPS
from support.compiled import Layer, agree, compiled, counting, inputs, scaled
from support.small_calls import E, H, K, T, good, make, works

COUNTS = (3, 5)


def communicator(**fields: Any) -> MoECommunicator:
    comm = make(**{"max_tokens_per_rank": 8, **fields})
    comm.initialize()
    return comm


# -- handles --------------------------------------------------------------------------------------


def test_two_micro_batches_and_two_combines() -> None:
    with communicator() as comm, counting() as counted:
        weight = Layer(comm).weight

        def model(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            one, first = comm.dispatch(x_TH, ids_TK, weights_TK)
            two, second = comm.dispatch(x_TH + 1, ids_TK.flip(0), weights_TK)
            y_TH = comm.combine(scaled(two, weight), second)
            return y_TH + comm.combine(scaled(one, weight), first) + comm.combine(one.tokens, first)

        agree(model, compiled(model), comm, [weight], COUNTS)
    assert (counted.graphs, counted.breaks) == (1, 0)


@pytest.mark.parametrize("layout", ["flat", "token_major"])
def test_cached_dispatches(layout: str) -> None:
    """With the same ids, other ones that are equal, and other weights."""
    with communicator(output_layout=layout) as comm, counting() as counted:
        weight = Layer(comm).weight
        expanded = comm.config.layout.expanded

        def model(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            one, first = comm.dispatch(x_TH, ids_TK, weights_TK)
            two, second = comm.dispatch(x_TH * 2, ids_TK, previous_handle=first)
            three, third = comm.dispatch(
                x_TH + 1, ids_TK.clone(), weights_TK * 2, previous_handle=second
            )
            late: dict[str, Any] = {"topk_weights": weights_TK + 1} if expanded else {}
            y_TH = comm.combine(scaled(one, weight), first)
            y_TH = y_TH + comm.combine(scaled(two, weight), second)
            return y_TH + comm.combine(scaled(three, weight), third, **late)

        agree(model, compiled(model), comm, [weight], COUNTS)
    assert (counted.graphs, counted.breaks) == (1, 0)


def test_another_routing_of_a_cached_dispatch_is_refused() -> None:
    with communicator() as comm:

        def model(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            _, handle = comm.dispatch(x_TH, ids_TK, weights_TK)
            return comm.dispatch(x_TH, ids_TK + 1, previous_handle=handle)[0].tokens

        with pytest.raises(InputError, match="differs from the routing of previous_handle"):
            compiled(model)(*inputs(comm, 5))
        works(comm)


def test_handles_leave_and_enter_graphs() -> None:
    """From a graph to plain calls, and from one graph to another."""
    with communicator() as comm:
        layer = Layer(comm)

        send = compiled(lambda *given: comm.dispatch(*given))
        for receive in (comm.combine, compiled(lambda *given: comm.combine(*given))):

            def model(
                x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor, receive: Any = receive
            ) -> Tensor:
                out, handle = send(x_TH * 2, ids_TK, weights_TK)
                return receive(scaled(out, layer.weight), handle)

            with counting():

                def plain(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
                    out, handle = comm.dispatch(x_TH * 2, ids_TK, weights_TK)
                    return comm.combine(scaled(out, layer.weight), handle)

                agree(plain, model, comm, [layer.weight], COUNTS)
        out, handle = send(*inputs(comm, 5))
        assert comm.wire_rows(handle) == ([5], [5])
        again, cached = comm.dispatch(out.tokens[:5], None, previous_handle=handle)
        assert again.tokens.shape == out.tokens.shape
        comm.combine(again.tokens, cached)


def test_a_plain_handle_ends_the_graph() -> None:
    with communicator() as comm, torch.no_grad():
        out, handle = comm.dispatch(**good())
        with counting() as counted:
            fast = compiled(lambda rows: comm.combine(rows, handle) * 2, fullgraph=False)
            torch.testing.assert_close(fast(out.tokens), comm.combine(out.tokens, handle) * 2)
        assert counted.breaks > 0


def test_a_routing_lives_as_long_as_its_handle() -> None:
    with communicator() as comm:
        fast = compiled(lambda *given: comm.dispatch(*given))
        with torch.no_grad():
            out, handle = fast(*inputs(comm, 5))
        before = len(graph_names._handles)
        token = handle.tensors[0].view(1, 1)
        del handle, out
        gc.collect()
        assert len(graph_names._handles) == before
        del token
        gc.collect()
        assert len(graph_names._handles) == before - 1


def test_a_copied_token_does_not_keep_its_routing() -> None:
    with communicator() as comm, torch.no_grad():
        out, handle = compiled(lambda *given: comm.dispatch(*given))(*inputs(comm, 5))
        handle.tensors = [tensor.clone() for tensor in handle.tensors]
        with pytest.raises(HandleError, match="something copied the handle's tensors"):
            comm.combine(out.tokens, handle)


def test_backward_again() -> None:
    with (
        communicator() as comm,
        functorch_config.patch(donated_buffer=False),
        counting() as counted,
    ):
        layer = Layer(comm)
        agree(layer, compiled(layer), comm, [layer.weight], COUNTS, passes=2)
    assert (counted.graphs, counted.breaks) == (1, 0)


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("order", ["inside", "around"])
def test_checkpoints(order: str, reentrant: bool) -> None:
    """A checkpoint in a graph, and around one."""
    with communicator(output_layout="token_major") as comm, counting() as counted:
        layer = Layer(comm)

        def checkpointed(model: Any) -> Any:
            return lambda *given: checkpoint(model, *given, use_reentrant=reentrant)

        fast = compiled(layer, fullgraph=False)
        fast = checkpointed(fast) if order == "around" else compiled(checkpointed(layer))
        agree(layer, fast, comm, [layer.weight], COUNTS)
    if order == "inside":
        assert (counted.graphs, counted.breaks) == (1, 0)


@pytest.mark.parametrize(
    ("form", "saved"),
    [
        ("plain", ()),
        ("plain", (*DISPATCH_OPS, *COMBINE_OPS)),
        ("compiled", ()),
        ("compiled", DISPATCH_OPS),
    ],
)
def test_selective_checkpoints_find_the_operators(form: str, saved: tuple[Any, ...]) -> None:
    """What a policy saves is not done again."""
    done: list[str] = []

    def policy(ctx: Any, op: Any, *args: Any, **options: Any) -> CheckpointPolicy:
        if op in (*DISPATCH_OPS, *COMBINE_OPS) and not ctx.is_recompute:
            done.append(op.name())
        return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    with communicator() as comm:
        totals = comm.enable_statistics()
        with counting():
            layer = Layer(comm)

            def model(*given: Tensor) -> Any:
                return checkpoint(layer, *given, use_reentrant=False, context_fn=contexts)

            fast = compiled(model) if form == "compiled" else model
            agree(layer, fast, comm, [layer.weight], COUNTS)
            assert done[:2] == ["expertlink::dispatch", "expertlink::combine"]
        # A step is two dispatches and two combines, and repeats what is not saved. Compiled code
        # leaves out what nobody reads: the result of the combine that is done again.
        kinds = [ops for ops in (DISPATCH_OPS, COMBINE_OPS) if ops[0] not in saved]
        again = len(kinds) if form == "plain" else kinds.count(DISPATCH_OPS)
        totals.rows_sent.zero_()
        x_TH, ids_TK, weights_TK = inputs(comm, 5)
        fast(x_TH, ids_TK, weights_TK).sum().backward()
        assert int(totals.rows_sent) == 5 * (4 + again)


# -- what is no graph -----------------------------------------------------------------------------


def test_forms_that_leave_the_graph() -> None:
    """They work, and end it; with fullgraph torch says where to read."""
    with communicator() as comm, counting() as counted:

        def model(x_TH: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
            out, handle = comm.dispatch(x_TH, ids_TK, weights_TK, async_finish=True)
            handle.wait()
            return comm.combine(out.tokens, handle) * 2

        agree(model, compiled(model, fullgraph=False), comm, [], (3,))
        torch.compiler.reset()
        with pytest.raises(Unsupported, match="docs/guide/compile.md"):
            compiled(model)(*inputs(comm, 3))
    assert counted.breaks > 0


def test_without_fullgraph_counted_rows_end_the_graph() -> None:
    """Unless torch is told to take operators whose shapes depend on data."""
    for takes in (False, True):
        with (
            communicator() as comm,
            torch._dynamo.config.patch(capture_dynamic_output_shape_ops=takes),
            counting() as counted,
        ):
            layer = Layer(comm)
            agree(layer, compiled(layer, fullgraph=False), comm, [layer.weight], COUNTS)
        assert (counted.breaks == 0) == takes


def test_before_initialize_the_graph_ends() -> None:
    with counting() as counted:
        comm = make()
        fast = compiled(lambda *given: comm.dispatch(*given)[0].tokens * 2, fullgraph=False)
        fast(*inputs(comm, 3))
        works(comm)
        comm.close()
    assert counted.breaks > 0


@pytest.mark.parametrize("form", ["plain", "compiled"])
def test_transforms_of_functions_are_refused(form: str) -> None:
    with communicator() as comm:
        layer = Layer(comm)
        x_TH, ids_TK, weights_TK = (tensor.detach() for tensor in inputs(comm, 4))
        state: dict[str, Tensor] = dict(layer.named_parameters())

        def of_state(state: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(layer, state, (x_TH, ids_TK, weights_TK))

        def of_rows(x_TH: Tensor) -> Tensor:
            return layer(x_TH, ids_TK, weights_TK)

        batch = torch.stack([x_TH, x_TH])
        stacked = {name: torch.stack([value, value]) for name, value in state.items()}
        forms: list[Any] = [
            lambda: torch.vmap(of_rows)(batch),
            lambda: torch.vmap(of_state)(stacked),
            lambda: torch.func.grad(lambda x_TH: of_rows(x_TH).sum())(x_TH),
            lambda: torch.func.grad(lambda state: of_state(state).sum())(state),
            lambda: torch.func.jvp(of_rows, (x_TH,), (x_TH,)),
        ]
        for call in forms if form == "plain" else forms[::2]:
            torch.compiler.reset()
            fast = call if form == "plain" else torch.compile(call, backend="aot_eager")
            for mode in (torch.enable_grad(), torch.no_grad()):
                with mode, pytest.raises(InputError, match="torch.vmap or torch.func"):
                    fast()
        torch.testing.assert_close(of_state(state), of_rows(x_TH))  # no transform
        works(comm)


def test_the_operators_refuse_vmap() -> None:
    with communicator() as comm:
        form = comm._graph_form
        assert form is not None
        x_TH, ids_TK, weights_TK = (tensor.detach() for tensor in inputs(comm, 4))

        def send(x_TH: Tensor) -> Tensor:
            op = torch.ops.expertlink.dispatch
            return op(form.name, x_TH, ids_TK, weights_TK, None, "", False)[0]

        with pytest.raises(InputError, match="torch.vmap"):
            torch.vmap(send)(torch.stack([x_TH, x_TH]))


def test_errors_come_out_of_graphs() -> None:
    with communicator(check_inputs=True) as comm:
        fast = compiled(lambda *given: comm.dispatch(*given)[0].tokens)
        x_TH, ids_TK, weights_TK = inputs(comm, 5)
        with torch.no_grad():
            fast(x_TH, ids_TK, weights_TK)
            with pytest.raises(InputError, match="topk_ids"):
                fast(x_TH, ids_TK + E, weights_TK)
            fast(x_TH, ids_TK, weights_TK)
            works(comm)
            comm.close()
            with pytest.raises(ClosedError):
                fast(x_TH, ids_TK, weights_TK)


def test_a_graph_does_not_keep_its_communicator() -> None:
    comm = communicator()
    name = comm._graph_form.name  # type: ignore[union-attr]
    comm.close()
    del comm
    gc.collect()
    with pytest.raises(ClosedError, match="lives in this process"):
        graph_names.communicator(name)


def test_names_tell_shapes_apart() -> None:
    """torch keeps compiled code on disk, by the strings in it."""
    digests = set()
    for fields in ({}, {"hidden_size": 16}, {"output_layout": "token_major"}, {"num_experts": 7}):
        with communicator(**fields) as comm:
            assert comm._graph_form is not None
            digests.add(comm._graph_form.name.split("-")[1])
    assert len(digests) == 4


# -- torch.export, fake tensors -------------------------------------------------------------------


class Routed(nn.Module):
    """A layer with a router."""

    def __init__(self, comm: MoECommunicator) -> None:
        super().__init__()
        self.comm, self.router = comm, nn.Linear(H, E)

    def forward(self, x_TH: Tensor) -> Tensor:
        weights_TK, ids_TK = self.router(x_TH).softmax(-1).topk(K)
        out, handle = self.comm.dispatch(x_TH, ids_TK, weights_TK)
        return self.comm.combine(out.tokens * 2, handle)


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """A program works in the process that made it, with the communicator that it names."""
    with communicator() as comm, torch.no_grad():
        layer = Routed(comm)
        x_TH = torch.randn(5, H)
        sizes = {"x_TH": {0: torch.export.Dim("T", min=2, max=8)}}
        program = torch.export.export(layer, (x_TH,), dynamic_shapes=sizes, strict=strict)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for module in (program.module(), torch.export.load(file).module()):
            for count in (5, 3):
                assert torch.equal(module(x_TH[:count]), layer(x_TH[:count]))


def test_fake_tensors_have_the_shapes() -> None:
    """For tools that estimate memory; nothing is sent."""
    with communicator() as comm:
        layer = Layer(comm)
        shapes = ShapeEnv(allow_dynamic_output_shape_ops=True)
        with FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True):
            x_TH, ids_TK = torch.randn(T, H), torch.zeros(T, K, dtype=torch.int64)
            assert layer(x_TH, ids_TK, torch.rand(T, K)).shape == (T, H)
        works(comm)
