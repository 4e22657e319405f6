"""The command line: `expertlink demo | bench | plot | report | balance | doctor`.

One function per command. It imports what it runs when it is called, so `--help` is quick.
`__main__.main` starts it and turns errors into sentences.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="expertlink",
    help="Expert-parallel communication for Mixture-of-Experts models.",
    no_args_is_help=True,
    add_completion=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        from expertlink.about import version

        typer.echo(version())
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Say the version, and end."
        ),
    ] = False,
) -> None:
    """Options of the command itself."""


@app.command()
def demo(
    ranks: Annotated[
        int | None, typer.Option(help="Processes. Default: 4 on CPU, all GPUs of the host.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 150,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            metavar="LAYOUT",
            help="flat, token_major, rank_major or expert_major receive layout.",
        ),
    ] = None,
    mode: Annotated[str, typer.Option("--mode", metavar="MODE", help="ht or ll.")] = "ht",
    balance_weight: Annotated[
        float, typer.Option(help="Weight of the load-balancing loss; 0: experts as they come.")
    ] = 0.1,
    seed: Annotated[int, typer.Option(help="Chooses the weights and the samples.")] = 0,
    text: Annotated[
        Path | None,
        typer.Option(help="File to learn from. Default: sources of Python's standard library."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("out/demo"),
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu or cuda.")
    ] = "auto",
) -> None:
    """Train a small byte-level MoE language model with expert parallelism on real text."""
    from rich.console import Console

    from expertlink.demo.run import DemoOptions, run_demo

    options = DemoOptions(
        out=out,
        ranks=ranks,
        steps=steps,
        mode=mode,
        layout=layout,
        balance_weight=balance_weight,
        seed=seed,
        text=text,
        device=device,
    )
    console = Console()
    if not run_demo(options, console):
        console.print(
            "The losses differ from those of one rank by more than rounding explains.", style="red"
        )
        raise typer.Exit(1)


@app.command()
def bench(
    ranks: Annotated[
        int | None,
        typer.Option(help="Ranks to start. Default: all GPUs, or up to 4 on CPU."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Tokens per rank. ht: CPU 128,1024, GPU 4096; ll: CPU 1,16,128, GPU 1 to 512.",
        ),
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(metavar="LIST", help="Hidden size. CPU: 1024; GPU: 7168.")
    ] = None,
    topk: Annotated[
        str | None, typer.Option(metavar="LIST", help="Experts per token. CPU: 4; GPU: 8.")
    ] = None,
    experts: Annotated[
        str | None, typer.Option(metavar="LIST", help="Experts. CPU: 16; GPU: 256.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="LIST", help="bfloat16, float16, float32.")
    ] = "bfloat16",
    quantization: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="none, e4m3_float32, e4m3_pow2, e4m3_ue8m0. ht: none; ll: none,e4m3_float32, by "
            "the dispatch.",
        ),
    ] = None,
    layout: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="flat, token_major, rank_major, expert_major. ht: flat; ll: "
            "expert_major,rank_major.",
        ),
    ] = None,
    max_tokens_per_rank: Annotated[
        int | None,
        typer.Option(help="Size of padded layouts. ht: T; ll: the largest T, at least 128."),
    ] = None,
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="balanced, zipf[:skew], one_hot, masked[:fraction], trace (the default with "
            "--trace).",
        ),
    ] = None,
    uneven: Annotated[
        bool, typer.Option("--uneven", help="Give every rank its own T, one of them 0.")
    ] = False,
    mode: Annotated[str, typer.Option(metavar="LIST", help="ht, ll.")] = "ht",
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="ht: uncached, cached; nvlink: zero_copy, zero_copy_cached, static, "
            "zero_copy_static, graph. ll: eager, halves, uncached, cached; nvlink: graph, "
            "graph_single.",
        ),
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="auto (the default), collective, nvlink, hybrid; --grid on GPUs: "
            "nvlink,collective.",
        ),
    ] = None,
    num_sms: Annotated[
        str | None, typer.Option(metavar="LIST", help="SMs that a call may occupy.")
    ] = None,
    num_sms_dispatch: Annotated[
        str | None, typer.Option(metavar="LIST", help="SMs for dispatch, instead of --num-sms.")
    ] = None,
    num_sms_combine: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="SMs for combine, pairwise with those for dispatch."),
    ] = None,
    ceiling_sms: Annotated[
        int, typer.Option(help="SMs of the plain bulk copies that show what the wire allows.")
    ] = 24,
    virtual_hosts: Annotated[
        int | None,
        typer.Option(help="Take the ranks of this machine for so many hosts of equally many."),
    ] = None,
    rail: Annotated[
        str | None,
        typer.Option(
            "--rail",
            metavar="RAIL",
            help="What joins virtual hosts: sockets (the default; NCCL over TCP) or nvlink.",
        ),
    ] = None,
    rail_ctas: Annotated[
        int | None,
        typer.Option(help="Most thread blocks of NCCL between hosts; few make NVLink a slow rail."),
    ] = None,
    calls_per_graph: Annotated[
        int, typer.Option(help="ll: calls in one graph of the variant `graph`.")
    ] = 20,
    grid: Annotated[
        bool,
        typer.Option("--grid", help="Vary T, H and K, where they are not given: for a heat map."),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Seconds for all cases together: as many iterations as fit, at least 5 and at "
            "most --iters, with one input."
        ),
    ] = None,
    overlap: Annotated[
        bool,
        typer.Option("--overlap", help="Measure dispatch beside a matrix product instead."),
    ] = False,
    host_time: Annotated[
        bool,
        typer.Option("--host-time", help="Measure what the host does in calls instead."),
    ] = False,
    backward: Annotated[
        bool,
        typer.Option("--backward", help="Measure forward and backward of weighted pairs instead."),
    ] = False,
    drop_in: Annotated[
        bool,
        typer.Option("--drop-in", help="Measure the calls of the drop-in for deep_ep instead."),
    ] = False,
    interface: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Those calls: normal, low_latency, elastic. Default: all."
        ),
    ] = None,
    gemm: Annotated[
        str | None,
        typer.Option(metavar="M,N,K", help="That product. CPU: 256,512,512; GPU: 8192,4096,7168."),
    ] = None,
    layer: Annotated[
        bool,
        typer.Option(
            "--layer",
            help="Measure whole MoE layers of models instead; variants: eager, graph, "
            "micro_batches.",
        ),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="Those models: qwen3-30b-a3b (GPU), deepseek-v3, mixtral-8x7b, gpt-oss-120b, "
            "kimi-k2, tiny (CPU).",
        ),
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers one after the other.")] = 1,
    profile: Annotated[
        Path | None,
        typer.Option(help="Folder for a Chrome trace of each layer, by torch's profiler."),
    ] = None,
    device: Annotated[
        str, typer.Option("--device", metavar="DEVICE", help="auto, cpu or cuda.")
    ] = "auto",
    threads: Annotated[
        int | None,
        typer.Option(help="CPU threads per rank. Default: its share of the cores, less one."),
    ] = None,
    iters: Annotated[int, typer.Option(help="Timed iterations.")] = 50,
    warmup: Annotated[int, typer.Option(help="Iterations before them.")] = 5,
    inputs: Annotated[int, typer.Option(help="Inputs that the iterations take turns with.")] = 4,
    seed: Annotated[int, typer.Option(help="Chooses routings and inputs.")] = 0,
    timeout: Annotated[float, typer.Option(help="Seconds that one case may take.")] = 300.0,
    trace: Annotated[
        Path | None, typer.Option(help="Routing trace (.npz) that the routing `trace` replays.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="File of the records, JSON lines.")] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the file instead of replacing it.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Show what every rank of a failed case said.")
    ] = False,
) -> None:
    """Measure dispatch and combine, on ranks of its own or as a rank of torchrun.

    LIST is one value or several with commas between; all combinations are measured.
    Exits with 1 if a case failed, with 2 if the options make no sense.
    """
    from rich.console import Console

    from expertlink.bench.command import run_bench
    from expertlink.bench.options import BenchOptions

    options = BenchOptions(
        ranks=ranks,
        tokens=tokens,
        hidden=hidden,
        topk=topk,
        experts=experts,
        dtype=dtype,
        quantization=quantization,
        layout=layout,
        max_tokens_per_rank=max_tokens_per_rank,
        routing=routing,
        uneven=uneven,
        mode=mode,
        variant=variant,
        engine=engine,
        num_sms=num_sms,
        num_sms_dispatch=num_sms_dispatch,
        num_sms_combine=num_sms_combine,
        ceiling_sms=ceiling_sms,
        virtual_hosts=virtual_hosts,
        rail=rail,
        rail_ctas=rail_ctas,
        calls_per_graph=calls_per_graph,
        grid=grid,
        budget=budget,
        overlap=overlap,
        host_time=host_time,
        backward=backward,
        drop_in=drop_in,
        interface=interface,
        gemm=gemm,
        layer=layer,
        model=model,
        layers=layers,
        profile=profile,
        device=device,
        threads=threads,
        iters=iters,
        warmup=warmup,
        inputs=inputs,
        seed=seed,
        timeout=timeout,
        trace=trace,
        out=out,
        append=append,
        verbose=verbose,
    )
    raise typer.Exit(run_bench(options, Console()))


@app.command()
def plot(
    results: Annotated[list[Path], typer.Argument(help="Files that bench --out wrote.")],
    out: Annotated[Path, typer.Option(help="Folder of the pictures.")] = Path("out/plots"),
) -> None:
    """Draw what bench measured: time against tokens, cases side by side, time against SMs."""
    from rich.console import Console

    from expertlink.bench.command import run_plot

    raise typer.Exit(run_plot(results, out, Console()))


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="Folder of files that bench --out wrote.")] = Path(
        "benchmarks/results"
    ),
    out: Annotated[Path, typer.Option(help="Folder of the pages.")] = Path("docs/results"),
    table: Annotated[
        bool, typer.Option("--table", help="Print the README's table of figures instead.")
    ] = False,
) -> None:
    """Write pages of tables and pictures about recorded measurements.

    The pictures are drawn into a folder beside each file of records. A Markdown file of the same
    name there has notes, which the page repeats.
    """
    from rich.console import Console

    from expertlink.bench.command import run_report

    raise typer.Exit(run_report(results, out, Console(), table=table))


@app.command()
def balance(
    trace: Annotated[Path, typer.Argument(help="Routing trace (.npz), such as the demo writes.")],
    ranks: Annotated[
        int | None, typer.Option(help="Ranks to place the experts on. Default: those of the trace.")
    ] = None,
    redundant: Annotated[
        int, typer.Option(help="Slots for copies of busy experts, over all ranks.")
    ] = 0,
    hosts: Annotated[int, typer.Option(help="Hosts that have the ranks, in blocks.")] = 1,
    history: Annotated[
        float, typer.Option(help="Share of the steps that placements are made from.")
    ] = 0.5,
    plot: Annotated[Path | None, typer.Option(help="File of a picture (.png).")] = None,
) -> None:
    """Place experts by the loads of a trace, and say how even the ranks would have been."""
    from rich.console import Console

    from expertlink.workloads.balance_report import BalanceOptions, run_balance

    options = BalanceOptions(
        trace=trace, ranks=ranks, redundant=redundant, hosts=hosts, history=history, plot=plot
    )
    run_balance(options, Console())


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
    timeout: Annotated[float, typer.Option(help="Seconds that a round trip may take.")] = 60.0,
) -> None:
    """Say what this machine and installation can do. Exits with 1 if something needed is broken."""
    from expertlink.doctor import run_doctor

    raise typer.Exit(run_doctor(as_json=as_json, timeout_s=timeout))
