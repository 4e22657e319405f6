"""What `tests/precompile.py` compiles before tests run on GPUs."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from precompile import Requests, note_dry_run, note_listed


def test_every_kernel_is_compiled_ahead() -> None:
    requests = Requests()
    note_listed(requests)
    kernels = Path(str(resources.files("expertlink.kernels")))
    sources = {
        path.relative_to(kernels).with_suffix("").as_posix() for path in kernels.rglob("*.cu")
    }
    assert sources == {source for source, *_ in requests.found}
    hosted = [instance for _, instance, _ in requests.found if "_hosted" in instance]
    assert 0 < len(hosted) < len(requests.found)


def test_a_dry_run_notes_what_hosted_tests_ask_for() -> None:
    requests = Requests()
    note_dry_run(requests, ("tests/nvlink/test_gradients.py",))
    assert {"ht/dispatch", "ht/combine"} <= {source for source, *_ in requests.found}
